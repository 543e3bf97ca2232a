// Expands a pattern: the tables of a tile, and a list of panel offsets for each block and output channel.
#include "plan.h"

#include <algorithm>
#include <map>
#include <utility>

namespace sparseflax {

Plan::Plan(const Shape& called, const Schedule& chosen, const std::vector<uint8_t>& gaps, int64_t nnz)
    : shape(called.Flat()), n(called.n), ih(called.ih), iw(called.iw), schedule(chosen) {
  FillTables();
  FillLists(gaps, nnz);
}

// Where output positions and panel slots of tile (ty, tx) lie in the arrays, for each lane; -1 outside.
void Plan::FillTables() {
  const Shape& s = shape;
  const Schedule& c = schedule;
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
  tap_offset.resize(static_cast<size_t>(s.taps()));
  for (int64_t t = 0; t < s.taps(); ++t) {
    const int64_t ch = t / (s.kh * s.kw), r = t / s.kw % s.kh * s.dh, q = t % s.kw * s.dw;
    const int64_t slot = base[{r % s.sh, q % s.sw}] + r / s.sh * c.pitch + q / s.sw;
    tap_offset[static_cast<size_t>(t)] = static_cast<uint16_t>((ch * c.slots + slot) * unit);
  }
  for (int64_t ty = 0; ty < c.ty; ++ty) {
    for (int64_t tx = 0; tx < c.tx; ++tx) {
      for (const Plane& r : rows) {
        for (const Plane& q : columns) {
          for (int64_t i = 0; i < r.longest; ++i) {
            for (int64_t j = 0; j < q.longest; ++j) {
              if (ty == 0 && tx == 0) {
                slots.push_back(static_cast<int32_t>(base[{r.phase, q.phase}] + i * c.pitch + j));
              }
              for (int64_t l = 0; l < lanes; ++l) {
                const int64_t column = (tx * c.bx + l % c.bx) * kx + j;
                const int64_t y = ((ty * c.by + l / c.bx % c.by) * ky + i + column / c.wrap) * s.sh + r.phase - s.top;
                const int64_t x = column % c.wrap * s.sw + q.phase - s.left;
                const bool inside = y >= 0 && y < s.ih && x >= 0 && x < s.iw;
                input.push_back(inside ? static_cast<int32_t>((y * s.iw + x) * s.x_pixel) : -1);
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
            output.push_back(y < s.oh && x < s.ow ? static_cast<int32_t>((y * s.ow + x) * s.y_pixel) : -1);
          }
        }
      }
    }
  }
}

void Plan::FillLists(const std::vector<uint8_t>& gaps, int64_t nnz) {
  const size_t rows = static_cast<size_t>(shape.groups * shape.blocks()), ocg = static_cast<size_t>(shape.ocg());
  starts.assign(rows * (ocg + 1), 0);
  offsets.reserve(static_cast<size_t>(nnz) + kListPadding);
  weight.assign(static_cast<size_t>(shape.groups) * (ocg + 1), 0);
  Decode(shape, gaps.data(), static_cast<int64_t>(gaps.size()), [&](int64_t g, int64_t b, int64_t k, int64_t tap) {
    offsets.push_back(tap_offset[static_cast<size_t>(tap)]);
    ++starts[static_cast<size_t>(g * shape.blocks() + b) * (ocg + 1) + static_cast<size_t>(k) + 1];
    ++weight[static_cast<size_t>(g) * (ocg + 1) + static_cast<size_t>(k) + 1];
  });
  offsets.resize(static_cast<size_t>(nnz) + kListPadding, 0);
  uint32_t before = 0;
  for (size_t row = 0; row < rows; ++row) {
    uint32_t* end = &starts[row * (ocg + 1)];
    end[0] = before;
    for (size_t k = 0; k < ocg; ++k) end[k + 1] += end[k];
    before = end[ocg];
  }
  for (size_t g = 0; g < static_cast<size_t>(shape.groups); ++g) {
    uint32_t* end = &weight[g * (ocg + 1)];
    for (size_t k = 0; k < ocg; ++k) end[k + 1] += end[k];
  }
}

}  // namespace sparseflax
