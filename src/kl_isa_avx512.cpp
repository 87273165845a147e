// The rows for AVX-512 (kl_isa.h). Only this namespace is compiled for it: what other files share must run anywhere.
#include "kl_isa.h"
#ifdef KL_MORE

namespace kl {

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c,bmi,bmi2"))), apply_to = function)
#pragma clang attribute push(__attribute__((min_vector_width(512))), apply_to = function)
#else
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

Isa avx512_isa() {
  __builtin_cpu_init();
  return KL_ISA(avx512, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"));
}

}  // namespace kl

#endif
