// Loads and stores of a row in packs of 16 bytes, at any alignment. Pack k holds the numbers from k * kLanes<T> on,
// wherever the row starts in memory: a thread gets the same numbers at every alignment, so sums have one order.
#pragma once
#include "vector.cuh"

namespace tlk {

// Bytes `from` to `from + 15` of the 32 in a and b; `from` is even and below 16.
TLK_DEVICE uint4 join(uint4 a, uint4 b, unsigned from) {
  unsigned w[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
  if (from & 8) {
#pragma unroll
    for (int i = 0; i < 6; ++i) w[i] = w[i + 2];
  }
  if (from & 4) {
#pragma unroll
    for (int i = 0; i < 5; ++i) w[i] = w[i + 1];
  }
  if (from & 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) w[i] = w[i] >> 16 | w[i + 1] << 16;
  }
  return make_uint4(w[0], w[1], w[2], w[3]);
}

// Bytes from the last multiple of 16 to p.
template <class T>
TLK_DEVICE unsigned misaligned(const T* p) {
  return unsigned(reinterpret_cast<uintptr_t>(p) % 16);
}

// The unsigned integer of T's size.
template <class T>
struct Bits {
  using type = unsigned short;
};
template <>
struct Bits<float> {
  using type = unsigned;
};
template <>
struct Bits<double> {
  using type = unsigned long long;
};

// The pack that starts at number `first`, loaded number by number, `fill` past the row's end. Like store_numbers only
// used next to the ends of rows: the loops are short code, not fast.
template <class T>
TLK_DEVICE uint4 load_numbers(const T* row, int64_t n, int64_t first, T fill) {
  unsigned long long half[2];
  constexpr int kEach = kLanes<T> / 2;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    half[h] = 0;
#pragma unroll 1
    for (int i = 0; i < kEach; ++i) {
      const int64_t index = first + h * kEach + i;
      const T value = index < n ? row[index] : fill;
      typename Bits<T>::type bits;
      memcpy(&bits, &value, sizeof bits);
      half[h] |= static_cast<unsigned long long>(bits) << (8 * int(sizeof(T)) * i);
    }
  }
  return make_uint4(unsigned(half[0]), unsigned(half[0] >> 32), unsigned(half[1]), unsigned(half[1] >> 32));
}
// Stores the lanes `from` to `to - 1` of the pack that starts at number `first`, as far as the row goes.
template <class T>
TLK_DEVICE void store_numbers(T* row, int64_t n, int64_t first, int from, int to, uint4 v) {
  const unsigned long long half[2] = {v.x | static_cast<unsigned long long>(v.y) << 32,
                                      v.z | static_cast<unsigned long long>(v.w) << 32};
  constexpr int kEach = kLanes<T> / 2;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll 1
    for (int i = 0; i < kEach; ++i) {
      const int k = h * kEach + i;
      const auto bits = static_cast<typename Bits<T>::type>(half[h] >> (8 * int(sizeof(T)) * i));
      if (k >= from && k < to && first + k < n) memcpy(row + first + k, &bits, sizeof bits);
    }
  }
}

// Pack k of a row of n numbers, `fill` past its end. In an unaligned row it joins two aligned loads, which neighbouring
// threads share in the first-level cache. Packs next to the row's ends are read number by number: nothing outside the
// row is read.
template <class T, class Index>
TLK_DEVICE Pack<T> load_pack(const T* row, Index n, Index k, T fill) {
  const unsigned off = misaligned(row);
  if (off == 0 && k < n / kLanes<T>) return Pack<T>(load_streaming(reinterpret_cast<const uint4*>(row) + k));
  const int64_t first = int64_t(k) * kLanes<T>;
  if (off != 0 && k > 0 && 16 * int64_t(k) - off + 32 <= int64_t(n) * int64_t(sizeof(T))) {
    const uint4* const p = reinterpret_cast<const uint4*>(reinterpret_cast<const char*>(row + first) - off);
    const uint4 a = p[0], b = p[1];
    return Pack<T>(join(a, b, off));
  }
  return Pack<T>(load_numbers(row, n, first, fill));
}

// Stores pack k of a row of n numbers, as far as the row goes. All lanes of a warp call this, with consecutive packs:
// in an unaligned row a lane stores the end of the previous lane's pack and the start of its own, as 16 aligned bytes.
template <class T, class Index>
TLK_DEVICE void store_pack(T* row, Index n, Index k, Pack<T> pack) {
  const unsigned off = misaligned(row);
  if (off == 0 && k < n / kLanes<T>) return store_streaming(reinterpret_cast<uint4*>(row) + k, pack.bits);
  const int64_t first = int64_t(k) * kLanes<T>, bytes = int64_t(n) * int64_t(sizeof(T));
  if (off == 0) return store_numbers(row, n, first, 0, kLanes<T>, pack.bits);
  const unsigned lane = threadIdx.x % kWarp;
  uint4 previous;
  previous.x = __shfl_up_sync(0xffffffffu, pack.bits.x, 1);
  previous.y = __shfl_up_sync(0xffffffffu, pack.bits.y, 1);
  previous.z = __shfl_up_sync(0xffffffffu, pack.bits.z, 1);
  previous.w = __shfl_up_sync(0xffffffffu, pack.bits.w, 1);
  // Whether the row has all of the 16 aligned bytes in which this pack begins, and of those in which it ends.
  const bool begins = lane > 0 && 16 * int64_t(k) - off + 16 <= bytes,
             ends = lane + 1 < kWarp && 16 * int64_t(k) - off + 32 <= bytes;
  if (begins)
    store_streaming(reinterpret_cast<uint4*>(reinterpret_cast<char*>(row + first) - off),
                    join(previous, pack.bits, 16 - off));
  const int split = int((16 - off) / sizeof(T));  // numbers before the next aligned address
  const int from = begins ? split : 0, to = ends ? split : kLanes<T>;
  if (from < to) store_numbers(row, n, first, from, to, pack.bits);
}

}  // namespace tlk
