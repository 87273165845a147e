// CUDA kernels on the CPU, for tests without a GPU: the subset of CUDA C++ that klcore uses, for g++ -std=c++17.
// Included before the CUDA source, with launch.h after it; tests/emulator/device.py compiles the three and starts
// kernels. What kernels need while they run is in emulator.cpp, which is compiled once for all of them.
//
// Not supported, because klcore does not use them: static __shared__ variables, grids and blocks of more than one
// dimension, shuffles within parts of a warp (width), textures, streams, clusters of blocks.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#define KL_EMULATOR 1
#if !defined(KL_EMULATOR_ARCH)
#define KL_EMULATOR_ARCH 90   // the GPU that is emulated, as __CUDA_ARCH__ / 10
#endif

// After the standard headers, which use some of these names themselves.
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline   // and no more: code that is not inlined is compiled in two thirds of the time
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

namespace emulator {

constexpr unsigned WARP = 32;

struct Dim { unsigned x, y, z; };

struct Here {                         // where a thread is
  Dim thread, block, threads, blocks;   // threadIdx, blockIdx, blockDim, gridDim
  unsigned lane;
  char* shared;                       // its block's memory
};

enum Place : unsigned char {          // where a thread waits
  RUNNING, RETURNED, SYNCTHREADS, WARPS_BARRIER, SYNCWARP, SHFL, SHFL_XOR, SHFL_DOWN, ALL, ANY, BALLOT,
};

// What emulator.cpp does for a kernel. Virtual functions, so that no linker has to find them.
struct Runtime {
  virtual const Here& here() = 0;
  virtual void syncthreads() = 0;
  virtual void warps_barrier(unsigned threads) = 0;   // of the first threads of the block
  // The lanes of `mask` meet. Each contributes a value and receives that of lane `source`; for __syncwarp and votes, it
  // receives the bits of the lanes whose value is not zero.
  virtual std::uint64_t meet(Place place, unsigned mask, std::uint64_t value, unsigned source) = 0;
  virtual void copy_async(void* to_shared, const void* from_global, unsigned bytes) = 0;
  virtual void wait_copies() = 0;
  // Stops the launch; the message begins with the kernel, the block and the thread.
  [[noreturn]] __attribute__((format(printf, 2, 3))) virtual void fail(const char* format, ...) = 0;
};
inline Runtime* runtime;              // device.py sets it

inline const Here& here() { return runtime->here(); }
inline unsigned lane() { return here().lane; }
inline char* shared_memory() { return here().shared; }

template <typename T> inline T shuffle(Place place, unsigned mask, T value, unsigned source) {
  static_assert(sizeof(T) <= 8, "shuffles take up to 8 bytes");
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = runtime->meet(place, mask, bits, source);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <int BYTES> inline void check_aligned(const void* at, const char* what) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "vectors have 4, 8 or 16 bytes");
  if ((std::uintptr_t)at % BYTES)
    runtime->fail("%s %d bytes at %p, which is not aligned to them", what, BYTES, at);
}

}  // namespace emulator

// ---- CUDA's own functions -------------------------------------------------------------------------------------------
inline void __syncthreads() { emulator::runtime->syncthreads(); }
inline void __syncwarp(unsigned mask = ~0u) { emulator::runtime->meet(emulator::SYNCWARP, mask, 0, emulator::lane()); }
template <typename T> inline T __shfl_sync(unsigned mask, T value, int source) {
  return emulator::shuffle(emulator::SHFL, mask, value, (unsigned)source % emulator::WARP);
}
template <typename T> inline T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return emulator::shuffle(emulator::SHFL_XOR, mask, value, (emulator::lane() ^ (unsigned)bits) % emulator::WARP);
}
template <typename T> inline T __shfl_down_sync(unsigned mask, T value, unsigned by) {
  unsigned lane = emulator::lane();
  return emulator::shuffle(emulator::SHFL_DOWN, mask, value, lane + by < emulator::WARP ? lane + by : lane);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return (unsigned)emulator::runtime->meet(emulator::BALLOT, mask, predicate != 0, emulator::lane());
}
inline int __any_sync(unsigned mask, int predicate) {
  return emulator::runtime->meet(emulator::ANY, mask, predicate != 0, emulator::lane()) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
  return emulator::runtime->meet(emulator::ALL, mask, predicate == 0, emulator::lane()) == 0;   // none votes against
}
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline unsigned atomicAdd(unsigned* at, unsigned by) { return __atomic_fetch_add(at, by, __ATOMIC_SEQ_CST); }
inline unsigned atomicInc(unsigned* at, unsigned last) {
  const int order = __ATOMIC_SEQ_CST;
  unsigned old = __atomic_load_n(at, order);
  while (!__atomic_compare_exchange_n(at, &old, old >= last ? 0 : old + 1, false, order, order)) {}
  return old;
}

// ---- what klcore's CUDA source has in PTX ---------------------------------------------------------------------------
namespace kl {

// of the first `warps` warps of the block
inline void warps_barrier(int warps) { emulator::runtime->warps_barrier((unsigned)warps * emulator::WARP); }

template <int BYTES> inline void copy_async(void* to_shared, const void* from_global) {
  static_assert(BYTES > 0 && KL_EMULATOR_ARCH >= 80, "asynchronous copies need compute capability 8.0");
  emulator::check_aligned<BYTES>(to_shared, "copies asynchronously to");
  emulator::check_aligned<BYTES>(from_global, "copies asynchronously from");
  emulator::runtime->copy_async(to_shared, from_global, BYTES);
}
inline void wait_copies() { emulator::runtime->wait_copies(); }

template <int BYTES> inline void copy_vector(void* to, const void* from) {
  emulator::check_aligned<BYTES>(to, "writes");
  emulator::check_aligned<BYTES>(from, "reads");
  char vector[BYTES];
  std::memcpy(vector, from, BYTES);
  std::memcpy(to, vector, BYTES);
}

// y changed by up to `ulps` units in the last place, by the same amount for the same x
inline float disturbed(float x, float y, unsigned ulps) {
  if (!std::isnormal(y)) return y;
  std::uint32_t of_x, of_y;
  std::memcpy(&of_x, &x, 4);
  std::memcpy(&of_y, &y, 4);
  std::uint32_t moved = of_y + (of_x * 2654435769u >> 16) % (2 * ulps + 1) - ulps;
  std::memcpy(&y, &moved, 4);
  return y;
}
// As inaccurate as a GPU's instructions
inline float hardware_exp2(float x) { return x == 0 ? 1.f : disturbed(x, exp2f(x), 2); }
inline float hardware_reciprocal(float x) { return disturbed(x, 1.f / x, 1); }

}  // namespace kl

#define threadIdx (emulator::here().thread)
#define blockIdx (emulator::here().block)
#define blockDim (emulator::here().threads)
#define gridDim (emulator::here().blocks)
