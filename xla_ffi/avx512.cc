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
  using Reg = __m512;
  using Quad = __m512;
  static constexpr int kLanes = 16, kRegisters = 32;
  static SF_INLINE __mmask16 First(int m) { return static_cast<__mmask16>((1u << m) - 1); }
  static SF_INLINE Reg Load(const float* p) { return _mm512_load_ps(p); }
  static SF_INLINE Reg LoadU(const float* p) { return _mm512_loadu_ps(p); }
  static SF_INLINE Reg LoadPart(const float* p, int m) { return _mm512_maskz_loadu_ps(First(m), p); }
  static SF_INLINE void Store(float* p, Reg a) { _mm512_store_ps(p, a); }
  static SF_INLINE void StoreU(float* p, Reg a) { _mm512_storeu_ps(p, a); }
  static SF_INLINE void StorePart(float* p, Reg a, int m) { _mm512_mask_storeu_ps(p, First(m), a); }
  static SF_INLINE void Stream(float* p, Reg a) { _mm512_stream_ps(p, a); }
  static SF_INLINE void Fence() { _mm_sfence(); }
  static SF_INLINE Reg Set1(float a) { return _mm512_set1_ps(a); }
  static SF_INLINE Reg Fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  static SF_INLINE Reg Add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static SF_INLINE Reg Max(Reg a, Reg b) { return _mm512_max_ps(a, b); }
  static SF_INLINE Reg Min(Reg a, Reg b) { return _mm512_min_ps(a, b); }
  static SF_INLINE Quad LoadQuad(const float* p) { return _mm512_broadcast_f32x4(_mm_loadu_ps(p)); }
  template <int i>
  static SF_INLINE Reg Spread(Quad w) { return _mm512_permute_ps(w, i * 0x55); }
  // 16x16: pairs, quads inside 128-bit lanes, then the lanes themselves.
  static SF_INLINE void Transpose(Reg (&r)[16]) {
    Reg t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
      r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
      r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
      r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Reg a = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88), b = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
      const Reg c = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88), d = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
      t[i] = _mm512_shuffle_f32x4(a, c, 0x88);
      t[i + 8] = _mm512_shuffle_f32x4(a, c, 0xdd);
      t[i + 4] = _mm512_shuffle_f32x4(b, d, 0x88);
      t[i + 12] = _mm512_shuffle_f32x4(b, d, 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = t[i];
  }
};

#include "microkernel.inc"
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
const Isa kAvx512 = {"avx512", 16, avx512::FmaCycles, avx512::PeakFlops, avx512::RunsHere, avx512::PackPanel, avx512::StoreTile,
    avx512::kKernels, SF_COUNT(avx512::kKernels), &avx512::kSteps};

}  // namespace sparseflax
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
