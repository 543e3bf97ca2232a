// The contract between the parts of the kernel.
//
//   y[n,i,j,k] = act( sum_{r,s,c} x[n, i*sh + r*dh - pt, j*sw + s*dw - pl, c] * w[r,s,c,k] + bias[k] + residual[n,i,j,k] )
//
// over the kept weights only, NHWC float32. Lanes are tiles: the L lanes of a vector are bn images x by x bx neighbouring
// blocks of y x x outputs, and accumulator (i, j) of a register tile holds position (i, j) of every lane's block. A shift of the kernel
// is then a shift by whole, aligned vectors. The input positions that a tile needs are packed into a panel
//
//   panel[c][slot][lane],   slot(y, x; r, s) = plane(r*dh % sh, s*dw % sw) + (y + r*dh/sh) * pitch + x + s*dw/sw
//
// so that stride, dilation, padding, groups and odd sizes are absorbed by tables and the loop nest sees none of them.
//
// What is multiplied is a 32-bit word: a float32, or int8 of four neighbouring input channels. Then x is uint8, and its four
// channels are one of Shape's: sums are int32, and a Rescale makes uint8 or float32 of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "steps.h"

namespace sparseflax {

constexpr int kMaxLanes = 16;
constexpr int kMaxTile = 28;      // accumulators of the largest register tile
constexpr int kOffsetUnit = 8;    // bytes per unit of a 16-bit panel offset: panels of up to 512 KB
constexpr int64_t kNever = int64_t{1} << 40;  // beyond any row
constexpr int kListPadding = 8;   // offsets that a microkernel may read past the end of a list

using Word = int32_t;  // 32 bits of whatever an instruction set multiplies
enum class Element { kFloat32, kInt8 };

// What one convolution is. Everything a buffer does not say; checked by Check().
struct Shape {
  int64_t n, ih, iw, oh, ow;                           // images
  int64_t kh, kw, icg, oc, groups, block;              // weights: icg input channels per group, `block` per channel block
  int64_t sh, sw, top, bottom, left, right, dh, dw;    // window
  int64_t x_pixel, y_pixel;                            // floats from one pixel to the next: ic and oc, or those of a wider image
  int64_t ic() const { return icg * groups; }
  int64_t ocg() const { return oc / groups; }
  int64_t blocks() const { return (icg + block - 1) / block; }
  int64_t taps() const { return block * kh * kw; }
  std::string Check() const;                           // empty, or what is wrong
  Shape Flat() const;                                  // a 1x1 convolution as one long row of pixels, any other as it is
};

// Input that will be packed next, fetched into L2 a few lines per output channel, while the FMAs leave the memory idle:
// the 64-byte lines rows[l] + table[v][l] + 16 i, v < count, l < lanes, i < lines. Nothing if count is 0.
struct Ahead {
  const Word* const* rows;
  const int32_t* table;
  int64_t count, lines;
};

// acc[k][j] (+)= sum_{m in [starts[k], starts[k+1])} values[m] * panel[offsets[m] + shift(j)],   k < channels, j < y*x
//   panel, acc   64-byte aligned; shift(j) = (j / x) * pitch + (j % x) vectors
//   offsets      in units of kOffsetUnit bytes; up to kListPadding of them are read past the end
//   values       never read past the end; int8 is never -128
//   bias         acc starts from bias[k] (first block) or, if null, from its own contents
struct Visit {
  const uint16_t* offsets;
  const Word* values;
  const uint32_t* starts;
  int64_t channels;
  const char* panel;
  int64_t pitch;  // bytes
  Word* acc;      // float32, or int32
  const Word* bias;
  Ahead ahead;
};

// panel[c][slots[v]][l] = rows[l][table[v][l] + c], or outside[c % 16] where table[v][l] < 0;   v < count, c < channels, l < lanes
//   rows     reads words rows[l][table .. table + channels) only
//   outside  64-byte aligned
// Of uint8 each byte becomes x - Isa::shift. Returns whether a non-finite value was seen.
struct Pack {
  const Word* const* rows;
  const int32_t* table;
  const int32_t* slots;
  int64_t count, channels;
  int64_t channel_bytes;  // of one channel of the panel
  char* panel;
  const Word* outside;
};

// What int32 sums of int8 products become:  q = clamp(round(y), low, high) + zero as uint8, or clamp(y, low, high) as float32,
//
//   y = (float(sum (x - zero_in) w) + offset[k] + (residual - zero_residual) ratio[k]) scale[k]
//
// With `inner` the sum is rounded before the residual is added. Ratio and scale are those of its steps, and the ratio has another 16 bits:
//
//   step = clamp(round((float(sum (x - zero_in) w) + offset[k]) inner[k]), inner_low, inner_high)
//   y = ((step + (residual - zero_residual) ratio[k]) + (residual - zero_residual) ratio_rest) scale[k]
//
// Rounded to nearest, ties to even; every operation rounds by itself. The ratio has at most 16 significant bits, so that its product
// is exact: y is then the same whether or not a compiler joins products and sums. A nan becomes low as uint8, stays as float32.
struct Requantize {  // what all channels share
  float low, high;   // whole numbers for uint8
  int32_t zero_in, zero, zero_residual;
  bool to_float;     // whether y is float32
  float inner_low = 0, inner_high = 0, ratio_rest = 0;  // bounds are whole numbers
  int64_t bytes() const { return to_float ? 4 : 1; }
  Word outside() const { return static_cast<Word>(static_cast<uint32_t>(zero_in) * 0x01010101u); }  // of the image
};
struct Rescale : Requantize {
  const float* scale;   // (oc)
  const float* offset;  // (oc)
  const float* ratio;   // (oc), or null without a residual
  const float* inner;   // (oc), or null; only with a residual
  Rescale From(int64_t channel) const {  // of the output channels from that on
    Rescale rest = *this;
    for (const float** each : {&rest.scale, &rest.offset, &rest.ratio, &rest.inner}) {
      if (*each != nullptr) *each += channel;
    }
    return rest;
  }
};

// What the arrays of a Rescale follow from at each call, as few operations of float32 as they are:
//
//   unit = weight[k] in,  offset[k] = bias[k] / unit,  scale[k] = weight[k] out,     ratio[k] = residual / unit, of 16 bits
//   with inner:           inner[k] = weight[k] inner,  scale[k] = out,               ratio[k] = residual
struct Scales : Requantize {
  const float* weight;  // (oc) what a weight of 1 stands for
  const float* bias;    // (oc)
  float in, out, residual;
  bool rounds = false;  // whether there is an inner
  float inner = 0;
};

// out[l][table[j][l] + k] = act( acc[k][j][l] + residual[l][table[j][l] + k] )   where out[l] != null and table[j][l] >= 0
struct Store {
  const Word* acc;
  int64_t tile, channels;
  const int32_t* table;
  char* const* out;
  const char* const* residual;  // or null
  int activation;               // 0 none, 1 relu, 2 relu6
  bool stream;                  // past the caches; wants out and table aligned to whole vectors, channels % lanes == 0
  const Rescale* rescale;       // of int8, from channel k = 0; the activation is in its bounds
  const Function* then;         // what is done to float32 after the activation, or null; not past the caches
};

// A convolution that keeps nearly all of its words, of pixels [pixel, end) of all images and the channels of a panel: Isa::dense_width of a
// group's, from the first on.
struct DenseWords {
  Shape shape;
  const Word* x;           // words, of uint8
  const Word* values;      // the kept ones in stored order, of int8
  const uint32_t* missing; // taps that are not kept, within their block
  const uint32_t* starts;  // (groups * blocks * ocg + 1) where those of a block and output channel begin
  const Word* first;       // (oc) what sums start from
  void* y;
  const void* residual;    // or null
  const Rescale* rescale;  // from output channel 0 on
};
constexpr int64_t kFewPixels = 8;  // of DenseWords, below which packing the words takes longer than it saves

// How many sums each accumulator of a tile is split into: an FMA's result is there after 4 cycles, in which 8 others start.
constexpr int Chains(int tile) { return tile <= 2 ? 4 : tile <= 4 ? 2 : 1; }

struct Kernel {
  int y, x;  // register tile
  void (*visit)(const Visit&);
};

struct Isa {
  std::string_view name;
  int lanes;
  Element element;
  int shift;                    // of uint8 in the panel
  double (*fma_cycles)();       // per FMA with a memory operand in L1, here or where it usually runs
  double (*peak_flops)();       // measured now, one thread; null for int8
  bool (*runs_here)();
  bool (*pack)(const Pack&);
  void (*store)(const Store&);
  const Kernel* kernels;
  int kernel_count;
  const Steps* steps;           // null for int8
  int64_t dense_width = 0;      // of int8: output channels of a panel
  void (*dense)(const DenseWords&, int64_t panel, int64_t pixel, int64_t end) = nullptr;
};

// All instruction sets of this build, and those of them that run on this machine: best first; the last is "portable".
const std::vector<const Isa*>& AllIsas(Element element = Element::kFloat32);
const std::vector<const Isa*>& Isas(Element element = Element::kFloat32);

// What the choice of a tile goes by of a processor: bytes of a core's own caches, and cycles of the FMAs of the first of the
// instruction sets that it has; 0 for what this build knows of them. By default the processor that this runs on.
int64_t CacheBytes(int level);  // data caches of one core (1, 2), the last shared one (3)
struct Cpu {
  int64_t l1 = CacheBytes(1), l2 = CacheBytes(2);
  double fma_cycles = 0;
};

// How the tiles of all groups are shared out: `whole` of them one by one, and those that would leave threads idle in `parts`
// parts of their output channels, each of which packs a panel of its own. The busiest thread visits `work` tiles and packs `panels`.
struct Sharing {
  int64_t threads, whole, parts;
  double work, panels;
};

// Where a tile's lanes and accumulators lie, and what that costs. See schedule.cc.
struct Schedule {
  const Isa* isa = nullptr;
  const Kernel* kernel = nullptr;
  int64_t bn = 1, by = 1, bx = 1;     // images x sub-images: bn * by * bx = lanes
  int64_t lane_groups = 1;            // ceil(n / bn)
  int64_t ty = 0, tx = 0;             // tiles of an image: each covers by * y rows and bx * x columns
  int64_t wrap = kNever;              // columns after which a block goes on in the next row
  int64_t pitch = 0, slots = 0;       // panel: vectors per row, per channel
  int64_t packed = 0;                 // slots that are filled
  double fma = 0;                     // cycles of an FMA with a memory operand
  double cycles = 0, packing = 0;     // the estimate it was chosen by, and the share of packing in it
  int64_t tiles() const { return lane_groups * ty * tx; }
  Sharing Share(int64_t groups, int64_t available) const;
};
std::vector<Schedule> Candidates(const Shape& shape, int64_t nnz, const Isa& isa, const Cpu& cpu);
// The cheapest over `isas`; its kernel is null if no panel fits its offsets.
Schedule ChooseSchedule(const Shape& shape, int64_t nnz, const std::vector<const Isa*>& isas, Cpu cpu);

// Runs f(i) for all i < n, on as many threads as it has.
struct Executor {
  virtual int64_t threads() const = 0;
  virtual void For(int64_t n, const std::function<void(int64_t)>& f) = 0;
  virtual ~Executor() = default;
};

struct Buffers {
  const void* x;         // float32, or uint8 whose channels of a group are a multiple of four; words are aligned
  const void* values;    // float32, or four int8
  const void* bias;      // (oc) float32, or int32 sums of each output channel's int8 weights
  const void* residual;  // like y, or null; uint8 for int8
  void* y;
  const Scales* scales = nullptr;    // for int8
  int64_t x_pixel = 0, y_pixel = 0;  // as in Shape; 0 for ic and oc
  const Function* then = nullptr;    // for float32, after the activation
};

class NearlyAll;  // a pattern of eight bits that is run as a dense one
struct Plan;  // the pattern expanded for one image size, batch and tile

// One sparse convolution: the pattern, decoded and checked once, and its plans. Thread-safe.
class Conv {
 public:
  // `shape` without image sizes; `gaps` as sparseflax/packing.py documents; `isa` null for the cheapest of all for `element`.
  // Null and `error` if they do not fit.
  static std::unique_ptr<Conv> Make(const Shape& shape, const uint8_t* gaps, int64_t size, const Isa* isa, std::string* error,
                                    Element element = Element::kFloat32);
  ~Conv();

  // Empty strings, or what does not fit: images of these sizes, and all of a call.
  std::string Fits(int64_t ih, int64_t iw, int64_t oh, int64_t ow) const;
  std::string Run(int64_t n, int64_t ih, int64_t iw, int64_t oh, int64_t ow, const Buffers& buffers, int activation,
                  Executor& executor, const Schedule* forced = nullptr);
  int64_t nnz() const { return nnz_; }
  const Shape& shape() const { return shape_; }

 private:
  Conv() = default;
  std::shared_ptr<const Plan> GetPlan(const Shape& shape, const Schedule* forced);
  Shape shape_{};
  std::vector<uint8_t> gaps_;
  int64_t nnz_ = 0;
  const Isa* isa_ = nullptr;
  Element element_ = Element::kFloat32;
  std::mutex mutex_;
  std::vector<std::shared_ptr<const Plan>> plans_;
  std::unique_ptr<NearlyAll> nearly_all_;  // or null
};


}  // namespace sparseflax
