// AVX2 and FMA: 8 lanes, 16 registers; float32, and int8 without VNNI.
#include "isa.h"

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

namespace sparseflax {
namespace avx2 {

struct V {
#include "ymm.inc"
  static constexpr int kLanes = 8, kRegisters = 16;
  static SF_INLINE __m256i First(int m) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(m), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static SF_INLINE Reg LoadPart(const float* p, int m) { return _mm256_maskload_ps(p, First(m)); }
  static SF_INLINE void StorePart(float* p, Reg a, int m) { _mm256_maskstore_ps(p, First(m), a); }
};

#include "microkernel.inc"
#include "maps.inc"
#include "float32.inc"
#include "dense.inc"
#include "steps.inc"

bool RunsHere() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
double FmaCycles() { return 0.54; }  // measured on Zen 4 in whole visits; 0.51 in a bare loop
}  // namespace avx2

namespace avx2_int8 {

// vpmaddubsw multiplies unsigned by signed bytes and sums two products in 16 bits, with saturation: 255 * 127 twice does not fit. The
// panel therefore holds x - 128, and what is multiplied is |x - 128| <= 128 and w times its sign: 2 * 128 * 127 = 32512 < 32768.
struct V {
  using F = avx2::V;
#include "ymm_int8.inc"
  using Quad = const Value*;  // a weight is broadcast from memory: the ports of shuffles are busy
  static constexpr int kLanes = 8, kRegisters = 10;  // the others hold ones, the weight, and the factors of two products
  static SF_INLINE Quad LoadQuad(const Value* p) { return p; }
  template <int i>
  static SF_INLINE Reg Spread(Quad w) { return Set1(w[i]); }
  static SF_INLINE Reg Panel(Reg a) { return _mm256_xor_si256(a, _mm256_set1_epi8(-128)); }
  static SF_INLINE Reg Fma(Reg w, Reg x, Reg acc) {
    const Reg pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(w, x));
    Reg sum = Add(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    asm("" : "+x"(sum));  // else GCC adds up several words first, as integers allow, and spills the accumulators for it
    return sum;
  }
};

#include "microkernel.inc"
#include "int8.inc"
#include "dense_int8.inc"

double FmaCycles() { return 1.25; }
}  // namespace avx2_int8

extern const Isa kAvx2;
const Isa kAvx2 = {"avx2", 8, Element::kFloat32, 0, avx2::FmaCycles, avx2::PeakFlops, avx2::RunsHere, avx2::PackPanel, avx2::StoreTile,
    avx2::kKernels, SF_COUNT(avx2::kKernels), &avx2::kSteps};
extern const Isa kAvx2Int8;
const Isa kAvx2Int8 = {"avx2", 8, Element::kInt8, 128, avx2_int8::FmaCycles, nullptr, avx2::RunsHere, avx2_int8::PackPanel,
    avx2_int8::StoreTile, avx2_int8::kKernels, SF_COUNT(avx2_int8::kKernels), nullptr,
    avx2_int8::kWordWidth, avx2_int8::DenseUnit};

}  // namespace sparseflax
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
