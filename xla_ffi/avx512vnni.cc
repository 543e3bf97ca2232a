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
