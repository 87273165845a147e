// Transposes numbers, so that a vector can hold one class of many rows. Used by kl_few.h and kl_batch.h. Blocks of four by four
// numbers (two by two of eight bytes) are transposed in registers, in a quarter of the time of copying one number at a time. That
// time is also stable: scalar loops take up to half as long again if the compiler happens to place them badly.
#pragma once
#include <cstring>

#include "kl_plan.h"

namespace kl {

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define KL_SHUFFLES 1
#endif
#endif

template <int SIZE> struct Unit;   // an integer type of SIZE bytes
template <> struct Unit<2> { typedef std::uint16_t Type; };
template <> struct Unit<4> { typedef std::uint32_t Type; };
template <> struct Unit<8> { typedef std::uint64_t Type; };

#ifdef KL_SHUFFLES
template <typename T> constexpr int BLOCK_SIDE = sizeof(T) < 4 ? 1 : 16 / sizeof(T);   // 1: no blocks
template <typename T> KL_FN void turn_block(const char* from, i64 step, char* to, i64 pitch) {
  constexpr int SIDE = BLOCK_SIDE<T>;
  typedef T Vector __attribute__((vector_size(16)));
  Vector v[SIDE];
  for (int k = 0; k < SIDE; k++) std::memcpy(&v[k], from + k * step, 16);
  if constexpr (SIDE == 2) {
    Vector low = __builtin_shufflevector(v[0], v[1], 0, 2), high = __builtin_shufflevector(v[0], v[1], 1, 3);
    v[0] = low;
    v[1] = high;
  } else {
    Vector a = __builtin_shufflevector(v[0], v[1], 0, 4, 1, 5), b = __builtin_shufflevector(v[2], v[3], 0, 4, 1, 5);
    Vector c = __builtin_shufflevector(v[0], v[1], 2, 6, 3, 7), d = __builtin_shufflevector(v[2], v[3], 2, 6, 3, 7);
    v[0] = __builtin_shufflevector(a, b, 0, 1, 4, 5);
    v[1] = __builtin_shufflevector(a, b, 2, 3, 6, 7);
    v[2] = __builtin_shufflevector(c, d, 0, 1, 4, 5);
    v[3] = __builtin_shufflevector(c, d, 2, 3, 6, 7);
  }
  for (int k = 0; k < SIDE; k++) std::memcpy(to + k * pitch, &v[k], 16);
}
#else
template <typename T> constexpr int BLOCK_SIDE = 1;
template <typename T> KL_FN void turn_block(const char*, i64, char*, i64) {}
#endif

// Transposes m rows of n numbers, `step` bytes apart, to n rows of m numbers, `pitch` bytes apart.
template <int SIZE>
KL_FN void turn(const char* __restrict from, i64 step, i64 m, i64 n, char* __restrict to, i64 pitch) {
  typedef typename Unit<SIZE>::Type T;
  constexpr int SIDE = BLOCK_SIDE<T>;
  i64 rows = SIDE > 1 ? m / SIDE * SIDE : 0, columns = SIDE > 1 ? n / SIDE * SIDE : 0;
  if constexpr (SIDE > 1)
    for (i64 j = 0; j < columns; j += SIDE)
      for (i64 i = 0; i < rows; i += SIDE) turn_block<T>(from + i * step + j * SIZE, step, to + j * pitch + i * SIZE, pitch);
  auto rest = [=](i64 j, i64 end, i64 first) {
    for (; j < end; j++)
      for (i64 i = first; i < m; i++) std::memcpy(to + j * pitch + i * SIZE, from + i * step + j * SIZE, SIZE);
  };
  if (rows < m) rest(0, columns, rows);
  rest(columns, n, 0);
}

}  // namespace kl
