// Runs a plan: packs panels, visits them, stores tiles.
#include <algorithm>
#include <iterator>
#include <optional>

#include "arena.h"
#include "plan.h"
#include "rescale.h"

namespace sparseflax {
namespace {

size_t Align(size_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

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
void Plan::Rows(const Buffers& b, const Place& at, const Word* rows[kMaxLanes]) const {
  const Shape& s = shape;
  for (int64_t l = 0; l < schedule.isa->lanes; ++l) {
    const int64_t image = std::min(at.lane_group * schedule.bn + l / (schedule.by * schedule.bx), s.n - 1);
    rows[l] = static_cast<const Word*>(b.x) + image * s.ih * s.iw * s.x_pixel + at.g * s.icg;
  }
}

void Plan::Unit(const Buffers& b, const Rescale* rescaled, int activation, const Place& at, const Place& next) const {
  const int64_t k0 = at.k0, channels = at.k1 - at.k0;
  if (channels <= 0) return;
  const Shape& s = shape;
  const Schedule& c = schedule;
  const int64_t lanes = c.isa->lanes, accumulators = c.kernel->y * c.kernel->x;
  const size_t panel_bytes = Align(static_cast<size_t>(std::min(s.block, s.icg) * c.slots * lanes * 4));
  const size_t acc_bytes = Align(static_cast<size_t>(channels * accumulators * lanes * 4));
  thread_local Arena arena;  // the panel and the accumulators
  char* const panel = arena.Get(panel_bytes + acc_bytes);
  Word* const acc = reinterpret_cast<Word*>(panel + panel_bytes);

  const Word* rows[kMaxLanes];
  const Word* rows_ahead[kMaxLanes];
  const char* residual[kMaxLanes];
  char* out[kMaxLanes];
  const int64_t out_bytes = rescaled != nullptr ? rescaled->bytes() : 4, residual_bytes = rescaled != nullptr ? 1 : 4;
  Rows(b, at, rows);
  for (int64_t l = 0; l < lanes; ++l) {
    const int64_t image = at.lane_group * c.bn + l / (c.by * c.bx);
    const int64_t offset = std::min(image, s.n - 1) * s.oh * s.ow * s.y_pixel + at.g * s.ocg() + k0;
    out[l] = image < s.n ? static_cast<char*>(b.y) + offset * out_bytes : nullptr;
    residual[l] = b.residual != nullptr ? static_cast<const char*>(b.residual) + offset * residual_bytes : nullptr;
  }
  const int64_t packed = c.packed * lanes;
  const int32_t* const table = &input[static_cast<size_t>(at.tile * packed)];
  // An input that fits L2 is there already.
  const bool fetch = s.n * s.ih * s.iw * s.ic() * 4 > CacheBytes(2);
  alignas(64) Word outside[16];
  std::fill(std::begin(outside), std::end(outside), rescaled != nullptr ? rescaled->outside() : 0);
  for (int64_t block = 0; block < s.blocks(); ++block) {
    const int64_t here = std::min(s.block, s.icg - block * s.block);
    const bool finite = !c.isa->pack({rows, table, slots.data(), c.packed, here, c.slots * lanes * 4, panel, outside});
    for (int64_t l = 0; l < lanes; ++l) rows[l] += here;
    Ahead ahead = {rows, table, 0, 0};
    if (fetch && block + 1 < s.blocks()) {
      ahead = {rows, table, c.packed, (std::min(s.block, s.icg - (block + 1) * s.block) + 15) / 16};
    } else if (fetch && next.tile >= 0) {
      Rows(b, next, rows_ahead);
      ahead = {rows_ahead, &input[static_cast<size_t>(next.tile * packed)], c.packed, (std::min(s.block, s.icg) + 15) / 16};
    }
    const uint32_t* first = &starts[static_cast<size_t>((at.g * s.blocks() + block) * (s.ocg() + 1) + k0)];
    Visit visit = {offsets.data(), static_cast<const Word*>(b.values), first, channels, panel, c.pitch * lanes * 4, acc,
                   block == 0 ? static_cast<const Word*>(b.bias) + at.g * s.ocg() + k0 : nullptr, ahead};
    c.kernel->visit(visit);
    if (!finite) VisitPruned(visit, here);
  }
  // Streaming pays when the output would not stay in the last cache anyway. Of a larger one others have their share.
  constexpr int64_t kOurs = int64_t{32} << 20;
  const bool stream = rescaled == nullptr && b.then == nullptr && s.n * s.oh * s.ow * s.oc * 4 > std::min(CacheBytes(3), kOurs) / 2 && s.y_pixel % lanes == 0 && s.ocg() % lanes == 0 &&
                      k0 % lanes == 0 && channels % lanes == 0 && reinterpret_cast<uintptr_t>(b.y) % 64 == 0;
  const Rescale rescale = rescaled != nullptr ? rescaled->From(at.g * s.ocg() + k0) : Rescale{};
  c.isa->store({acc, accumulators, channels, &output[static_cast<size_t>(at.tile * accumulators * lanes)], out,
                b.residual != nullptr ? residual : nullptr, activation, stream, &rescale, b.then});
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
  const std::vector<Word> zeros(pruned.size() + 1);
  pruned.resize(pruned.size() + kListPadding);
  visit.offsets = pruned.data();
  visit.values = zeros.data();
  visit.starts = ends.data();
  visit.bias = nullptr;
  visit.ahead.count = 0;
  schedule.kernel->visit(visit);
}

void Plan::Run(const Buffers& called, int activation, Executor& executor) const {
  const Schedule& c = schedule;
  Buffers b = called;
  std::optional<PerChannel> channels;
  if (b.scales != nullptr) {
    channels.emplace(*b.scales, static_cast<const int32_t*>(b.bias), shape.oc, c.isa->shift, b.residual != nullptr);
    b.bias = channels->starts();
  }
  const Rescale* const rescale = channels ? &*channels : nullptr;
  const Sharing sharing = c.Share(shape.groups, executor.threads());
  const int64_t units = sharing.whole + (shape.groups * c.tiles() - sharing.whole) * sharing.parts;
  const auto unit = [&](int64_t i) {
    const int64_t next = i + sharing.threads;  // most likely this thread's
    Unit(b, rescale, activation, PlaceOf(i, sharing), next < units ? PlaceOf(next, sharing) : Place{0, 0, -1, 0, 0});
  };
  if (sharing.threads == 1) {
    for (int64_t i = 0; i < units; ++i) unit(i);
  } else {
    executor.For(units, unit);
  }
}

}  // namespace sparseflax
