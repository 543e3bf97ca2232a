// AVX-512: 16 lanes, 32 registers.
#include "isa.h"

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,fma")
#endif

namespace sparseflax {
namespace avx512 {

struct V {
#include "zmm.inc"
  static SF_INLINE Reg Rsqrt(Reg x, Reg one) {  // 14 bits and a step of Newton's: within 1.5 ulp. Of 0, infinity and less than 0 the step is nan
    const Reg y = _mm512_rsqrt14_ps(x), off = _mm512_fnmadd_ps(Mul(x, y), y, one), better = Fma(Mul(y, Set1(0.5f)), off, y);
    return _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask(better, better, _CMP_ORD_Q), better);
  }
};

#include "microkernel.inc"
#include "maps.inc"
#include "float32.inc"
#include "dense.inc"
#include "steps.inc"

bool RunsHere() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma");
}

double FmaCycles() { return V::FmaCycles(); }
}  // namespace avx512

extern const Isa kAvx512;
const Isa kAvx512 = {"avx512", 16, Element::kFloat32, 0, avx512::FmaCycles, avx512::PeakFlops, avx512::RunsHere, avx512::PackPanel, avx512::StoreTile,
    avx512::kKernels, SF_COUNT(avx512::kKernels), &avx512::kSteps};

}  // namespace sparseflax
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
