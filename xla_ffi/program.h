// A network, or the part of one that is known here, as one program: steps over images in buffers whose lifetimes are known beforehand.
//
// Values are images of one size each (h, w, c), NHWC, float32 or uint8, numbered: first the inputs, then the result of each step. A batch is
// run in units of some images, each of them through all steps before the next: what lies between two layers stays in the caches, and
// threads meet only at the end. A batch of fewer images than threads goes through one layer after the other, each on all threads;
// so does every batch through layers that meet each weight once per image (`together`), as these wait for their weights.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "arena.h"
#include "sparse_conv.h"

namespace sparseflax {

// What a step does; the integers that describe it are listed beside its case in program_decode.cc, and written by sparseflax/network/program.py.
enum class Op : int64_t {
  kConv, kDepthwise, kPool, kChannelSum, kCombine, kMap, kWindow, kConcat, kReshape, kConvInt8, kQuantize, kDequantize, kUpsample, kDense,
  kReduce, kShuffle, kEnd
};

constexpr int64_t kProgramVersion = 8;       // as VERSION in program.py
constexpr int64_t kMost = int64_t{1} << 31;  // images, and elements of one
inline int64_t AlignLines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

enum class Type : int64_t { kFloat32, kUint8, kInt32 };

// A buffer from outside: elements of one image, or of an operand that all images share.
struct Sized {
  int64_t size;
  Type type;
};

struct Step {
  Op op;
  std::vector<int64_t> args, shared, params;  // values, operands that all images share, what the step does
  std::vector<float> numbers;
  std::unique_ptr<Conv> conv;  // of a kConv or kConvInt8
  size_t segment = 0, begin = 0, end = 0;  // which it belongs to; the steps with which it runs pixel by pixel
  int64_t slots = 0;                       // of the values between these, if it is the first of them
  size_t then = 0, rounds = 0;             // the map and the rounding of it that a convolution does to its result at once; 0 for none
  bool done = false;                       // whether it is such a rounding
};

class Program {
 public:
  // The encoding of program.py: `words` with indices into `numbers` and `gaps`. Null and `error` if anything does not fit: whatever
  // is read or written later was checked here. The instruction sets are those of float32 and int8, null for the best.
  static std::unique_ptr<Program> Make(const int64_t* words, int64_t count, const float* numbers, int64_t number_count,
                                       const uint8_t* gaps, int64_t gap_count, const Isa* isa, const Isa* int8, std::string* error);

  std::vector<Sized> inputs, outputs, shared;

  // Between trace(true) and trace(false) all programs count the time of their steps. The latter returns, for each that is there, its
  // words and nanoseconds of each step, of all threads; steps that run row by row count as the first of them.
  struct Traced {
    std::vector<int64_t> words, nanoseconds;
  };
  static std::vector<Traced> Trace(bool on);

  // How a batch of n images goes through each step: in so many runs of equally many images, one after the other on all threads if it is
  // one run, else each on a thread of its own; the step with which it runs; channels that it copies, of a concatenation.
  struct Described {
    int64_t runs, first, copied;
  };
  std::vector<Described> Describe(int64_t n, int64_t threads) const;
  ~Program();

  // Thread-safe; each call has memory of its own, which is kept for the next.
  // Returns an empty string, or what does not fit. Throws std::bad_alloc.
  std::string Run(int64_t n, const std::vector<const void*>& images, const std::vector<const void*>& operands,
                  const std::vector<void*>& results, Executor& executor);

 private:
  // Whole: of the whole batch; unit: of the images of one unit; slot: only between steps that run together.
  enum class Place { kInput, kOutput, kWhole, kUnit, kSlot };
  struct Value {
    int64_t h, w, c;
    Type type = Type::kFloat32;
    int64_t parent = -1, channel = 0;  // the value that holds it: a concatenation from that channel on, or what it is a reshape of
    int64_t first = 0, last = -1;      // steps that write it first and read it last
    Place place = Place::kUnit;
    int64_t offset = 0;                // bytes per image into its memory, or the number of its input, output or slot
    int64_t size() const { return h * w * c; }
    int64_t bytes() const { return type == Type::kUint8 ? 1 : 4; }  // of an element
  };
  struct Segment {
    size_t begin, end;
    bool together;
  };
  struct Call {  // what the steps of a unit run on
    int64_t n, begin, count;  // images of the batch and of this unit
    const std::vector<const void*>& inputs;
    const std::vector<const void*>& shared;
    const std::vector<void*>& outputs;
    char* whole;
    char* unit;
    Executor& executor;
  };

  Program();
  std::string Decode(const int64_t* words, int64_t count, const float* numbers, int64_t number_count, const uint8_t* gaps,
                     int64_t gap_count);
  std::string CheckStep(const Step& step, Value* y);
  void Follow();
  void Join();
  void Cut();
  void Lay();
  int64_t Root(int64_t value) const;
  template <typename T>
  ImageOf<T> At(const Call& call, int64_t value) const;
  bool Stays(size_t step) const;
  bool Pixelwise(size_t step) const;
  bool Lies(size_t concat, int64_t arg, int64_t channel) const;
  int64_t Units(int64_t n, int64_t threads) const;
  void RunPixelwise(size_t first, const Call& call, const Steps& loops, int64_t row, int64_t end) const;
  std::string RunSteps(const Segment& segment, const Call& call) const;

  std::vector<int64_t> words_;
  std::vector<Value> values_;
  std::vector<Step> steps_;
  std::vector<Segment> segments_;
  const Isa* isa_ = nullptr;
  const Isa* int8_ = nullptr;
  int64_t inputs_ = 0, chunk_ = 1;
  int64_t unbiased_ = 0;                      // output channels of the widest convolution without a bias
  int64_t whole_bytes_ = 0, unit_bytes_ = 0;  // per image
  static std::atomic<bool> tracing_;  // whether all programs are
  mutable std::vector<std::atomic<int64_t>> nanoseconds_;  // of each step, where it is traced
  std::mutex mutex_;
  std::vector<std::unique_ptr<Arena>> arenas_;  // that no call uses now
  std::vector<float> zeros_;                    // the bias of convolutions without one: made at the first call, when memory of that size is there
};

}  // namespace sparseflax
