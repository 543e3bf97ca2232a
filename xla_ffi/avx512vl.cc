// AVX-512 instructions on 256-bit vectors: 8 lanes, 32 registers. Where 512-bit operations run in halves, and where 16 lanes
// would stay empty (7x7 images), these tiles win.
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
namespace avx512vl {

struct V {
#include "ymm.inc"
  static constexpr int kLanes = 8, kRegisters = 32;
  static SF_INLINE __mmask8 First(int m) { return static_cast<__mmask8>((1u << m) - 1); }
  static SF_INLINE Reg LoadPart(const float* p, int m) { return _mm256_maskz_loadu_ps(First(m), p); }
  static SF_INLINE void StorePart(float* p, Reg a, int m) { _mm256_mask_storeu_ps(p, First(m), a); }
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
double FmaCycles() { return 0.54; }  // measured on Zen 4 in whole visits; 0.51 in a bare loop
}  // namespace avx512vl

extern const Isa kAvx512vl;
const Isa kAvx512vl = {"avx512vl", 8, Element::kFloat32, 0, avx512vl::FmaCycles, avx512vl::PeakFlops, avx512vl::RunsHere, avx512vl::PackPanel, avx512vl::StoreTile,
    avx512vl::kKernels, SF_COUNT(avx512vl::kKernels), &avx512vl::kSteps};

}  // namespace sparseflax
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
