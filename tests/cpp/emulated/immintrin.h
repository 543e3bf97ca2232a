// AVX-512 and VNNI on a processor without: found before the compiler's own header, each instruction that the int8 kernels use of them
// as Intel's manual defines it, one element after the other. Masked elements of memory are not touched.
#pragma once
#include_next <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulated {

struct alignas(64) Floats {
  float at[16];
};
struct Quad {
  int32_t at[4];
};
struct alignas(64) Ints {
  int32_t at[16];
};

template <typename T, typename F>
T Each(F f) {
  T r;
  for (int i = 0; i < 16; ++i) r.at[i] = f(i);
  return r;
}
template <typename T>
T Read(const void* p) {
  T r;
  std::memcpy(&r, p, sizeof r);
  return r;
}
template <typename T>
T Aligned(const void* p) {
  return *static_cast<const T*>(p);  // the sanitizer refuses another address
}
template <typename T, typename E>
T ReadMasked(unsigned mask, const E* p) {
  return Each<T>([&](int i) { return mask >> i & 1 ? p[i] : 0; });
}
template <typename E, typename T>
void WriteMasked(E* p, unsigned mask, const T& a, int count) {
  for (int i = 0; i < count; ++i) {
    if (mask >> i & 1) p[i] = a[i];
  }
}
template <typename T>
T Unpack(const T& a, const T& b, int first) {
  return Each<T>([&](int i) { return (i % 2 == 0 ? a : b).at[i / 4 * 4 + first + i % 4 / 2]; });
}
template <typename T>  // in each 128 bits two elements of a, then two of b
T Shuffle(const T& a, const T& b, int imm) {
  return Each<T>([&](int i) { return (i % 4 < 2 ? a : b).at[i / 4 * 4 + (imm >> (2 * (i % 4)) & 3)]; });
}
template <typename T>  // two times 128 bits of a, then of b
T ShuffleQuads(const T& a, const T& b, int imm) {
  return Each<T>([&](int i) { return (i < 8 ? a : b).at[(imm >> (2 * (i / 4)) & 3) * 4 + i % 4]; });
}
inline int32_t Round(float a) { return std::abs(a) < 2147483648.f ? static_cast<int32_t>(std::nearbyint(a)) : INT32_MIN; }
// Four products of an unsigned and a signed byte, and the sum, modulo 2^32: of all elements at once, as most of the time goes here.
template <typename T>
T Dot(const T& sum, const T& a, const T& b) {
  typedef uint32_t Unsigned __attribute__((vector_size(sizeof(T))));
  typedef int32_t Signed __attribute__((vector_size(sizeof(T))));
  const auto x = Read<Unsigned>(&a), w = Read<Unsigned>(&b);
  auto all = Read<Unsigned>(&sum);
  for (int byte = 0; byte < 32; byte += 8) all += (x >> byte & 255) * (Unsigned)((Signed)(w << (24 - byte)) >> 24);
  return Read<T>(&all);
}
inline __m128i Narrow(const Ints& a) {
  uint8_t bytes[16];
  for (int i = 0; i < 16; ++i) bytes[i] = static_cast<uint8_t>(a.at[i]);
  return Read<__m128i>(bytes);
}
inline Ints Widen(__m128i a) {
  uint8_t bytes[16];
  std::memcpy(bytes, &a, 16);
  return Each<Ints>([&](int i) { return bytes[i]; });
}
inline Ints Insert(Ints a, __m128i b, int quad) {
  std::memcpy(&a.at[4 * quad], &b, 16);
  return a;
}
inline __m128i ReadBytes(unsigned mask, const void* p) {
  uint8_t bytes[16];
  for (int i = 0; i < 16; ++i) bytes[i] = mask >> i & 1 ? static_cast<const uint8_t*>(p)[i] : 0;
  return Read<__m128i>(bytes);
}
inline void WriteBytes(void* p, unsigned mask, __m128i a) {
  uint8_t bytes[16];
  std::memcpy(bytes, &a, 16);
  WriteMasked(static_cast<uint8_t*>(p), mask, bytes, 16);
}
inline __m256 ReadFloats(unsigned mask, const float* p) {
  float r[8];
  for (int i = 0; i < 8; ++i) r[i] = mask >> i & 1 ? p[i] : 0;
  return Read<__m256>(r);
}
inline void WriteFloats(float* p, unsigned mask, __m256 a) {
  float r[8];
  std::memcpy(r, &a, 32);
  WriteMasked(p, mask, r, 8);
}

}  // namespace emulated

#define __m512 emulated::Floats
#define __m512i emulated::Ints
#define SF_EACH(T, e) emulated::Each<emulated::T>([&](int i) { return e; })
#define _mm512_load_ps(p) emulated::Aligned<emulated::Floats>(p)
#define _mm512_loadu_ps(p) emulated::Read<emulated::Floats>(p)
#define _mm512_maskz_loadu_ps(m, p) emulated::ReadMasked<emulated::Floats>(m, p)
#define _mm512_store_ps(p, a) (*reinterpret_cast<emulated::Floats*>(p) = (a))
#define _mm512_storeu_ps(p, a) emulated::WriteMasked(p, 0xffff, (a).at, 16)
#define _mm512_mask_storeu_ps(p, m, a) emulated::WriteMasked(p, m, (a).at, 16)
#define _mm512_stream_ps(p, a) _mm512_store_ps(p, a)
#define _mm512_set1_ps(a) SF_EACH(Floats, ((void)i, a))
#define _mm512_fmadd_ps(a, b, c) SF_EACH(Floats, std::fma((a).at[i], (b).at[i], (c).at[i]))
#define _mm512_add_ps(a, b) SF_EACH(Floats, (a).at[i] + (b).at[i])
#define _mm512_sub_ps(a, b) SF_EACH(Floats, (a).at[i] - (b).at[i])
#define _mm512_div_ps(a, b) SF_EACH(Floats, (a).at[i] / (b).at[i])
#define _mm512_mul_ps(a, b) SF_EACH(Floats, (a).at[i] * (b).at[i])
#define _mm512_max_ps(a, b) SF_EACH(Floats, (a).at[i] > (b).at[i] ? (a).at[i] : (b).at[i])
#define _mm512_min_ps(a, b) SF_EACH(Floats, (a).at[i] < (b).at[i] ? (a).at[i] : (b).at[i])
#define _mm512_broadcast_f32x4(a) SF_EACH(Floats, (a)[i % 4])
#define _mm512_permute_ps(a, imm) emulated::Shuffle(a, a, imm)
#define _mm512_unpacklo_ps(a, b) emulated::Unpack(a, b, 0)
#define _mm512_unpackhi_ps(a, b) emulated::Unpack(a, b, 2)
#define _mm512_shuffle_ps(a, b, imm) emulated::Shuffle(a, b, imm)
#define _mm512_shuffle_f32x4(a, b, imm) emulated::ShuffleQuads(a, b, imm)
#define _mm512_load_si512(p) emulated::Aligned<emulated::Ints>(p)
#define _mm512_loadu_si512(p) emulated::Read<emulated::Ints>(p)
#define _mm512_maskz_loadu_epi32(m, p) emulated::ReadMasked<emulated::Ints>(m, p)
#define _mm512_store_si512(p, a) (*reinterpret_cast<emulated::Ints*>(p) = (a))
#define _mm512_set1_epi32(a) SF_EACH(Ints, ((void)i, a))
#define _mm512_or_si512(a, b) SF_EACH(Ints, (a).at[i] | (b).at[i])
#define _mm512_add_epi32(a, b) SF_EACH(Ints, static_cast<int32_t>(static_cast<uint32_t>((a).at[i]) + static_cast<uint32_t>((b).at[i])))
#define _mm512_slli_epi32(a, n) SF_EACH(Ints, static_cast<int32_t>(static_cast<uint32_t>((a).at[i]) << (n)))
#define _mm512_dpbusd_epi32(s, a, b) emulated::Dot(s, a, b)
#define _mm512_unpacklo_epi32(a, b) emulated::Unpack(a, b, 0)
#define _mm512_unpackhi_epi32(a, b) emulated::Unpack(a, b, 2)
#define _mm512_unpacklo_epi64(a, b) emulated::Shuffle(a, b, 0x44)
#define _mm512_unpackhi_epi64(a, b) emulated::Shuffle(a, b, 0xee)
#define _mm512_castsi512_si128(a) emulated::Read<__m128i>(&static_cast<const emulated::Ints&>(a))
#define _mm512_extracti32x4_epi32(a, q) emulated::Read<__m128i>(&(a).at[4 * (q)])
#define _mm512_castsi128_si512(a) emulated::Insert(emulated::Ints(), a, 0)
#define _mm512_inserti32x4(a, b, q) emulated::Insert(a, b, q)
#define _mm512_and_si512(a, b) SF_EACH(Ints, (a).at[i] & (b).at[i])
#define _mm512_srli_epi32(a, n) SF_EACH(Ints, static_cast<int32_t>(static_cast<uint32_t>((a).at[i]) >> (n)))
#define _mm512_broadcast_i32x4(a) emulated::Each<emulated::Ints>([q = emulated::Read<emulated::Quad>(&static_cast<const __m128i&>(a))](int i) { return q.at[i % 4]; })
#define _mm512_shuffle_epi32(a, imm) emulated::Shuffle(a, a, imm)
#define _mm512_castsi512_ps(a) emulated::Read<emulated::Floats>(&static_cast<const emulated::Ints&>(a))
#define _mm512_castps_si512(a) emulated::Read<emulated::Ints>(&static_cast<const emulated::Floats&>(a))
#define _mm512_cvtepi32_ps(a) SF_EACH(Floats, static_cast<float>((a).at[i]))
#define _mm512_cvtps_epi32(a) SF_EACH(Ints, emulated::Round((a).at[i]))
#define _mm512_cvtepu8_epi32(a) emulated::Widen(a)
#define _mm512_cvtepi32_epi8(a) emulated::Narrow(a)
#define _mm_maskz_loadu_epi8(m, p) emulated::ReadBytes(m, p)
#define _mm_mask_storeu_epi8(p, m, a) emulated::WriteBytes(p, m, a)
#define _mm256_maskz_loadu_ps(m, p) emulated::ReadFloats(m, p)
#define _mm256_mask_storeu_ps(p, m, a) emulated::WriteFloats(p, m, a)
#define _mm256_dpbusd_epi32(s, a, b) emulated::Dot(s, a, b)
#define _mm256_dpbusd_avx_epi32(s, a, b) emulated::Dot(s, a, b)
