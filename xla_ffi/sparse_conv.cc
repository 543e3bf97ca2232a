// Decodes and checks the pattern, expands it for a tile, and runs the tiles.
#include "sparse_conv.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <new>
#include <utility>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sparseflax {

#if defined(__x86_64__)
extern const Isa kAvx512, kAvx512vl, kAvx2;
#elif defined(__aarch64__)
extern const Isa kNeon;
#endif
extern const Isa kPortable;

const std::vector<const Isa*>& Isas() {
  static const std::vector<const Isa*> isas = [] {
    std::vector<const Isa*> found;
#if defined(__x86_64__)
    for (const Isa* isa : {&kAvx512, &kAvx512vl, &kAvx2, &kPortable}) {
#elif defined(__aarch64__)
    for (const Isa* isa : {&kNeon, &kPortable}) {
#else
    for (const Isa* isa : {&kPortable}) {
#endif
      if (isa->runs_here()) found.push_back(isa);
    }
    return found;
  }();
  return isas;
}

namespace {

constexpr uint8_t kSkip = 255;                  // the gap byte that keeps nothing

// Per thread, grows, 64-byte aligned; large blocks ask for huge pages, since a panel walked by 4 KB pages misses the TLB.
struct Arena {
  char* data = nullptr;
  size_t size = 0;
  char* Get(size_t bytes) {
    if (bytes > size) {
      std::free(data);
      const size_t page = bytes >= (1u << 20) ? (2u << 20) : 4096;
      size = (bytes + page - 1) / page * page;
      data = static_cast<char*>(std::aligned_alloc(page, size));
      if (data == nullptr) {
        size = 0;
        throw std::bad_alloc();
      }
#if defined(__linux__) && defined(MADV_HUGEPAGE)
      if (page > 4096) madvise(data, size, MADV_HUGEPAGE);
#endif
    }
    return data;
  }
  ~Arena() { std::free(data); }
};

size_t Align(size_t bytes) { return (bytes + 63) / 64 * 64; }

// Calls keep(group, block, channel, tap) for each kept weight in stored order. False if the code points outside.
template <typename F>
bool Decode(const Shape& s, const uint8_t* gaps, int64_t size, F keep) {
  const int64_t taps = s.taps(), ocg = s.ocg(), blocks = s.blocks();
  const int64_t end = s.groups * blocks * ocg * taps;
  int64_t position = 0;
  for (int64_t i = 0; i < size; ++i) {
    position += gaps[i];
    if (gaps[i] == kSkip) continue;
    if (position >= end) return false;
    const int64_t tap = position % taps, row = position / taps;
    const int64_t k = row % ocg, b = row / ocg % blocks, g = row / ocg / blocks;
    if (b * s.block + tap / (s.kh * s.kw) >= s.icg) return false;
    keep(g, b, k, tap);
    ++position;
  }
  return true;
}

}  // namespace

// One unit of work: output channels [k0, k1) of a group, for one tile of the images of a lane group.
struct Place {
  int64_t g, lane_group, tile, k0, k1;
};

// Everything that depends on the image size, the batch or the tile, computed once.
struct Plan {
  Shape shape;            // image sizes filled in; 1x1 convolutions flattened to one long row
  int64_t n, ih, iw;      // as called: the key
  Schedule schedule;
  bool forced = false;
  std::vector<uint16_t> offsets;    // (nnz), padded
  std::vector<uint32_t> starts;     // (groups * blocks, ocg + 1): ranges of `offsets`
  std::vector<uint32_t> weight;     // (groups, ocg + 1): kept weights of the output channels before k
  std::vector<uint16_t> tap_offset; // (taps)
  std::vector<int32_t> slots;       // (packed)
  std::vector<int32_t> input;       // (ty * tx, packed, lanes)
  std::vector<int32_t> output;      // (ty * tx, y * x, lanes)
  void Run(const Buffers& b, int activation, Executor& executor) const;
  Place PlaceOf(int64_t unit, const Sharing& sharing) const;
  void Rows(const Buffers& b, const Place& at, const float* rows[kMaxLanes]) const;
  void Unit(const Buffers& b, int activation, const Place& at, const Place& next) const;
  void VisitPruned(Visit visit, int64_t channels_here) const;
  int64_t Split(int64_t g, int64_t part, int64_t parts) const;
};

std::string Shape::Check() const {
  const int64_t all[] = {kh, kw, icg, oc, groups, block, sh, sw, dh, dw};
  for (int64_t v : all) {
    if (v < 1 || v > (int64_t{1} << 31)) return "a size of the convolution is not positive or too large";
  }
  if (oc % groups != 0) return "groups do not divide the output channels";
  if (block > icg) return "the channel block is larger than the channels of a group";
  if (std::min({top, bottom, left, right}) < 0) return "padding is negative";
  if (kh > 65535 || kw > 65535 || taps() > 65536 * int64_t{16}) return "the kernel window is too large";
  constexpr int64_t kMostWeights = int64_t{1} << 40;  // as packing.py: no product of these sizes comes near an overflow
  if (oc > kMostWeights / (kh * kw) || icg > kMostWeights / (kh * kw * oc)) return "the kernel is too large";
  return "";
}

Shape Shape::Flat() const {
  const int64_t row = n * ih * iw;
  if (kh != 1 || kw != 1 || sh != 1 || sw != 1 || ih != oh || iw != ow || top != 0 || left != 0 ||
      row * std::max(ic(), oc) > std::numeric_limits<int32_t>::max()) {
    return *this;
  }
  Shape flat = *this;
  flat.n = flat.ih = flat.oh = 1;
  flat.iw = flat.ow = row;
  return flat;
}

std::unique_ptr<Conv> Conv::Make(const Shape& shape, const uint8_t* gaps, int64_t size, const Isa* isa, std::string* error) {
  *error = shape.Check();
  if (!error->empty()) return nullptr;
  std::unique_ptr<Conv> conv(new Conv);
  conv->shape_ = shape;
  conv->isa_ = isa;
  conv->gaps_.assign(gaps, gaps + size);
  int64_t nnz = 0;
  if (!Decode(shape, gaps, size, [&](int64_t, int64_t, int64_t, int64_t) { ++nnz; })) {
    *error = "the packed pattern points outside its kernel: it is damaged or was edited; pack the dense kernel again";
    return nullptr;
  }
  if (nnz >= std::numeric_limits<uint32_t>::max()) {
    *error = "more than 2^32 kept weights";
    return nullptr;
  }
  conv->nnz_ = nnz;
  return conv;
}

Conv::~Conv() = default;

namespace {

// Where output positions and panel slots of tile (ty, tx) lie in the arrays, for each lane; -1 outside.
void FillTables(Plan& p) {
  const Shape& s = p.shape;
  const Schedule& c = p.schedule;
  const int64_t lanes = c.isa->lanes, ky = c.kernel->y, kx = c.kernel->x;
  struct Plane { int64_t phase, longest; };
  auto planes = [](int64_t tile, int64_t taps, int64_t stride, int64_t dilation) {
    std::vector<Plane> found;
    for (int64_t phase = 0; phase < std::min(stride, (taps - 1) * dilation + 1); ++phase) {
      int64_t far = -1;
      for (int64_t r = 0; r < taps; ++r) {
        if (r * dilation % stride == phase) far = std::max(far, r * dilation / stride);
      }
      if (far >= 0) found.push_back({phase, tile + far});
    }
    return found;
  };
  const std::vector<Plane> rows = planes(ky, s.kh, s.sh, s.dh), columns = planes(kx, s.kw, s.sw, s.dw);
  // Planes lie one after the other, each `longest` rows of `pitch` vectors.
  std::map<std::pair<int64_t, int64_t>, int64_t> base;  // by the phases of rows and columns
  int64_t next = 0;
  for (const Plane& r : rows) {
    for (const Plane& q : columns) {
      base[{r.phase, q.phase}] = next;
      next += r.longest * c.pitch;
    }
  }
  const int64_t unit = lanes * 4 / kOffsetUnit;
  p.tap_offset.resize(static_cast<size_t>(s.taps()));
  for (int64_t t = 0; t < s.taps(); ++t) {
    const int64_t ch = t / (s.kh * s.kw), r = t / s.kw % s.kh * s.dh, q = t % s.kw * s.dw;
    const int64_t slot = base[{r % s.sh, q % s.sw}] + r / s.sh * c.pitch + q / s.sw;
    p.tap_offset[static_cast<size_t>(t)] = static_cast<uint16_t>((ch * c.slots + slot) * unit);
  }
  for (int64_t ty = 0; ty < c.ty; ++ty) {
    for (int64_t tx = 0; tx < c.tx; ++tx) {
      for (const Plane& r : rows) {
        for (const Plane& q : columns) {
          for (int64_t i = 0; i < r.longest; ++i) {
            for (int64_t j = 0; j < q.longest; ++j) {
              if (ty == 0 && tx == 0) {
                p.slots.push_back(static_cast<int32_t>(base[{r.phase, q.phase}] + i * c.pitch + j));
              }
              for (int64_t l = 0; l < lanes; ++l) {
                const int64_t column = (tx * c.bx + l % c.bx) * kx + j;
                const int64_t y = ((ty * c.by + l / c.bx % c.by) * ky + i + column / c.wrap) * s.sh + r.phase - s.top;
                const int64_t x = column % c.wrap * s.sw + q.phase - s.left;
                const bool inside = y >= 0 && y < s.ih && x >= 0 && x < s.iw;
                p.input.push_back(inside ? static_cast<int32_t>((y * s.iw + x) * s.ic()) : -1);
              }
            }
          }
        }
      }
      for (int64_t i = 0; i < ky; ++i) {
        for (int64_t j = 0; j < kx; ++j) {
          for (int64_t l = 0; l < lanes; ++l) {
            const int64_t column = (tx * c.bx + l % c.bx) * kx + j;
            const int64_t y = (ty * c.by + l / c.bx % c.by) * ky + i + column / c.wrap, x = column % c.wrap;
            p.output.push_back(y < s.oh && x < s.ow ? static_cast<int32_t>((y * s.ow + x) * s.oc) : -1);
          }
        }
      }
    }
  }
}

}  // namespace

std::shared_ptr<const Plan> Conv::GetPlan(const Shape& shape, const Schedule* forced) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& plan : plans_) {
    if (plan->n == shape.n && plan->ih == shape.ih && plan->iw == shape.iw && !plan->forced && forced == nullptr) return plan;
  }
  auto plan = std::make_shared<Plan>();
  plan->n = shape.n;
  plan->ih = shape.ih;
  plan->iw = shape.iw;
  plan->shape = shape.Flat();
  const Shape& s = plan->shape;
  plan->forced = forced != nullptr;
  plan->schedule = forced != nullptr ? *forced : ChooseSchedule(s, nnz_, isa_);
  if (plan->schedule.kernel == nullptr) return nullptr;
  FillTables(*plan);
  const size_t rows = static_cast<size_t>(s.groups * s.blocks()), ocg = static_cast<size_t>(s.ocg());
  plan->starts.assign(rows * (ocg + 1), 0);
  plan->offsets.reserve(static_cast<size_t>(nnz_) + kListPadding);
  plan->weight.assign(static_cast<size_t>(s.groups) * (ocg + 1), 0);
  Decode(s, gaps_.data(), static_cast<int64_t>(gaps_.size()), [&](int64_t g, int64_t b, int64_t k, int64_t tap) {
    plan->offsets.push_back(plan->tap_offset[static_cast<size_t>(tap)]);
    ++plan->starts[static_cast<size_t>(g * s.blocks() + b) * (ocg + 1) + static_cast<size_t>(k) + 1];
    ++plan->weight[static_cast<size_t>(g) * (ocg + 1) + static_cast<size_t>(k) + 1];
  });
  plan->offsets.resize(static_cast<size_t>(nnz_) + kListPadding, 0);
  uint32_t before = 0;
  for (size_t row = 0; row < rows; ++row) {
    uint32_t* starts = &plan->starts[row * (ocg + 1)];
    starts[0] = before;
    for (size_t k = 0; k < ocg; ++k) starts[k + 1] += starts[k];
    before = starts[ocg];
  }
  for (size_t g = 0; g < static_cast<size_t>(s.groups); ++g) {
    uint32_t* weight = &plan->weight[g * (ocg + 1)];
    for (size_t k = 0; k < ocg; ++k) weight[k + 1] += weight[k];
  }
  if (!plan->forced) plans_.push_back(plan);
  return plan;
}

// The first output channel of a part, so that parts keep about the same number of weights.
int64_t Plan::Split(int64_t g, int64_t part, int64_t parts) const {
  const int64_t ocg = shape.ocg();
  if (part <= 0) return 0;
  if (part >= parts) return ocg;
  const uint32_t* first = &weight[static_cast<size_t>(g * (ocg + 1))];
  // A channel costs a visit per block even when nothing of it is kept: count it as one weight per block.
  const int64_t total = first[ocg] + ocg * shape.blocks();
  int64_t k = 0;
  while (k < ocg && (first[k] + k * shape.blocks()) * parts < part * total) ++k;
  return ocg >= 2 * parts * schedule.isa->lanes ? k / schedule.isa->lanes * schedule.isa->lanes : k;  // whole vectors to store
}

Place Plan::PlaceOf(int64_t unit, const Sharing& sharing) const {
  const int64_t split = std::max<int64_t>(0, unit - sharing.whole), parts = unit < sharing.whole ? 1 : sharing.parts;
  const int64_t all = std::min(unit, sharing.whole) + split / parts, part = split % parts, spatial = schedule.ty * schedule.tx;
  const int64_t g = all / spatial / schedule.lane_groups;
  return {g, all / spatial % schedule.lane_groups, all % spatial, Split(g, part, parts), Split(g, part + 1, parts)};
}

// Where the input channels of a group begin for each lane; a lane without an image takes the last one.
void Plan::Rows(const Buffers& b, const Place& at, const float* rows[kMaxLanes]) const {
  const Shape& s = shape;
  for (int64_t l = 0; l < schedule.isa->lanes; ++l) {
    const int64_t image = std::min(at.lane_group * schedule.bn + l / (schedule.by * schedule.bx), s.n - 1);
    rows[l] = b.x + image * s.ih * s.iw * s.ic() + at.g * s.icg;
  }
}

void Plan::Unit(const Buffers& b, int activation, const Place& at, const Place& next) const {
  const int64_t k0 = at.k0, channels = at.k1 - at.k0;
  if (channels <= 0) return;
  const Shape& s = shape;
  const Schedule& c = schedule;
  const int64_t lanes = c.isa->lanes, accumulators = c.kernel->y * c.kernel->x;
  const size_t panel_bytes = Align(static_cast<size_t>(std::min(s.block, s.icg) * c.slots * lanes * 4));
  const size_t acc_bytes = Align(static_cast<size_t>(channels * accumulators * lanes * 4));
  thread_local Arena arena;
  char* const panel = arena.Get(panel_bytes + acc_bytes);
  float* const acc = reinterpret_cast<float*>(panel + panel_bytes);

  const float* rows[kMaxLanes];
  const float* rows_ahead[kMaxLanes];
  const float* residual[kMaxLanes];
  float* out[kMaxLanes];
  Rows(b, at, rows);
  for (int64_t l = 0; l < lanes; ++l) {
    const int64_t image = at.lane_group * c.bn + l / (c.by * c.bx);
    const int64_t offset = std::min(image, s.n - 1) * s.oh * s.ow * s.oc + at.g * s.ocg() + k0;
    out[l] = image < s.n ? b.y + offset : nullptr;
    residual[l] = b.residual != nullptr ? b.residual + offset : nullptr;
  }
  const int64_t packed = c.packed * lanes;
  const int32_t* const table = &input[static_cast<size_t>(at.tile * packed)];
  // An input that fits L2 is there already.
  const bool fetch = s.n * s.ih * s.iw * s.ic() * 4 > CacheBytes(2);
  for (int64_t block = 0; block < s.blocks(); ++block) {
    const int64_t here = std::min(s.block, s.icg - block * s.block);
    const bool finite = !c.isa->pack({rows, table, slots.data(), c.packed, here, c.slots * lanes * 4, panel});
    for (int64_t l = 0; l < lanes; ++l) rows[l] += here;
    Ahead ahead = {rows, table, 0, 0};
    if (fetch && block + 1 < s.blocks()) {
      ahead = {rows, table, c.packed, (std::min(s.block, s.icg - (block + 1) * s.block) + 15) / 16};
    } else if (fetch && next.tile >= 0) {
      Rows(b, next, rows_ahead);
      ahead = {rows_ahead, &input[static_cast<size_t>(next.tile * packed)], c.packed, (std::min(s.block, s.icg) + 15) / 16};
    }
    const uint32_t* first = &starts[static_cast<size_t>((at.g * s.blocks() + block) * (s.ocg() + 1) + k0)];
    Visit visit = {offsets.data(), b.values, first, channels, panel, c.pitch * lanes * 4, acc,
                   block == 0 ? b.bias + at.g * s.ocg() + k0 : nullptr, ahead};
    c.kernel->visit(visit);
    if (!finite) VisitPruned(visit, here);
  }
  // Streaming pays when the output would not stay in the last cache anyway.
  const bool stream = s.n * s.oh * s.ow * s.oc * 4 > CacheBytes(3) / 2 && s.oc % lanes == 0 && s.ocg() % lanes == 0 &&
                      k0 % lanes == 0 && channels % lanes == 0 && reinterpret_cast<uintptr_t>(b.y) % 64 == 0;
  c.isa->store({acc, accumulators, channels, &output[static_cast<size_t>(at.tile * accumulators * lanes)], out,
                b.residual != nullptr ? residual : nullptr, activation, stream});
}

// 0 * inf and 0 * nan are nan: visits what was pruned, with weights of zero. Rare, so the lists are made here.
void Plan::VisitPruned(Visit visit, int64_t channels_here) const {
  std::vector<uint16_t> pruned;
  std::vector<uint32_t> ends = {0};
  std::vector<bool> kept(65536);
  for (int64_t k = 0; k < visit.channels; ++k) {
    for (uint32_t m = visit.starts[k]; m < visit.starts[k + 1]; ++m) kept[offsets[m]] = true;
    for (int64_t t = 0; t < channels_here * shape.kh * shape.kw; ++t) {
      const uint16_t offset = tap_offset[static_cast<size_t>(t)];
      if (!kept[offset]) pruned.push_back(offset);
    }
    for (uint32_t m = visit.starts[k]; m < visit.starts[k + 1]; ++m) kept[offsets[m]] = false;
    ends.push_back(static_cast<uint32_t>(pruned.size()));
  }
  const std::vector<float> zeros(pruned.size() + 1);
  pruned.resize(pruned.size() + kListPadding);
  visit.offsets = pruned.data();
  visit.values = zeros.data();
  visit.starts = ends.data();
  visit.bias = nullptr;
  visit.ahead.count = 0;
  schedule.kernel->visit(visit);
}

void Plan::Run(const Buffers& b, int activation, Executor& executor) const {
  const Schedule& c = schedule;
  const Sharing sharing = c.Share(shape.groups, executor.threads());
  const int64_t units = sharing.whole + (shape.groups * c.tiles() - sharing.whole) * sharing.parts;
  const auto unit = [&](int64_t i) {
    const int64_t next = i + sharing.threads;  // most likely this thread's
    Unit(b, activation, PlaceOf(i, sharing), next < units ? PlaceOf(next, sharing) : Place{0, 0, -1, 0, 0});
  };
  if (sharing.threads == 1) {
    for (int64_t i = 0; i < units; ++i) unit(i);
  } else {
    executor.For(units, unit);
  }
}

std::string Conv::Run(int64_t n, int64_t ih, int64_t iw, int64_t oh, int64_t ow, const Buffers& buffers, int activation,
                      Executor& executor, const Schedule* forced) {
  Shape s = shape_;
  s.n = n;
  s.ih = ih;
  s.iw = iw;
  s.oh = oh;
  s.ow = ow;
  if (std::min({n, ih, iw, oh, ow}) < 1) return "an image dimension is empty";
  const int64_t reach_h = (s.kh - 1) * s.dh + 1, reach_w = (s.kw - 1) * s.dw + 1;
  if (ih + s.top + s.bottom < reach_h || (ih + s.top + s.bottom - reach_h) / s.sh + 1 != oh ||
      iw + s.left + s.right < reach_w || (iw + s.left + s.right - reach_w) / s.sw + 1 != ow) {
    return "the output's height and width do not follow from the input's and the window";
  }
  if (std::max(ih * iw * s.ic(), oh * ow * s.oc) > std::numeric_limits<int32_t>::max()) return "an image holds more than 2^31 floats";
  const std::shared_ptr<const Plan> plan = GetPlan(s, forced);
  if (plan == nullptr) return "the kernel window is too large for a panel";
  plan->Run(buffers, activation, executor);
  return "";
}

}  // namespace sparseflax
