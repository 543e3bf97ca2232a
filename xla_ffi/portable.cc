// Any machine: 4 lanes in the compiler's own vectors, multiplied and added in two roundings; int8 in
// plain integers.
#include "isa.h"

namespace sparseflax {
namespace portable {

struct V {
  using Value = float;
  typedef float Reg __attribute__((vector_size(16), may_alias));
  using Quad = const float*;
  static constexpr int kLanes = 4, kRegisters = 16;
  static SF_INLINE Reg Load(const float* p) { return *reinterpret_cast<const Reg*>(p); }
  static SF_INLINE Reg LoadU(const float* p) { return LoadPart(p, 4); }
  static SF_INLINE Reg LoadPart(const float* p, int m) {
    Reg r = {};
    std::memcpy(&r, p, sizeof(float) * static_cast<size_t>(m));
    return r;
  }
  static SF_INLINE void Store(float* p, Reg a) { *reinterpret_cast<Reg*>(p) = a; }
  static SF_INLINE void StoreU(float* p, Reg a) { StorePart(p, a, 4); }
  static SF_INLINE void StorePart(float* p, Reg a, int m) { std::memcpy(p, &a, sizeof(float) * static_cast<size_t>(m)); }
  static SF_INLINE void Stream(float* p, Reg a) { StoreU(p, a); }
  static SF_INLINE void Fence() {}
  static SF_INLINE Reg Set1(float a) { return Reg{a, a, a, a}; }
  static SF_INLINE Reg Fma(Reg a, Reg b, Reg c) { return a * b + c; }
  static SF_INLINE Reg Panel(Reg a) { return a; }
  static SF_INLINE Reg Suspect(Reg a, Reg seen) { return Fma(a, Set1(0), seen); }
  static SF_INLINE Reg Add(Reg a, Reg b) { return a + b; }
  static SF_INLINE Reg Sub(Reg a, Reg b) { return a - b; }
  static SF_INLINE Reg Mul(Reg a, Reg b) { return a * b; }
  static SF_INLINE Reg Div(Reg a, Reg b) { return a / b; }
  static SF_INLINE Reg Max(Reg a, Reg b) {
    for (int i = 0; i < 4; ++i) b[i] = a[i] > b[i] ? a[i] : b[i];
    return b;
  }
  static SF_INLINE Reg Largest(Reg a, Reg b) {
    for (int i = 0; i < 4; ++i) b[i] = a[i] > b[i] || a[i] != a[i] ? a[i] : b[i];
    return b;
  }
  static SF_INLINE Reg Min(Reg a, Reg b) {
    for (int i = 0; i < 4; ++i) b[i] = a[i] < b[i] ? a[i] : b[i];
    return b;
  }
  static SF_INLINE Reg Clamp(Reg y, Reg low, Reg high) { return Min(Max(y, low), high); }  // a nan becomes low
  typedef int32_t Whole __attribute__((vector_size(16), may_alias));
  static SF_INLINE Whole SetWhole(int32_t a) { return Whole{a, a, a, a}; }
  static SF_INLINE Whole Nearest(Reg y) {  // ties to even
    Whole r = {};
    for (int i = 0; i < 4; ++i) r[i] = static_cast<int32_t>(std::nearbyint(y[i]));
    return r;
  }
  static SF_INLINE Reg Pow2(Reg t) {  // 2^n of t = n + 1.5 * 2^23, -127 < n < 128; 0 and infinity of these
    typedef uint32_t Bits __attribute__((vector_size(16), may_alias));
    Bits bits;
    std::memcpy(&bits, &t, sizeof t);
    bits = (bits << 23) + (127u << 23);
    std::memcpy(&t, &bits, sizeof t);
    return t;
  }
  static SF_INLINE Reg Rsqrt(Reg x, Reg one) {
    for (int i = 0; i < 4; ++i) x[i] = one[i] / std::sqrt(x[i]);
    return x;
  }
  static SF_INLINE Reg ToFloat(Whole a) { return __builtin_convertvector(a, Reg); }
  static SF_INLINE Reg FromBytes(const uint8_t* p, int m) {
    Reg r = {};
    for (int i = 0; i < m; ++i) r[i] = p[i];
    return r;
  }
  static SF_INLINE void StoreBytes(uint8_t* p, Reg y, Whole zero, int m) {  // nearest of y, plus zero
    const Whole q = Nearest(y) + zero;
    for (int i = 0; i < m; ++i) p[i] = static_cast<uint8_t>(q[i]);
  }
  static SF_INLINE Quad LoadQuad(const float* p) { return p; }
  template <int i>
  static SF_INLINE Reg Spread(Quad w) { return Set1(w[i]); }
  static SF_INLINE void Transpose(Reg (&r)[4]) {
    for (int i = 0; i < 4; ++i) {
      for (int j = 0; j < i; ++j) {
        const float t = r[i][j];
        r[i][j] = r[j][i];
        r[j][i] = t;
      }
    }
  }
};

#include "microkernel.inc"
#include "maps.inc"
#include "float32.inc"
#include "dense.inc"
#include "steps.inc"

bool RunsHere() { return true; }
double FmaCycles() { return 1; }
}  // namespace portable

namespace portable_int8 {

struct V {
  using F = portable::V;
  using Value = int32_t;
  typedef int32_t Reg __attribute__((vector_size(16), may_alias));
  using Quad = const Value*;
  static constexpr int kLanes = 4, kRegisters = 10;  // the others hold the factors of products
  static SF_INLINE Reg Load(const Value* p) { return *reinterpret_cast<const Reg*>(p); }
  static SF_INLINE Reg LoadU(const Value* p) { return LoadPart(p, 4); }
  static SF_INLINE Reg LoadPart(const Value* p, int m) {
    Reg r = {};
    std::memcpy(&r, p, sizeof(Value) * static_cast<size_t>(m));
    return r;
  }
  static SF_INLINE void Store(Value* p, Reg a) { *reinterpret_cast<Reg*>(p) = a; }
  static SF_INLINE Reg Set1(Value a) { return Reg{a, a, a, a}; }
  static SF_INLINE Reg Panel(Reg a) { return a; }
  static SF_INLINE Reg Suspect(Reg, Reg seen) { return seen; }
  static SF_INLINE Reg Fma(Reg w, Reg x, Reg acc) {
    return acc + (w << 24 >> 24) * (x & 255) + (w << 16 >> 24) * (x >> 8 & 255) + (w << 8 >> 24) * (x >> 16 & 255) +
           (w >> 24) * (x >> 24 & 255);
  }
  static SF_INLINE Reg Add(Reg a, Reg b) { return a + b; }
  static SF_INLINE Reg FourBytes(Reg a, Reg b, Reg c, Reg d) { return a + b * 256 + c * 65536 + (d + (d > 127) * 256) * 16777216; }  // of 0 to 255 each
  static SF_INLINE Reg Byte(Reg words, int which) { return words >> 8 * which & 255; }
  // The 16 bytes at to(l) are lane l of four words; nothing is there where that is null.
  template <typename To>
  static SF_INLINE void StoreSquare(const Reg (&w)[4], To to) {
    for (int l = 0; l < 4; ++l) {
      const int32_t words[4] = {w[0][l], w[1][l], w[2][l], w[3][l]};
      if (uint8_t* const p = to(l)) std::memcpy(p, words, 16);
    }
  }
  template <typename From>
  static SF_INLINE void LoadSquare(Reg (&w)[4], From from) {
    int32_t words[4][4] = {};
    for (int l = 0; l < 4; ++l) {
      if (const uint8_t* const p = from(l)) std::memcpy(words[l], p, 16);
    }
    for (int i = 0; i < 4; ++i) w[i] = Reg{words[0][i], words[1][i], words[2][i], words[3][i]};
  }
  static SF_INLINE Quad LoadQuad(const Value* p) { return p; }
  template <int i>
  static SF_INLINE Reg Spread(Quad w) { return Set1(w[i]); }
  static SF_INLINE void Transpose(Reg (&r)[4]) {
    for (int i = 0; i < 4; ++i) {
      for (int j = 0; j < i; ++j) {
        const Value t = r[i][j];
        r[i][j] = r[j][i];
        r[j][i] = t;
      }
    }
  }
};

#include "microkernel.inc"
#include "int8.inc"
#include "dense_int8.inc"

double FmaCycles() { return 8; }
}  // namespace portable_int8

extern const Isa kPortable;
const Isa kPortable = {"portable", 4, Element::kFloat32, 0, portable::FmaCycles, portable::PeakFlops, portable::RunsHere, portable::PackPanel, portable::StoreTile,
    portable::kKernels, SF_COUNT(portable::kKernels), &portable::kSteps};
extern const Isa kPortableInt8;
const Isa kPortableInt8 = {"portable", 4, Element::kInt8, 0, portable_int8::FmaCycles, nullptr, portable::RunsHere,
    portable_int8::PackPanel, portable_int8::StoreTile, portable_int8::kKernels, SF_COUNT(portable_int8::kKernels), nullptr,
    portable_int8::kWordWidth, portable_int8::DenseUnit};

}  // namespace sparseflax
