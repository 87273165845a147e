// kl_rows.h, kl_few.h and kl_sparse_rows.h, compiled once for each instruction set into a namespace of that name;
// klcore.backends.cpu picks one at run time. All of them compute the same bits: only the width of the vectors differs.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kl_math.h"
#include "kl_compat.h"
#include "kl_estimate.h"
#include "kl_tree.h"
#include "kl_store.h"
#include "kl_logits.h"
#include "kl_renyi.h"
#include "kl_sparse.h"
#include "kl_plan.h"
#include "kl_turn.h"

#if (defined(__x86_64__) || defined(__i386__)) && (defined(__GNUC__) || defined(__clang__))
#define KL_X86 1
#include <immintrin.h>
#endif

namespace kl {

// Makes streamed stores visible to other threads.
inline void stream_end() {
#if defined(KL_X86) && defined(__SSE2__)
  _mm_sfence();
#endif
}

KL_FN void prefetch(const char* p) {
#if defined(__GNUC__) || defined(__clang__)
  __builtin_prefetch(p, 0, 3);
#else
  (void)p;
#endif
}

// Each namespace below begins with `stream_line`: it writes 64 bytes to a 64-byte boundary, bypassing the caches where it can.
namespace generic {   // what the compiler targets by default: SSE2 on x86-64, NEON on aarch64
inline void stream_line(char* to, const char* from) {
#ifdef __SSE2__
  for (int i = 0; i < 64; i += 16) _mm_stream_si128((__m128i*)(to + i), _mm_loadu_si128((const __m128i*)(from + i)));
#else
  std::memcpy(to, from, 64);
#endif
}
#include "kl_rows.h"
#include "kl_few.h"
#include "kl_sparse_steps.h"
#include "kl_sparse_rows.h"
}  // namespace generic

// KLCORE_ONE_ISA: no other instruction sets, which compiles in a third of the time.
#if defined(KL_X86) && !defined(KLCORE_ONE_ISA)
#define KL_MORE 1

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#endif
namespace avx2 {
inline void stream_line(char* to, const char* from) {
  for (int i = 0; i < 64; i += 32)
    _mm256_stream_si256((__m256i*)(to + i), _mm256_loadu_si256((const __m256i*)(from + i)));
}
#include "kl_rows.h"
#include "kl_few.h"
#include "kl_sparse_steps.h"
#include "kl_sparse_rows.h"
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c,bmi,bmi2"))), apply_to = function)
#pragma clang attribute push(__attribute__((min_vector_width(512))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c,bmi,bmi2,prefer-vector-width=512")
#endif
namespace avx512 {
inline void stream_line(char* to, const char* from) { _mm512_stream_si512((__m512i*)to, _mm512_loadu_si512(from)); }
#include "kl_rows.h"
#include "kl_few.h"
#include "kl_sparse_steps.h"
#include "kl_sparse_rows.h"
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // KL_MORE

typedef void (*RowStep)(const Plan&, i64 r);

struct Isa {
  const char* name;
  bool supported;                    // by this processor
  Kernel (*kernel)(const Plan&);
  Few (*few)(const Plan&);           // for rows of few classes; nullptr: none
  int (*lanes)(i64 n, bool wide);    // how many rows `few` takes at once
  double (*sum_levels)(double*, i64);
  void (*elementary_float)(int, const float*, float*, i64);
  void (*elementary_double)(int, const double*, double*, i64);
  RowStep classes, slopes_of_x, slopes_of_y;   // for rows in which x lists some classes
};

#define KL_ROWS(ns)                                                                                 \
  ns::kernel, ns::few, ns::lanes, ns::sum_levels, ns::elementary<float>, ns::elementary<double>,    \
      ns::classes, ns::slopes_of_x, ns::slopes_of_y

inline const Isa* isa_table() {   // best last
#ifdef KL_MORE
  __builtin_cpu_init();
  static const Isa table[] = {
      {"generic", true, KL_ROWS(generic)},
      {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), KL_ROWS(avx2)},
      {"avx512", __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                     __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                     __builtin_cpu_supports("fma"), KL_ROWS(avx512)},
      {}};
#else
  static const Isa table[] = {{"generic", true, KL_ROWS(generic)}, {}};
#endif
  return table;
}

}  // namespace kl
