// Where a row is kept between sweeps. load() reads the row. each(body, out) calls body(int k, A (&v)[N]) for every
// group of N consecutive numbers that the thread holds: k is the class of the first, and numbers past the row's end are
// -inf. With `out`, each() stores what the body leaves in v. largest() is the largest of the thread's numbers, where a
// store keeps them. A store has two flags: kRereads if each sweep reads memory again, kAlone if one thread has the
// whole row.
#pragma once
#include "pack.cuh"
#include "reduce.cuh"

namespace tlk {

// The part of a row that belongs to one of the team's blocks.
template <class T>
struct Slice {
  const T* x = nullptr;
  int n = 0, packs = 0, first = 0;  // numbers; packs; class of the first number

  TLK_DEVICE Slice() {}
  TLK_DEVICE Slice(const T* row, int row_n, const Team& team) {
    const int all = (row_n + kLanes<T> - 1) / kLanes<T>, each = (all + team.blocks() - 1) / team.blocks();
    first = min(row_n, int(team.rank()) * each * kLanes<T>);
    n = min(row_n - first, each * kLanes<T>);
    packs = (n + kLanes<T> - 1) / kLanes<T>;
    x = row + first;
  }
};

// The number past a row's end.
template <class T>
TLK_DEVICE T nothing() {
  return narrow<T>(-Compute<T>(INFINITY));
}

template <class T>
TLK_DEVICE Pack<T> no_pack() {
  Pack<T> pack;
#pragma unroll
  for (int i = 0; i < kLanes<T>; ++i) pack.lane[i] = nothing<T>();
  return pack;
}

template <class T>
TLK_DEVICE Compute<T> largest_of(Pack<T> pack) {
  Compute<T> v[kLanes<T>], top = Max::none<Compute<T>>();
  widen_pack(pack, v);
#pragma unroll
  for (const auto value : v) top = Max::join(top, value);
  return top;
}
// The same, of a store that does not keep packs.
template <class A, class Store>
TLK_DEVICE A largest_in(const Store& store) {
  A top = Max::none<A>();
  store.each([&](int, auto& v) {
#pragma unroll
    for (const A value : v) top = Max::join(top, value);
  });
  return top;
}

// Calls the body with pack j if the slice has it. All lanes of a warp call this, with consecutive packs.
template <class T, class Body>
TLK_DEVICE void visit(const Slice<T>& slice, int j, const Pack<T>& pack, Body& body, T* out) {
  Compute<T> v[kLanes<T>];
  widen_pack(pack, v);
  if (j < slice.packs) body(slice.first + j * kLanes<T>, v);
  if (!out) return;
  store_pack(out + slice.first, slice.n, j, narrow_pack<T>(v));
}

// Short rows, for which packs would leave lanes idle: single numbers, up to 8 per lane of some lanes of a warp.
template <class T>
class InLanes {
 public:
  static constexpr bool kRereads = false, kAlone = false;
  static constexpr int kElements = 8;

  TLK_DEVICE void load(const T* x, int n, const Team& team, void*) {
    n_ = n, first_ = team.thread(), step_ = team.threads();
#pragma unroll
    for (int i = 0; i < kElements; ++i)
      if (first_ + i * step_ < n_) x_[i] = x[first_ + i * step_];
  }
  template <class Body>
  TLK_DEVICE void each(Body body, T* out = nullptr) const {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const int k = first_ + i * step_;
      if (k >= n_) continue;
      Compute<T> v[1] = {widen(x_[i])};
      body(k, v);
      if (out) out[k] = narrow<T>(v[0]);
    }
  }

  TLK_DEVICE Compute<T> largest() const { return largest_in<Compute<T>>(*this); }

 private:
  int n_, first_, step_;
  T x_[kElements];
};

// Up to 64 bytes of the row in each thread's registers.
template <class T>
class InRegisters {
 public:
  static constexpr bool kRereads = false, kAlone = false;
  static constexpr int kPacks = 4;

  TLK_DEVICE void load(const T* x, int n, const Team& team, void*) {
    slice_ = Slice<T>(x, n, team);
    first_ = team.thread(), step_ = team.threads();
#pragma unroll
    for (int i = 0; i < kPacks; ++i)
      if (i * step_ < slice_.packs) pack_[i] = load_pack(slice_.x, slice_.n, first_ + i * step_, nothing<T>());
  }
  template <class Body>
  TLK_DEVICE void each(Body body, T* out = nullptr) const {
#pragma unroll
    for (int i = 0; i < kPacks; ++i)
      if (i * step_ < slice_.packs) visit(slice_, first_ + i * step_, pack_[i], body, out);
  }

  TLK_DEVICE Compute<T> largest() const {
    Pack<T> top = no_pack<T>();
#pragma unroll
    for (int i = 0; i < kPacks; ++i)
      if (i * step_ < slice_.packs) top = larger(top, pack_[i]);
    return largest_of(top);
  }

 private:
  Slice<T> slice_;
  int first_, step_;
  Pack<T> pack_[kPacks];
};

// The block's part of the row in shared memory, at the same alignment as in global memory. It is copied without passing
// through registers, so that all of it is in flight at once. For whole blocks.
template <class T>
class InShared {
 public:
  static constexpr bool kRereads = false, kAlone = false;
  // Shared memory for a part of `packs` packs.
  static constexpr int64_t bytes(int64_t packs) { return 16 * (packs + 2); }

  TLK_DEVICE void load(const T* x, int n, const Team& team, void* memory) {
    slice_ = Slice<T>(x, n, team);
    memory_ = static_cast<uint4*>(memory), thread_ = team.thread(), threads_ = team.threads();
    off_ = misaligned(slice_.x);
    const int ahead = int((16 - off_) % 16 / sizeof(T));  // numbers before the first aligned address
    const int head = min(slice_.n, ahead), words = (slice_.n - head) / kLanes<T>, tail = head + words * kLanes<T>;
    uint4* const to = memory_ + (off_ ? 1 : 0);
    for (int j = thread_; j < words; j += threads_) cp_async_16(to + j, slice_.x + head + j * kLanes<T>);
    cp_async_commit();
    T* const numbers = reinterpret_cast<T*>(reinterpret_cast<char*>(memory_) + off_);
    if (thread_ < head) numbers[thread_] = slice_.x[thread_];
    if (tail + thread_ < slice_.n) numbers[tail + thread_] = slice_.x[tail + thread_];
    if (slice_.n + thread_ < slice_.packs * kLanes<T>) numbers[slice_.n + thread_] = nothing<T>();
    cp_async_wait<0>();
    __syncthreads();
  }
  // Rows that are aligned have a loop of their own, without a question for each pack: a third fewer instructions.
  template <class Body>
  TLK_DEVICE void each(Body body, T* out = nullptr) const {
    T* const to = out ? out + slice_.first : nullptr;
    if (off_ == 0 && misaligned(to) == 0) {
      for (int j = thread_; j < slice_.packs; j += threads_) {
        Compute<T> v[kLanes<T>];
        widen_pack(Pack<T>(memory_[j]), v);
        body(slice_.first + j * kLanes<T>, v);
        if (to) store_pack(to, slice_.n, j, narrow_pack<T>(v));
      }
      return;
    }
    for (int first = 0; first < slice_.packs; first += threads_)
      visit(slice_, first + thread_, pack(first + thread_), body, out);
  }
  TLK_DEVICE Compute<T> largest() const {
    Pack<T> top = no_pack<T>();
    for (int j = thread_; j < slice_.packs; j += threads_) top = larger(top, pack(j));
    return largest_of(top);
  }

 private:
  Slice<T> slice_;
  uint4* memory_;
  int thread_, threads_;
  unsigned off_;

  TLK_DEVICE Pack<T> pack(int j) const {
    if (j >= slice_.packs) return no_pack<T>();
    return Pack<T>(off_ ? join(memory_[j], memory_[j + 1], off_) : memory_[j]);
  }
};

// Nothing is kept: each sweep reads memory again.
template <class T>
class InMemory {
 public:
  static constexpr bool kRereads = true, kAlone = false;

  TLK_DEVICE void load(const T* x, int n, const Team& team, void*) {
    slice_ = Slice<T>(x, n, team);
    thread_ = team.thread(), threads_ = team.threads();
  }
  // As in InShared, aligned rows have a loop of their own.
  template <class Body>
  TLK_DEVICE void each(Body body, T* out = nullptr) const {
    constexpr int kAtOnce = 2;  // loads in flight
    T* const to = out ? out + slice_.first : nullptr;
    if (misaligned(slice_.x) == 0 && misaligned(to) == 0) {
      const uint4* const from = reinterpret_cast<const uint4*>(slice_.x);
      const int whole = slice_.n / kLanes<T>;
      int j = thread_;
      for (; j < whole - (kAtOnce - 1) * threads_; j += kAtOnce * threads_) {
        Pack<T> pack[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) pack[i].bits = load_streaming(from + j + i * threads_);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          Compute<T> v[kLanes<T>];
          widen_pack(pack[i], v);
          body(slice_.first + (j + i * threads_) * kLanes<T>, v);
          if (to) store_streaming(reinterpret_cast<uint4*>(to) + j + i * threads_, narrow_pack<T>(v).bits);
        }
      }
      for (; j < slice_.packs; j += threads_)
        visit(slice_, j, load_pack(slice_.x, slice_.n, j, nothing<T>()), body, out);
      return;
    }
    for (int j = thread_; j - thread_ < slice_.packs; j += kAtOnce * threads_) {
      Pack<T> pack[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) pack[i] = load_pack(slice_.x, slice_.n, j + i * threads_, nothing<T>());
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) visit(slice_, j + i * threads_, pack[i], body, out);
    }
  }

 private:
  Slice<T> slice_;
  int thread_, threads_;
};

// Classes that are not contiguous: one thread per row, with the numbers of a row `stride` apart and neighbouring rows
// next to each other. Shared memory keeps the rows of a block as (classes, threads), or each sweep reads memory again.
template <class T, bool kShared>
class InColumn {
 public:
  static constexpr bool kRereads = !kShared, kAlone = true;
  static constexpr int kAtOnce = sizeof(T) == 8 ? 4 : 8;
  static constexpr int64_t bytes(int64_t n, int threads) { return kShared ? n * threads * int64_t(sizeof(T)) : 0; }

  TLK_DEVICE InColumn(int64_t stride, int64_t out_stride) : stride_(stride), out_stride_(out_stride) {}

  TLK_DEVICE void load(const T* x, int n, const Team&, void* memory) {
    x_ = x, n_ = n;
    if (!kShared) return;
    T* const column = static_cast<T*>(memory) + threadIdx.x;
#pragma unroll kAtOnce
    for (int k = 0; k < n; ++k) column[k * int(blockDim.x)] = x[k * stride_];
    x_ = column, stride_ = blockDim.x;
  }
  template <class Body>
  TLK_DEVICE void each(Body body, T* out = nullptr) const {
    int k = 0;
    for (; k + kAtOnce <= n_; k += kAtOnce) some<kAtOnce>(k, body, out);
    for (; k < n_; ++k) some<1>(k, body, out);
  }
  TLK_DEVICE Compute<T> largest() const { return largest_in<Compute<T>>(*this); }

 private:
  int64_t stride_, out_stride_;
  const T* x_ = nullptr;
  int n_ = 0;

  template <int N, class Body>
  TLK_DEVICE void some(int k, Body& body, T* out) const {
    Compute<T> v[N];
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = widen(x_[(k + i) * stride_]);
    body(k, v);
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (out) out[(k + i) * out_stride_] = narrow<T>(v[i]);
  }
};

}  // namespace tlk
