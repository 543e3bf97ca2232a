// int8 by AVX-VNNI, on processors without AVX-512: 8 lanes, 16 registers.
#include "isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avxvnni"))), apply_to = function)
#elif !defined(SF_EMULATED)
#pragma GCC push_options
#pragma GCC target("avx2,fma,avxvnni")
#endif

namespace sparseflax {
namespace avxvnni {

struct V {
  struct F {
#include "ymm.inc"
    static SF_INLINE __m256i First(int m) {
      return _mm256_cmpgt_epi32(_mm256_set1_epi32(m), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    }
    static SF_INLINE Reg LoadPart(const float* p, int m) { return _mm256_maskload_ps(p, First(m)); }
    static SF_INLINE void StorePart(float* p, Reg a, int m) { _mm256_maskstore_ps(p, First(m), a); }
  };
#include "ymm_int8.inc"
  static constexpr int kLanes = 8, kRegisters = 14;  // a weight and a word of the panel take two more than in float32
  using Quad = __m256i;
  static SF_INLINE Quad LoadQuad(const Value* p) { return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  template <int i>
  static SF_INLINE Reg Spread(Quad w) { return _mm256_shuffle_epi32(w, i * 0x55); }
  static SF_INLINE Reg Panel(Reg a) { return a; }
  static SF_INLINE Reg Fma(Reg w, Reg x, Reg acc) { return _mm256_dpbusd_avx_epi32(acc, x, w); }
};

#include "microkernel.inc"
#include "int8.inc"
#include "dense_int8.inc"

bool RunsHere() {
#if defined(SF_EMULATED)
  return true;
#else
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a >> 4 & 1) != 0;
#endif
}
double FmaCycles() { return 0.5; }  // not measured: as float32
}  // namespace avxvnni

extern const Isa kAvxVnni;
const Isa kAvxVnni = {"avxvnni", 8, Element::kInt8, 0, avxvnni::FmaCycles, nullptr, avxvnni::RunsHere, avxvnni::PackPanel,
    avxvnni::StoreTile, avxvnni::kKernels, SF_COUNT(avxvnni::kKernels), nullptr,
    avxvnni::kWordWidth, avxvnni::DenseUnit};

}  // namespace sparseflax
#if defined(__clang__)
#pragma clang attribute pop
#elif !defined(SF_EMULATED)
#pragma GCC pop_options
#endif
#endif
