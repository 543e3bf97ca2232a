// Any machine: 4 lanes in the compiler's own vectors, multiplied and added in two roundings.
#include "isa.h"

namespace sparseflax {
namespace portable {

struct V {
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
  static SF_INLINE Reg Add(Reg a, Reg b) { return a + b; }
  static SF_INLINE Reg Max(Reg a, Reg b) {
    for (int i = 0; i < 4; ++i) b[i] = a[i] > b[i] ? a[i] : b[i];
    return b;
  }
  static SF_INLINE Reg Min(Reg a, Reg b) {
    for (int i = 0; i < 4; ++i) b[i] = a[i] < b[i] ? a[i] : b[i];
    return b;
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
#include "steps.inc"

bool RunsHere() { return true; }
double FmaCycles() { return 1; }
}  // namespace portable

extern const Isa kPortable;
const Isa kPortable = {"portable", 4, portable::FmaCycles, portable::PeakFlops, portable::RunsHere, portable::PackPanel, portable::StoreTile,
    portable::kKernels, SF_COUNT(portable::kKernels), &portable::kSteps};

}  // namespace sparseflax
