// Which tile: counts what each candidate would do and takes the cheapest.
#include <algorithm>
#include <cmath>
#include <limits>
#if defined(__linux__)
#include <unistd.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include "sparse_conv.h"

namespace sparseflax {
namespace {

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Input rows (or columns) a tile of `tile` outputs touches in each phase of the stride: tile + the farthest tap of it.
// Returns the longest and adds up all of them.
struct Reach {
  int64_t longest = 0, sum = 0;
};
Reach ReachOf(int64_t tile, int64_t taps, int64_t stride, int64_t dilation) {
  Reach reach;
  for (int64_t phase = 0; phase < std::min(stride, (taps - 1) * dilation + 1); ++phase) {
    int64_t far = -1;
    for (int64_t r = 0; r < taps; ++r) {
      if (r * dilation % stride == phase) far = std::max(far, r * dilation / stride);
    }
    if (far < 0) continue;
    reach.longest = std::max(reach.longest, tile + far);
    reach.sum += tile + far;
  }
  return reach;
}
int64_t Phases(int64_t taps, int64_t stride, int64_t dilation) {
  int64_t count = 0;
  for (int64_t phase = 0; phase < std::min(stride, (taps - 1) * dilation + 1); ++phase) {
    for (int64_t r = 0; r < taps; ++r) {
      if (r * dilation % stride == phase) {
        ++count;
        break;
      }
    }
  }
  return count;
}

// Cycles of one core. f is the time of one FMA with a memory operand: an FMA per vector and kept weight, dearer
// when the panel leaves L1; what a kept weight and a visit cost beside their vectors; loading and storing the accumulators
// of a visit; transposing in (twice as dear when the input lies beyond L2) and out. Fitted by README.md's measurements.
double Cycles(const Shape& s, int64_t nnz, const Schedule& c) {
  const double f = c.isa->fma_cycles(), tiles = static_cast<double>(c.tiles()), kept = static_cast<double>(nnz);
  const double vectors = tiles * c.kernel->y * c.kernel->x, oc = static_cast<double>(s.oc), rows = oc * static_cast<double>(s.blocks());
  const double panel = static_cast<double>(std::min(s.block, s.icg) * c.slots * c.isa->lanes * 4);
  const double spill = std::max(0.0, panel / static_cast<double>(CacheBytes(1)) - 1.1);
  const double input = static_cast<double>(s.n * s.ih * s.iw * s.ic() * 4);
  const double pack = (3 + 3 * f) * (input > (1 << 20) ? 2 : 1);
  return kept * vectors * f * (1 + 0.18 * spill) + 0.5 * kept * tiles + rows * (4 * tiles + 1.2 * f * vectors) +
         6 * f * oc * vectors + pack * static_cast<double>(s.ic() * c.packed) * tiles;
}

}  // namespace

int64_t CacheBytes(int level) {
  static const int64_t bytes[2] = {[] {
    int64_t size = 0;
#if defined(__linux__) && defined(_SC_LEVEL1_DCACHE_SIZE)
    size = sysconf(_SC_LEVEL1_DCACHE_SIZE);
#elif defined(__APPLE__)
    size_t length = sizeof size;
    sysctlbyname("hw.l1dcachesize", &size, &length, nullptr, 0);
#endif
    return size > 0 ? size : int64_t{32} << 10;
  }(), [] {
    int64_t size = 0;
#if defined(__linux__) && defined(_SC_LEVEL3_CACHE_SIZE)
    size = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
    return size > 0 ? size : int64_t{32} << 20;
  }()};
  return bytes[level == 1 ? 0 : 1];
}

int64_t Schedule::Parts(int64_t groups, int64_t threads) const {
  const int64_t whole = groups * tiles();
  return threads == 1 || whole >= 4 * threads || whole % threads == 0 ? 1 : threads;
}

std::vector<Schedule> Candidates(const Shape& s, int64_t nnz, const Isa& isa) {
  std::vector<Schedule> all;
  const int64_t phases_x = Phases(s.kw, s.sw, s.dw);
  for (int64_t bn = 1; bn <= isa.lanes; bn *= 2) {
    if (bn > 1 && bn / 2 >= s.n) break;
    for (int64_t by = 1; by <= isa.lanes / bn; by *= 2) {
      Schedule c;
      c.isa = &isa;
      c.bn = bn;
      c.by = by;
      c.bx = isa.lanes / bn / by;
      c.lane_groups = CeilDiv(s.n, bn);
      const int64_t rows_per_lane = CeilDiv(s.oh, c.by), columns_per_lane = CeilDiv(s.ow, c.bx);
      for (int i = 0; i < isa.kernel_count; ++i) {
        c.kernel = &isa.kernels[i];
        if (c.kernel->visit == nullptr || c.kernel->y > rows_per_lane || c.kernel->x > columns_per_lane) continue;
        c.ty = CeilDiv(rows_per_lane, c.kernel->y);
        c.tx = CeilDiv(columns_per_lane, c.kernel->x);
        const Reach rows = ReachOf(c.kernel->y, s.kh, s.sh, s.dh), columns = ReachOf(c.kernel->x, s.kw, s.sw, s.dw);
        c.pitch = columns.longest;
        c.slots = rows.sum * phases_x * c.pitch;
        c.packed = rows.sum * columns.sum;
        // The largest offset has to fit 16 bits in units of kOffsetUnit bytes.
        if (std::min(s.block, s.icg) * c.slots * isa.lanes * 4 > 65536 * kOffsetUnit) continue;
        c.cycles = Cycles(s, nnz, c);
        all.push_back(c);
      }
    }
  }
  return all;
}

Schedule ChooseSchedule(const Shape& shape, int64_t nnz, const Isa* isa) {
  Schedule best;
  best.cycles = std::numeric_limits<double>::infinity();
  for (const Isa* each : Isas()) {
    if (isa != nullptr && isa != each) continue;
    for (const Schedule& c : Candidates(shape, nnz, *each)) {
      if (c.cycles < best.cycles) best = c;
    }
  }
  return best;
}

}  // namespace sparseflax
