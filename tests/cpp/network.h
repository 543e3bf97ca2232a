// Programs of steps, encoded as sparseflax/network/program.py does.
#pragma once

#include <vector>

#include "program.h"
#include "steps.h"

using sparseflax::kProgramVersion;
using sparseflax::Op;
using sparseflax::Unary;

struct Code {
  std::vector<int64_t> words;
  std::vector<float> numbers;
  std::vector<uint8_t> gaps;
  void Step(Op op, std::vector<int64_t> size, std::vector<int64_t> args, std::vector<int64_t> shared, std::vector<int64_t> params,
            std::vector<float> own = {}, int64_t gap_count = 0) {
    words.push_back(static_cast<int64_t>(op));
    words.insert(words.end(), size.begin(), size.end());
    for (const auto& list : {args, shared, params}) {
      words.push_back(static_cast<int64_t>(list.size()));
      words.insert(words.end(), list.begin(), list.end());
    }
    const int64_t end = static_cast<int64_t>(gaps.size());
    words.insert(words.end(), {static_cast<int64_t>(numbers.size()), static_cast<int64_t>(own.size()), end - gap_count, end});
    numbers.insert(numbers.end(), own.begin(), own.end());
  }
};

constexpr int64_t Is(Unary op) { return static_cast<int64_t>(op); }

// Two convolutions, a depthwise one and a pool into a concatenation; a range of its channels, element by element; a reshape; one layer
// that meets each weight once; in eight bits two convolutions, a maximum and a concatenation; blocks of pixels; two dense
// layers, of which one meets each weight once; a softmax; depthwise convolutions from float32 to bytes, to bytes and back; shuffles of
// channels, and smooth functions.
inline Code Network(int64_t chunk) {
  Code c;
  c.words = {kProgramVersion, 1, 41, 10, 13, chunk, 6, 5, 4, 0};
  const auto full = [&](int64_t taps) { c.gaps.insert(c.gaps.end(), static_cast<size_t>(taps), 0); return taps; };
  int64_t kept = full(3 * 3 * 4 * 4);
  c.Step(Op::kConv, {6, 5, 4}, {0}, {0, 1}, {3, 3, 4, 4, 1, 4, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0}, {}, kept);                   // 1
  c.Step(Op::kConv, {6, 5, 4}, {1, 0}, {0, 1}, {3, 3, 4, 4, 1, 4, 1, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1}, {}, kept);                // 2
  c.Step(Op::kDepthwise, {6, 5, 4}, {2}, {2, 1}, {3, 3, 1, 1, 1, 1, 1, 1, 2, 1, 0, 0});                                       // 3
  c.Step(Op::kPool, {6, 5, 4}, {2}, {}, {1, 3, 3, 1, 1, 1, 1, 1, 1});                                                         // 4
  c.Step(Op::kConcat, {6, 5, 12}, {3, 4, 2}, {}, {});                                                                         // 5
  c.Step(Op::kWindow, {6, 5, 4}, {5}, {}, {0, 0, 6}, {0});                                                                    // 6
  c.Step(Op::kCombine, {6, 5, 4}, {6, 1}, {}, {0, 0, 0});                                                                     // 7
  c.Step(Op::kMap, {6, 5, 4}, {7}, {}, {Is(Unary::kGate)}, {0.25f, 0.5f, 0, 1, 2, -1, 0.5f, 0.125f});                         // 8
  c.Step(Op::kCombine, {6, 5, 4}, {8}, {1}, {2, 2, 0});                                                                       // 9
  c.Step(Op::kChannelSum, {6, 5, 12}, {5}, {}, {5, 2});                                                                       // 10
  c.Step(Op::kReshape, {1, 1, 360}, {10}, {}, {});                                                                            // 11
  kept = full(360 * 3);
  c.Step(Op::kConv, {1, 1, 3}, {11}, {3, 4}, {1, 1, 360, 3, 1, 360, 1, 1, 0, 0, 0, 0, 1, 1, 0, 1, 0}, {}, kept);              // 12
  c.Step(Op::kQuantize, {6, 5, 4}, {1}, {}, {}, {2, 3});                                                                      // 13
  kept = full(3 * 3 * 4);
  c.Step(Op::kConvInt8, {6, 5, 4}, {13}, {5, 6, 1, 1}, {3, 3, 1, 4, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 3, 5, 0, 0, 0, 0}, {-5, 200, 1, 1, 0}, kept);  // 14
  c.Step(Op::kPool, {6, 5, 4}, {14}, {}, {1, 3, 3, 1, 1, 1, 1, 1, 1});                                                        // 15
  c.Step(Op::kConcat, {6, 5, 8}, {14, 15}, {}, {});                                                                           // 16
  c.Step(Op::kWindow, {6, 5, 4}, {16}, {}, {0, 0, 4}, {3});                                                                   // 17
  c.Step(Op::kConvInt8, {6, 5, 4}, {17, 14}, {7, 8, 1, 1}, {3, 3, 1, 4, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 3, 0, 5, 1, 1, 1}, {-5, 200, 1, 1, 1, -3, 90, 0.01f, 1}, full(3 * 3 * 4));  // 18
  c.Step(Op::kDequantize, {6, 5, 8}, {16}, {}, {}, {2, 3});                                                                   // 19
  c.Step(Op::kUpsample, {12, 10, 1}, {1}, {}, {2, 2});                                                                        // 20
  c.Step(Op::kUpsample, {12, 20, 1}, {20}, {}, {1, 2});                                                                       // 21
  c.Step(Op::kCombine, {12, 20, 1}, {21}, {9}, {2, 4, 1});                                                                    // 22
  c.Step(Op::kWindow, {8, 7, 4}, {1}, {}, {-1, -1, 0}, {0});                                                                  // 23
  c.Step(Op::kDense, {6, 5, 4}, {23}, {10, 1}, {3, 3, 1, 1, 0, 0, 1, 1, 2, 1, 1});                                            // 24
  c.Step(Op::kDense, {1, 1, 200}, {11}, {11, 12}, {1, 1, 1, 1, 0, 0, 1, 1, 1, 0, 1});                                         // 25
  c.Step(Op::kReduce, {6, 5, 1}, {8}, {}, {1});                                                                               // 26
  c.Step(Op::kCombine, {6, 5, 4}, {8, 26}, {}, {1, 5, 0});                                                                    // 27
  c.Step(Op::kMap, {6, 5, 4}, {27}, {}, {Is(Unary::kExp)}, {0, 0});                                                           // 28
  c.Step(Op::kReduce, {6, 5, 1}, {28}, {}, {0});                                                                              // 29
  c.Step(Op::kCombine, {6, 5, 4}, {28, 29}, {}, {3, 5, 0});                                                                   // 30
  c.Step(Op::kDepthwise, {6, 5, 4}, {2}, {2}, {3, 3, 1, 1, 1, 1, 1, 1, 0, 0, 0, 1}, {4, 128});                                // 31
  c.Step(Op::kDepthwise, {3, 3, 4}, {31}, {2, 1}, {3, 3, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1}, {4, 128, 8, 0});                      // 32
  c.Step(Op::kDepthwise, {3, 3, 4}, {32}, {2}, {3, 3, 1, 1, 1, 1, 1, 1, 0, 0, 1, 0}, {8, 0});                                 // 33
  c.Step(Op::kShuffle, {6, 5, 4}, {1}, {}, {2});                                                                              // 34
  c.Step(Op::kMap, {6, 5, 4}, {34}, {}, {Is(Unary::kTanh)}, {0, 0});                                                          // 35
  c.Step(Op::kMap, {6, 5, 4}, {35}, {}, {Is(Unary::kGelu)}, {0.5f, 0.5f});                                                    // 36
  c.Step(Op::kMap, {6, 5, 4}, {36}, {}, {Is(Unary::kSwish)}, {1, 0.5f, 2});                                                   // 37
  c.Step(Op::kMap, {6, 5, 1}, {26}, {}, {Is(Unary::kErf)}, {0, 0});                                                           // 38
  c.Step(Op::kCombine, {6, 5, 4}, {38}, {1}, {2, 2, 0});                                                                      // 39
  c.Step(Op::kCombine, {6, 5, 4}, {37, 39}, {}, {6, 0, 0});                                                                   // 40
  c.Step(Op::kShuffle, {6, 5, 8}, {16}, {}, {2});                                                                             // 41
  c.words.insert(c.words.end(), {9, 12, 18, 22, 24, 25, 30, 33, 40, 41});
  return c;
}
