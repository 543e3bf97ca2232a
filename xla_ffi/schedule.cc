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
  for (int64_t phase = 0; phase < stride; ++phase) {
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
  for (int64_t phase = 0; phase < stride; ++phase) {
    for (int64_t r = 0; r < taps; ++r) {
      if (r * dilation % stride == phase) {
        ++count;
        break;
      }
    }
  }
  return count;
}

// Cycles of one core. The constants were fitted on timed layers (see README.md beside this file): an FMA per vector
// and load port, the rest what a kept weight, a visit, an accumulator, a packed vector and a panel outside L1 add.
double Cycles(const Shape& s, int64_t nnz, const Schedule& c, int64_t l1) {
  const double tiles = static_cast<double>(c.tiles());
  const double vectors = tiles * c.kernel->y * c.kernel->x;
  const double visits = static_cast<double>(s.oc * s.blocks()) * tiles;
  const double kept = static_cast<double>(nnz) * tiles;
  const double panel = static_cast<double>(std::min(s.block, s.icg) * c.slots * c.isa->lanes * 4);
  const double spill = std::max(0.0, panel - 0.85 * static_cast<double>(l1)) / static_cast<double>(l1);
  return 1.0 * static_cast<double>(nnz) * vectors * (1 + 0.15 * spill) + 1.1 * kept + 3.0 * visits +
         2.5 * static_cast<double>(s.oc * s.blocks()) * vectors + 5.0 * static_cast<double>(s.ic() * c.packed) * tiles;
}

}  // namespace

int64_t L1Bytes() {
  static const int64_t bytes = [] {
    int64_t size = 0;
#if defined(__linux__) && defined(_SC_LEVEL1_DCACHE_SIZE)
    size = sysconf(_SC_LEVEL1_DCACHE_SIZE);
#elif defined(__APPLE__)
    size_t length = sizeof size;
    sysctlbyname("hw.l1dcachesize", &size, &length, nullptr, 0);
#endif
    return size > 0 ? size : 32768;
  }();
  return bytes;
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
      c.rh = CeilDiv(s.oh, c.by);
      c.rw = CeilDiv(s.ow, c.bx);
      for (int i = 0; i < isa.kernel_count; ++i) {
        c.kernel = &isa.kernels[i];
        if (c.kernel->visit == nullptr || c.kernel->y > c.rh || c.kernel->x > c.rw) continue;
        c.ty = CeilDiv(c.rh, c.kernel->y);
        c.tx = CeilDiv(c.rw, c.kernel->x);
        const Reach rows = ReachOf(c.kernel->y, s.kh, s.sh, s.dh), columns = ReachOf(c.kernel->x, s.kw, s.sw, s.dw);
        c.pitch = columns.longest;
        c.slots = rows.sum * phases_x * c.pitch;
        c.packed = rows.sum * columns.sum;
        // The largest offset has to fit 16 bits in units of kOffsetUnit bytes.
        if (std::min(s.block, s.icg) * c.slots * isa.lanes * 4 > 65536 * kOffsetUnit) continue;
        c.cycles = Cycles(s, nnz, c, L1Bytes());
        all.push_back(c);
      }
    }
  }
  return all;
}

Schedule ChooseSchedule(const Shape& shape, int64_t nnz, const Isa& isa) {
  Schedule best;
  best.cycles = std::numeric_limits<double>::infinity();
  for (const Schedule& c : Candidates(shape, nnz, isa)) {
    if (c.cycles < best.cycles) best = c;
  }
  return best;  // kernel == nullptr if no panel fits its offsets
}

}  // namespace sparseflax
