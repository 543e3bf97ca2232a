// AVX-512: 16 lanes, 32 registers.
#include "isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
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

// Zen 4 (family 0x19, as Zen 3 without them) runs 512-bit operations in two halves: 1.11 cycles measured, 0.51 for 256 bits.
double FmaCycles() {
  static const bool halves = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!RunsHere() || !__get_cpuid(0, &a, &b, &c, &d) || b != 0x68747541) return false;  // "Auth"enticAMD
    __get_cpuid(1, &a, &b, &c, &d);
    return ((a >> 8) & 0xf) + ((a >> 20) & 0xff) == 0x19;
  }();
  return halves ? 1.11 : 0.5;
}
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
