// Where a row is kept between sweeps. load() reads the row. each(body, out) calls body(int k, A (&v)[N]) for every
// group of N consecutive numbers that the thread holds: k is the class of the first, and numbers past the row's end are
// -inf. With `out`, each() stores what the body leaves in v. A store has two flags: kRereads if each sweep reads memory
// again, kAlone if one thread has the whole row.
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

// Calls the body with pack j if the slice has it. All lanes of a warp call this, with consecutive packs.
template <class T, class Body>
TLK_DEVICE void visit(const Slice<T>& slice, int j, const Pack<T>& pack, Body& body, T* out) {
  Compute<T> v[kLanes<T>];
#pragma unroll
  for (int i = 0; i < kLanes<T>; ++i) v[i] = widen(pack.lane[i]);
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
    cp_async_wait<0>();
    __syncthreads();
  }
  template <class Body>
  TLK_DEVICE void each(Body body, T* out = nullptr) const {
    for (int first = 0; first < slice_.packs; first += threads_)
      visit(slice_, first + thread_, pack(first + thread_), body, out);
  }

 private:
  Slice<T> slice_;
  uint4* memory_;
  int thread_, threads_;
  unsigned off_;

  TLK_DEVICE Pack<T> pack(int j) const {
    Pack<T> pack;
    if (j < slice_.packs) pack.bits = off_ ? join(memory_[j], memory_[j + 1], off_) : memory_[j];
    if ((j + 1) * kLanes<T> > slice_.n) {
#pragma unroll
      for (int i = 0; i < kLanes<T>; ++i)
        if (j * kLanes<T> + i >= slice_.n) pack.lane[i] = nothing<T>();
    }
    return pack;
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
  template <class Body>
  TLK_DEVICE void each(Body body, T* out = nullptr) const {
    constexpr int kAtOnce = 2;  // loads in flight
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
