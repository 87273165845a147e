// kl_rows.h, kl_few.h and kl_sparse_rows.h, compiled once for each instruction set into a namespace of that name, each by
// its own kl_isa_*.cpp; klcore.backends.cpu picks one at run time. All compute the same bits: only the width of the vectors differs.
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
#ifndef KLCORE_ONE_ISA   // generic alone, in a third of the time
#define KL_MORE 1
#endif
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

// Each such namespace begins with `stream_line`: 64 bytes to a 64-byte boundary past the caches, where it can.
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

// The kernels of a namespace are instantiated where this is used.
#define KL_ISA(ns, supported)                                                                       \
  {#ns, supported, ns::kernel, ns::few, ns::lanes, ns::sum_levels, ns::elementary<float>,           \
   ns::elementary<double>, ns::classes, ns::slopes_of_x, ns::slopes_of_y}

Isa generic_isa();
Isa avx2_isa();     // these two where there is KL_MORE
Isa avx512_isa();

inline const Isa* isa_table() {   // best last
#ifdef KL_MORE
  static const Isa table[] = {generic_isa(), avx2_isa(), avx512_isa(), {}};
#else
  static const Isa table[] = {generic_isa(), {}};
#endif
  return table;
}

}  // namespace kl
