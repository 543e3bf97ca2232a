// NEON on aarch64: 4 lanes, 32 registers; float32, and int8 without dot products.
#include "isa.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#if !defined(__clang__)
#pragma GCC optimize("no-schedule-insns")  // it hoists the panel's loads over the FMAs and spills accumulators for them
#endif

namespace sparseflax {
namespace neon {

struct V {
#include "neon.inc"
};

#include "microkernel.inc"
#include "maps.inc"
#include "float32.inc"
#include "dense.inc"
#include "steps.inc"

bool RunsHere() { return true; }
double FmaCycles() { return 0.5; }
}  // namespace neon

namespace neon_int8 {

// The panel holds x - 128: sums of two products of signed bytes, 2 * 128 * 127 = 32512, fit 16 bits.
struct V {
  using F = neon::V;
#include "neon_int8.inc"
  static SF_INLINE Reg Fma(Reg w, Reg x, Reg acc) {
    const int8x16_t a = vreinterpretq_s8_s32(x), b = vreinterpretq_s8_s32(w);
    return vpadalq_s16(acc, vpaddq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)), vmull_high_s8(a, b)));
  }
};

#include "microkernel.inc"
#include "int8.inc"
#include "dense_int8.inc"

double FmaCycles() { return 2; }  // not measured: four instructions
}  // namespace neon_int8

extern const Isa kNeon;
const Isa kNeon = {"neon", 4, Element::kFloat32, 0, neon::FmaCycles, neon::PeakFlops, neon::RunsHere, neon::PackPanel, neon::StoreTile,
    neon::kKernels, SF_COUNT(neon::kKernels), &neon::kSteps};
extern const Isa kNeonInt8;
const Isa kNeonInt8 = {"neon", 4, Element::kInt8, 128, neon_int8::FmaCycles, nullptr, neon::RunsHere, neon_int8::PackPanel,
    neon_int8::StoreTile, neon_int8::kKernels, SF_COUNT(neon_int8::kKernels), nullptr,
    neon_int8::kWordWidth, neon_int8::DenseUnit};

}  // namespace sparseflax
#endif
