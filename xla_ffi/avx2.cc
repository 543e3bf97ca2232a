// AVX2 and FMA: 8 lanes, 16 registers.
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
  using Reg = __m256;
  using Quad = const float*;  // a broadcast from memory is one load; spreading a register would cost a shuffle beside it
  static constexpr int kLanes = 8, kRegisters = 16;
  static SF_INLINE __m256i First(int m) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(m), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static SF_INLINE Reg Load(const float* p) { return _mm256_load_ps(p); }
  static SF_INLINE Reg LoadU(const float* p) { return _mm256_loadu_ps(p); }
  static SF_INLINE Reg LoadPart(const float* p, int m) { return _mm256_maskload_ps(p, First(m)); }
  static SF_INLINE void Store(float* p, Reg a) { _mm256_store_ps(p, a); }
  static SF_INLINE void StoreU(float* p, Reg a) { _mm256_storeu_ps(p, a); }
  static SF_INLINE void StorePart(float* p, Reg a, int m) { _mm256_maskstore_ps(p, First(m), a); }
  static SF_INLINE void Stream(float* p, Reg a) { _mm256_stream_ps(p, a); }
  static SF_INLINE void Fence() { _mm_sfence(); }
  static SF_INLINE Reg Set1(float a) { return _mm256_set1_ps(a); }
  static SF_INLINE Reg Fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  static SF_INLINE Reg Add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static SF_INLINE Reg Max(Reg a, Reg b) { return _mm256_max_ps(a, b); }
  static SF_INLINE Reg Min(Reg a, Reg b) { return _mm256_min_ps(a, b); }
  static SF_INLINE Quad LoadQuad(const float* p) { return p; }
  template <int i>
  static SF_INLINE Reg Spread(Quad w) { return _mm256_broadcast_ss(w + i); }
  static SF_INLINE void Transpose(Reg (&r)[8]) {
    Reg t[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
      r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
      r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
      r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
      t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) r[i] = t[i];
  }
};

#include "microkernel.inc"

bool RunsHere() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
double FmaCycles() { return 0.54; }  // measured on Zen 4 in whole visits; 0.51 in a bare loop
}  // namespace avx2

extern const Isa kAvx2;
const Isa kAvx2 = {"avx2", 8, avx2::FmaCycles, avx2::PeakFlops, avx2::RunsHere, avx2::PackPanel, avx2::StoreTile,
    avx2::kKernels, SF_COUNT(avx2::kKernels)};

}  // namespace sparseflax
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
