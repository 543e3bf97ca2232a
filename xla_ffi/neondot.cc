// int8 by the dot products of NEON (ARMv8.2 on): 4 lanes, 32 registers. sdot adds four products of signed bytes to each lane.
#include "isa.h"

#if defined(__aarch64__)
#if defined(__linux__)
#include <sys/auxv.h>
#endif
#include <arm_neon.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")
#pragma GCC optimize("no-schedule-insns")  // see neon.cc
#endif

namespace sparseflax {
namespace neondot {

struct V {
  struct F {
#include "neon.inc"
  };
#include "neon_int8.inc"
  static SF_INLINE Reg Fma(Reg w, Reg x, Reg acc) {
    return vdotq_s32(acc, vreinterpretq_s8_s32(x), vreinterpretq_s8_s32(w));
  }
};

#include "microkernel.inc"
#include "int8.inc"
#include "dense_int8.inc"

bool RunsHere() {
#if defined(__linux__)
  return (getauxval(AT_HWCAP) & (1UL << 20)) != 0;  // HWCAP_ASIMDDP
#elif defined(__APPLE__)
  return true;  // every processor of a Mac has them
#else
  return false;
#endif
}
double FmaCycles() { return 0.5; }  // not measured: as float32
}  // namespace neondot

extern const Isa kNeonDot;
const Isa kNeonDot = {"neondot", 4, Element::kInt8, 128, neondot::FmaCycles, nullptr, neondot::RunsHere, neondot::PackPanel,
    neondot::StoreTile, neondot::kKernels, SF_COUNT(neondot::kKernels), nullptr,
    neondot::kWordWidth, neondot::DenseUnit};

}  // namespace sparseflax
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
