// A pattern expanded for one image size, batch and tile.
#pragma once

#include "sparse_conv.h"

namespace sparseflax {

constexpr uint8_t kSkip = 255;  // the gap byte that keeps nothing

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

// One unit of work: output channels [k0, k1) of a group, for one tile of the images of a lane group.
struct Place {
  int64_t g, lane_group, tile, k0, k1;
};

// Everything that depends on the image size, the batch or the tile, computed once.
struct Plan {
  // `gaps` keep `nnz` weights, all of them inside `called`.
  Plan(const Shape& called, const Schedule& chosen, const std::vector<uint8_t>& gaps, int64_t nnz);
  void Run(const Buffers& b, int activation, Executor& executor) const;

  Shape shape;            // image sizes filled in; 1x1 convolutions flattened to one long row
  int64_t n, ih, iw;      // as called: the key
  Schedule schedule;
  std::vector<uint16_t> offsets;    // (nnz), padded
  std::vector<uint32_t> starts;     // (groups * blocks, ocg + 1): ranges of `offsets`
  std::vector<uint32_t> weight;     // (groups, ocg + 1): kept weights of the output channels before k
  std::vector<uint16_t> tap_offset; // (taps)
  std::vector<int32_t> slots;       // (packed)
  std::vector<int32_t> input;       // (ty * tx, packed, lanes)
  std::vector<int32_t> output;      // (ty * tx, y * x, lanes)

 private:
  void FillTables();
  void FillLists(const std::vector<uint8_t>& gaps, int64_t nnz);
  Place PlaceOf(int64_t unit, const Sharing& sharing) const;
  void Rows(const Buffers& b, const Place& at, const Word* rows[kMaxLanes]) const;
  void Unit(const Buffers& b, const Rescale* rescaled, int activation, const Place& at, const Place& next) const;
  void VisitPruned(Visit visit, int64_t channels_here) const;
  int64_t Split(int64_t g, int64_t part, int64_t parts) const;
};

}  // namespace sparseflax
