// The rows for AVX2 (kl_isa.h). Only this namespace is compiled for it: what other files share must run anywhere.
#include "kl_isa.h"
#ifdef KL_MORE

namespace kl {

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
#else
#pragma GCC pop_options
#endif

Isa avx2_isa() {
  __builtin_cpu_init();
  return KL_ISA(avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"));
}

}  // namespace kl

#endif
