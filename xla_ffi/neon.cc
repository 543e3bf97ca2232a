// NEON on aarch64: 4 lanes, 32 registers.
#include "isa.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#if !defined(__clang__)
#pragma GCC optimize("no-schedule-insns")  // it hoists the panel's loads over the FMAs and spills accumulators for them
#endif

namespace sparseflax {
namespace neon {

struct V {
  using Reg = float32x4_t;
  using Quad = float32x4_t;
  static constexpr int kLanes = 4, kRegisters = 32;
  static SF_INLINE Reg Load(const float* p) { return vld1q_f32(p); }
  static SF_INLINE Reg LoadU(const float* p) { return vld1q_f32(p); }
  static SF_INLINE Reg LoadPart(const float* p, int m) {
    float t[4] = {};
    for (int i = 0; i < m; ++i) t[i] = p[i];
    return vld1q_f32(t);
  }
  static SF_INLINE void Store(float* p, Reg a) { vst1q_f32(p, a); }
  static SF_INLINE void StoreU(float* p, Reg a) { vst1q_f32(p, a); }
  static SF_INLINE void StorePart(float* p, Reg a, int m) {
    float t[4];
    vst1q_f32(t, a);
    for (int i = 0; i < m; ++i) p[i] = t[i];
  }
  static SF_INLINE void Stream(float* p, Reg a) { StoreU(p, a); }
  static SF_INLINE void Fence() {}
  static SF_INLINE Reg Set1(float a) { return vdupq_n_f32(a); }
  static SF_INLINE Reg Fma(Reg a, Reg b, Reg c) { return vfmaq_f32(c, a, b); }
  static SF_INLINE Reg Add(Reg a, Reg b) { return vaddq_f32(a, b); }
  static SF_INLINE Reg Max(Reg a, Reg b) { return vmaxq_f32(a, b); }  // propagates nan
  static SF_INLINE Reg Min(Reg a, Reg b) { return vminq_f32(a, b); }
  static SF_INLINE Quad LoadQuad(const float* p) { return vld1q_f32(p); }
  template <int i>
  static SF_INLINE Reg Spread(Quad w) { return vdupq_laneq_f32(w, i); }  // folded into the by-element FMA
  static SF_INLINE void Transpose(Reg (&r)[4]) {
    const Reg a = vtrn1q_f32(r[0], r[1]), b = vtrn2q_f32(r[0], r[1]), c = vtrn1q_f32(r[2], r[3]), d = vtrn2q_f32(r[2], r[3]);
    r[0] = vcombine_f32(vget_low_f32(a), vget_low_f32(c));
    r[1] = vcombine_f32(vget_low_f32(b), vget_low_f32(d));
    r[2] = vcombine_f32(vget_high_f32(a), vget_high_f32(c));
    r[3] = vcombine_f32(vget_high_f32(b), vget_high_f32(d));
  }
};

#include "microkernel.inc"
#include "steps.inc"

bool RunsHere() { return true; }
double FmaCycles() { return 0.5; }
}  // namespace neon

extern const Isa kNeon;
const Isa kNeon = {"neon", 4, neon::FmaCycles, neon::PeakFlops, neon::RunsHere, neon::PackPanel, neon::StoreTile,
    neon::kKernels, SF_COUNT(neon::kKernels), &neon::kSteps};

}  // namespace sparseflax
#endif
