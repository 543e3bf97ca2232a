// Which tile: counts what each candidate would do and takes the cheapest.
#include <algorithm>
#include <array>
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

constexpr double kInlineCycles = 60'000;  // below this a second thread costs more than it brings

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

// How many times more lanes than sets of L1 they lie in, when lanes are `image`, `row` and `column` bytes apart: at powers of two
// their lines drive each other out. A set recurs after 4 KB on every x86 (32 KB in 8 ways, 48 KB in 12).
double Conflicts(const Schedule& c, int64_t image, int64_t row, int64_t column) {
  bool taken[64] = {};
  int64_t sets = 0;
  for (int64_t l = 0; l < c.isa->lanes; ++l) {
    const int64_t at = l / (c.by * c.bx) * image + l / c.bx % c.by * row + l % c.bx * column;
    bool& set = taken[at / 64 % 64];
    sets += !set;
    set = true;
  }
  return static_cast<double>(c.isa->lanes) / static_cast<double>(sets) - 1;
}

// Cycles of one core, and the share of packing in them. f is the time of one FMA with a memory operand: an FMA per vector and
// kept weight, dearer when the panel leaves L1; what a kept weight, each further row of its tile and a visit cost beside their
// vectors; loading and storing the accumulators of a visit; transposing in and out, dearer beyond L2 and where lanes meet in one
// set. Fitted to 1400 timed candidates of 17 layers, n = 1 to 16, on a Zen 3 core: a median error of 7 %, and choices 1.6 %
// slower than the best. On a Zen 4 core, whose 512-bit vectors take twice as long to load and store, 10 layers of densities 0.1 to 1 are
// 4.6 % slower than the best of 14 candidates for each instruction set, in eight bits 10.4 %, much of it between candidates that count alike.
void Cost(const Shape& s, int64_t nnz, const Cpu& cpu, Schedule& c) {
  const double f = c.fma, tiles = static_cast<double>(c.tiles()), kept = static_cast<double>(nnz);
  const double vectors = tiles * c.kernel->y * c.kernel->x, oc = static_cast<double>(s.oc), rows = oc * static_cast<double>(s.blocks());
  const double panel = static_cast<double>(std::min(s.block, s.icg) * c.slots * c.isa->lanes * 4);
  const double fits = c.isa->lanes == 16 ? 0.8 : 1;  // vectors of a whole line wait for each that weights and accumulators drove out
  const double spill = std::max(0.0, panel / static_cast<double>(cpu.l1) - fits);
  const bool far_in = s.n * s.ih * s.iw * s.ic() * 4 > cpu.l2, far_out = s.n * s.oh * s.ow * s.oc * 4 > cpu.l2;
  const int64_t pixel = s.ic() * 4, to = s.oc * 4, y = c.kernel->y, x = c.kernel->x;
  const double pack = (2 + 2.4 * f + 1.4 * far_in + 0.14 * Conflicts(c, s.ih * s.iw * pixel, y * s.sh * s.iw * pixel, x * s.sw * pixel)) *
                      static_cast<double>(s.ic() * c.packed) * tiles;
  const double store = 3 * far_out + 0.4 * Conflicts(c, s.oh * s.ow * to, y * s.ow * to, x * to);
  c.cycles = kept * vectors * f * (1 + 0.7 * spill) + kept * tiles * (1.2 + 0.05 * static_cast<double>(y - 1)) +
             rows * (6 * tiles + 2.6 * f * vectors) + store * oc * vectors + pack;
  c.packing = pack / c.cycles;
}

// Every register tile for lanes that own so many rows and columns.
void AddTiles(const Shape& s, int64_t nnz, const Cpu& cpu, int64_t rows_per_lane, int64_t columns_per_lane, Schedule c,
              std::vector<Schedule>* all) {
  const int64_t phases_x = Phases(s.kw, s.sw, s.dw);
  for (int i = 0; i < c.isa->kernel_count; ++i) {
    c.kernel = &c.isa->kernels[i];
    if (c.kernel->visit == nullptr || c.kernel->y > rows_per_lane || c.kernel->x > columns_per_lane) continue;
    c.ty = CeilDiv(rows_per_lane, c.kernel->y);
    c.tx = CeilDiv(columns_per_lane, c.kernel->x);
    const Reach rows = ReachOf(c.kernel->y, s.kh, s.sh, s.dh), columns = ReachOf(c.kernel->x, s.kw, s.sw, s.dw);
    c.pitch = columns.longest;
    c.slots = rows.sum * phases_x * c.pitch;
    c.packed = rows.sum * columns.sum;
    // The largest offset has to fit 16 bits in units of kOffsetUnit bytes.
    if (std::min(s.block, s.icg) * c.slots * c.isa->lanes * 4 > 65536 * kOffsetUnit) continue;
    Cost(s, nnz, cpu, c);
    all->push_back(c);
  }
}

}  // namespace

int64_t CacheBytes(int level) {
  static const std::array<int64_t, 3> bytes = [] {
    std::array<int64_t, 3> size = {};
#if defined(__linux__) && defined(_SC_LEVEL1_DCACHE_SIZE)
    size = {sysconf(_SC_LEVEL1_DCACHE_SIZE), sysconf(_SC_LEVEL2_CACHE_SIZE), sysconf(_SC_LEVEL3_CACHE_SIZE)};
#elif defined(__APPLE__)
    const char* const names[] = {"hw.l1dcachesize", "hw.l2cachesize", "hw.l3cachesize"};
    for (size_t i = 0; i < 3; ++i) {
      size_t length = sizeof size[i];
      if (sysctlbyname(names[i], &size[i], &length, nullptr, 0) != 0) size[i] = 0;
    }
#endif
    const std::array<int64_t, 3> usual = {int64_t{32} << 10, int64_t{1} << 20, int64_t{32} << 20};
    for (size_t i = 0; i < 3; ++i) {
      if (size[i] <= 0) size[i] = usual[i];
    }
    return size;
  }();
  return bytes[static_cast<size_t>(level - 1)];
}

Sharing Schedule::Share(int64_t groups, int64_t available) const {
  const int64_t threads = cycles < kInlineCycles ? 1 : available, all = groups * tiles(), rest = all % threads;
  const double each = static_cast<double>(all / threads);
  Sharing best = {threads, all, 1, each, each};
  double least = std::numeric_limits<double>::infinity();
  for (int64_t parts = 1; rest > 0 && parts <= threads; ++parts) {
    const double panels = static_cast<double>(CeilDiv(rest * parts, threads)), work = panels / static_cast<double>(parts);
    const double time = packing * panels + (1 - packing) * work;
    if (time < least) {
      least = time;
      best = {threads, all - rest, parts, each + work, each + panels};
    }
  }
  return best;
}

std::vector<Schedule> Candidates(const Shape& s, int64_t nnz, const Isa& isa, const Cpu& cpu) {
  std::vector<Schedule> all;
  for (int64_t bn = 1; bn <= isa.lanes; bn *= 2) {
    if (bn > 1 && bn / 2 >= s.n) break;
    for (int64_t by = 1; by <= isa.lanes / bn; by *= 2) {
      Schedule c;
      c.isa = &isa;
      c.fma = cpu.fma_cycles > 0 ? cpu.fma_cycles : isa.fma_cycles();
      c.bn = bn;
      c.by = by;
      c.bx = isa.lanes / bn / by;
      c.lane_groups = CeilDiv(s.n, bn);
      AddTiles(s, nnz, cpu, CeilDiv(s.oh, c.by), CeilDiv(s.ow, c.bx), c, &all);
      if (c.by > 1 || s.oh == 1 || s.sh > 1 || s.sw > 1) continue;
      // The image as one row: beyond its end a row's taps meet padding, and so do those of the next row before its beginning.
      c.wrap = std::max(s.iw + std::max(s.left, s.right), s.ow);
      AddTiles(s, nnz, cpu, 1, CeilDiv((s.oh - 1) * c.wrap + s.ow, c.bx), c, &all);
    }
  }
  return all;
}

Schedule ChooseSchedule(const Shape& shape, int64_t nnz, const std::vector<const Isa*>& isas, Cpu cpu) {
  Schedule best;
  best.cycles = std::numeric_limits<double>::infinity();
  for (const Isa* each : isas) {
    for (const Schedule& c : Candidates(shape, nnz, *each, cpu)) {
      if (c.cycles < best.cycles) best = c;
    }
    cpu.fma_cycles = 0;  // that of the first
  }
  return best;
}

}  // namespace sparseflax
