// int8 by AVX-512 VNNI on 256-bit vectors: 8 lanes, 32 registers. As avx512vl.cc is to avx512.cc.
#include "isa.h"

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx512vnni,fma"))), apply_to = function)
#elif !defined(SF_EMULATED)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx512vnni,fma")
#endif

namespace sparseflax {
namespace avx512vlvnni {

struct V {
  struct F {
#include "ymm.inc"
    static SF_INLINE __mmask8 First(int m) { return static_cast<__mmask8>((1u << m) - 1); }
    static SF_INLINE Reg LoadPart(const float* p, int m) { return _mm256_maskz_loadu_ps(First(m), p); }
    static SF_INLINE void StorePart(float* p, Reg a, int m) { _mm256_mask_storeu_ps(p, First(m), a); }
  };
#include "ymm_int8.inc"
  static constexpr int kLanes = 8, kRegisters = 32;
  using Quad = __m256i;
  static SF_INLINE Quad LoadQuad(const Value* p) { return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  template <int i>
  static SF_INLINE Reg Spread(Quad w) { return _mm256_shuffle_epi32(w, i * 0x55); }
  static SF_INLINE Reg Panel(Reg a) { return a; }
  static SF_INLINE Reg Fma(Reg w, Reg x, Reg acc) { return _mm256_dpbusd_epi32(acc, x, w); }
};

#include "microkernel.inc"
#include "int8.inc"
#include "dense_int8.inc"

bool RunsHere() {
#if defined(SF_EMULATED)
  return true;
#else
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma");
#endif
}
double FmaCycles() { return 0.54; }  // measured on Zen 4: as float32
}  // namespace avx512vlvnni

extern const Isa kAvx512vlVnni;
const Isa kAvx512vlVnni = {"avx512vlvnni", 8, Element::kInt8, 0, avx512vlvnni::FmaCycles, nullptr, avx512vlvnni::RunsHere, avx512vlvnni::PackPanel,
    avx512vlvnni::StoreTile, avx512vlvnni::kKernels, SF_COUNT(avx512vlvnni::kKernels), nullptr,
    avx512vlvnni::kWordWidth, avx512vlvnni::DenseUnit};

}  // namespace sparseflax
#if defined(__clang__)
#pragma clang attribute pop
#elif !defined(SF_EMULATED)
#pragma GCC pop_options
#endif
#endif
