// int8 by AVX-512 VNNI: 16 lanes, 32 registers. vpdpbusd adds four products of unsigned and signed bytes to each lane.
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
namespace avx512vnni {

struct V {
  struct F {
#include "zmm.inc"
  };
  using Value = int32_t;
  using Reg = __m512i;
  using Quad = __m512i;
  static constexpr int kLanes = 16, kRegisters = 32;
  static SF_INLINE Reg Load(const Value* p) { return _mm512_load_si512(p); }
  static SF_INLINE Reg LoadU(const Value* p) { return _mm512_loadu_si512(p); }
  static SF_INLINE Reg LoadPart(const Value* p, int m) { return _mm512_maskz_loadu_epi32(F::First(m), p); }
  static SF_INLINE void Store(Value* p, Reg a) { _mm512_store_si512(p, a); }
  static SF_INLINE Reg Set1(Value a) { return _mm512_set1_epi32(a); }
  static SF_INLINE Reg Panel(Reg a) { return a; }
  static SF_INLINE Reg Suspect(Reg, Reg seen) { return seen; }
  static SF_INLINE Reg Fma(Reg w, Reg x, Reg acc) { return _mm512_dpbusd_epi32(acc, x, w); }
  static SF_INLINE Reg Add(Reg a, Reg b) { return _mm512_add_epi32(a, b); }
  static SF_INLINE Reg FourBytes(Reg a, Reg b, Reg c, Reg d) {  // of 0 to 255 each
    return _mm512_or_si512(_mm512_or_si512(a, _mm512_slli_epi32(b, 8)), _mm512_or_si512(_mm512_slli_epi32(c, 16), _mm512_slli_epi32(d, 24)));
  }
  static SF_INLINE Reg Byte(Reg words, int which) { return _mm512_and_si512(_mm512_srli_epi32(words, 8 * which), Set1(255)); }
  // 4x4 words of each 128 bits.
  static SF_INLINE void TransposeQuads(Reg (&r)[4]) {
    const Reg a = _mm512_unpacklo_epi32(r[0], r[1]), b = _mm512_unpackhi_epi32(r[0], r[1]);
    const Reg c = _mm512_unpacklo_epi32(r[2], r[3]), d = _mm512_unpackhi_epi32(r[2], r[3]);
    r[0] = _mm512_unpacklo_epi64(a, c);
    r[1] = _mm512_unpackhi_epi64(a, c);
    r[2] = _mm512_unpacklo_epi64(b, d);
    r[3] = _mm512_unpackhi_epi64(b, d);
  }
  // The 16 bytes at to(l) are lane l of four words; nothing is there where that is null.
  template <typename To>
  static SF_INLINE void StoreSquare(Reg (&r)[4], To to) {
    TransposeQuads(r);
    const auto put = [&](int l, __m128i bytes) SF_LAMBDA {
      if (uint8_t* const p = to(l)) _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
    };
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      put(i, _mm512_castsi512_si128(r[i]));
      put(4 + i, _mm512_extracti32x4_epi32(r[i], 1));
      put(8 + i, _mm512_extracti32x4_epi32(r[i], 2));
      put(12 + i, _mm512_extracti32x4_epi32(r[i], 3));
    }
  }
  template <typename From>
  static SF_INLINE void LoadSquare(Reg (&r)[4], From from) {
    const auto at = [&](int l) SF_LAMBDA {
      const uint8_t* const p = from(l);
      return p == nullptr ? _mm_setzero_si128() : _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    };
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      __m512i q = _mm512_castsi128_si512(at(i));
      q = _mm512_inserti32x4(q, at(4 + i), 1);
      q = _mm512_inserti32x4(q, at(8 + i), 2);
      r[i] = _mm512_inserti32x4(q, at(12 + i), 3);
    }
    TransposeQuads(r);
  }
  static SF_INLINE Quad LoadQuad(const Value* p) { return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  template <int i>
  static SF_INLINE Reg Spread(Quad w) { return _mm512_shuffle_epi32(w, static_cast<_MM_PERM_ENUM>(i * 0x55)); }
  static SF_INLINE void Transpose(Reg (&r)[16]) {
    F::Reg t[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) t[i] = _mm512_castsi512_ps(r[i]);
    F::Transpose(t);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = _mm512_castps_si512(t[i]);
  }
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
double FmaCycles() { return V::F::FmaCycles(); }
}  // namespace avx512vnni

extern const Isa kAvx512Vnni;
const Isa kAvx512Vnni = {"avx512vnni", 16, Element::kInt8, 0, avx512vnni::FmaCycles, nullptr, avx512vnni::RunsHere, avx512vnni::PackPanel,
    avx512vnni::StoreTile, avx512vnni::kKernels, SF_COUNT(avx512vnni::kKernels), nullptr,
    avx512vnni::kWordWidth, avx512vnni::DenseUnit};

}  // namespace sparseflax
#if defined(__clang__)
#pragma clang attribute pop
#elif !defined(SF_EMULATED)
#pragma GCC pop_options
#endif
#endif
