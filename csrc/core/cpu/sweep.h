// Loops over contiguous memory: whole vectors, unrolled, and a last one with fewer elements.
#pragma once
#include "vec.h"

namespace tlk {
namespace TLK_ISA {

// Loads n elements, up to a whole vector; the other lanes are `fill`.
template <class E>
TLK_INLINE Vec<typename Compute<E>::type> load_some(const E* p, int n, typename Compute<E>::type fill) {
  using A = typename Compute<E>::type;
  return n == lanes<A> ? load(p) : load_n(p, n, set1(fill));
}
template <class E>
TLK_INLINE void store_some(E* p, int n, Vec<typename Compute<E>::type> v) {
  if (n == lanes<typename Compute<E>::type>)
    store(p, v);
  else
    store_n(p, n, v);
}

// v with zeros from lane n on.
template <class A>
TLK_INLINE Vec<A> only(Vec<A> v, int n) {
  return n == lanes<A> || iota<A>() < n ? v : Vec<A>{};
}

// Calls body(first element, slot, number of elements) for elements begin to end - 1. `slot` is below kSlots and differs
// between unrolled calls; the number of elements is lanes<A>, or less in the last call.
constexpr int kSlots = 4;
template <class A, class Body>
TLK_INLINE void sweep(int64_t begin, int64_t end, Body body) {
  constexpr int L = lanes<A>;
  int64_t k = begin;
  for (; k + kSlots * L <= end; k += kSlots * L) {
    body(k, 0, L);
    body(k + L, 1, L);
    body(k + 2 * L, 2, L);
    body(k + 3 * L, 3, L);
  }
  for (; k + L <= end; k += L) body(k, 0, L);
  if (k < end) body(k, 0, int(end - k));
}

template <class V>
TLK_INLINE V max_of_slots(const V (&part)[kSlots]) {
  return vmax(vmax(part[0], part[1]), vmax(part[2], part[3]));
}

// A sum in kSlots independent chains, one for each slot.
template <class A>
struct Chains {
  Vec<A> part[kSlots] = {};
  TLK_INLINE A sum() const { return reduce_sum<A>((part[0] + part[1]) + (part[2] + part[3])); }
};

}  // namespace TLK_ISA
}  // namespace tlk
