// Runs a program: a batch in units of some images, each through all steps.
#include "program.h"

#include <algorithm>
#include <functional>
#include <set>

namespace sparseflax {
namespace {

constexpr int64_t kMostBytes = int64_t{1} << 46;

struct Alone final : Executor {
  int64_t threads() const override { return 1; }
  void For(int64_t n, const std::function<void(int64_t)>& f) override {
    for (int64_t i = 0; i < n; ++i) f(i);
  }
};

// All programs that are there.
std::mutex all_mutex;
std::set<Program*>* const all = new std::set<Program*>;  // never destroyed: a program may outlive it

}  // namespace

std::atomic<bool> Program::tracing_{false};

Program::Program() {
  std::lock_guard<std::mutex> lock(all_mutex);
  all->insert(this);
}

Program::~Program() {
  std::lock_guard<std::mutex> lock(all_mutex);
  all->erase(this);
}

std::vector<Program::Traced> Program::Trace(bool on) {
  std::lock_guard<std::mutex> lock(all_mutex);
  tracing_ = on;
  std::vector<Traced> traced;
  for (Program* each : *all) {
    if (!on) traced.push_back({each->words_, {each->nanoseconds_.begin(), each->nanoseconds_.end()}});
    for (std::atomic<int64_t>& count : each->nanoseconds_) count = 0;
  }
  return traced;
}

std::unique_ptr<Program> Program::Make(const int64_t* words, int64_t count, const float* numbers, int64_t number_count,
                                       const uint8_t* gaps, int64_t gap_count, const Isa* isa, const Isa* int8, std::string* error) {
  std::unique_ptr<Program> program(new Program);
  program->isa_ = isa;
  program->int8_ = int8;
  program->words_.assign(words, words + count);
  *error = program->Decode(words, count, numbers, number_count, gaps, gap_count);
  if (!error->empty()) return nullptr;
  program->Follow();
  program->Join();
  program->Cut();
  program->Lay();
  {
    std::lock_guard<std::mutex> lock(all_mutex);
    program->nanoseconds_ = std::vector<std::atomic<int64_t>>(program->steps_.size());
  }
  return program;
}

// Of a batch, each of some images: one of fewer images than threads is a unit for all of them.
int64_t Program::Units(int64_t n, int64_t threads) const {
  if (n < threads) return 1;
  const int64_t units = (n - 1) / chunk_ + 1;
  return std::min(n, (units + threads - 1) / threads * threads);  // the same for every thread
}

std::vector<Program::Described> Program::Describe(int64_t n, int64_t threads) const {
  std::vector<Described> described;
  for (size_t i = 0; i < steps_.size(); ++i) {
    const Step& step = steps_[i];
    Described each{segments_[step.segment].together ? 1 : Units(n, threads), static_cast<int64_t>(step.begin), 0};
    if (step.op == Op::kConcat) {
      int64_t channel = 0;
      for (const int64_t arg : step.args) {
        const int64_t c = values_[static_cast<size_t>(arg)].c;
        if (!Lies(i, arg, channel)) each.copied += c;
        channel += c;
      }
    }
    if (Stays(i) && (step.op == Op::kMap || step.done)) {  // the convolution that does it
      each.first = (step.done ? steps_[static_cast<size_t>(step.args[0] - inputs_)].args[0] : step.args[0]) - inputs_;
    } else if (Stays(i) || (step.op == Op::kConcat && each.copied == 0)) {
      each.runs = 0;
    }
    described.push_back(each);
  }
  return described;
}

std::string Program::Run(int64_t n, const std::vector<const void*>& images, const std::vector<const void*>& operands,
                         const std::vector<void*>& results, Executor& executor) {
  if (n < 1) return "";
  const int64_t threads = executor.threads(), units = Units(n, threads);
  const int64_t most = (n + units - 1) / units, slots = std::min(units, threads);
  if (n > kMost || whole_bytes_ > kMostBytes / n || unit_bytes_ > kMostBytes / (most * slots)) return "it needs more than 2^46 bytes";
  std::unique_ptr<Arena> arena;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    zeros_.resize(static_cast<size_t>(unbiased_));
    if (!arenas_.empty()) {
      arena = std::move(arenas_.back());
      arenas_.pop_back();
    }
  }
  if (arena == nullptr) arena = std::make_unique<Arena>();
  const int64_t unit_size = AlignLines(unit_bytes_ * most);
  char* const whole = arena->Get(static_cast<size_t>(std::max<int64_t>(64, whole_bytes_ * n + unit_size * slots)));
  char* const unit = whole + whole_bytes_ * n;

  std::string error;
  std::mutex mutex;  // of the error and of the free slots
  std::vector<int64_t> idle;
  for (int64_t slot = 0; slot < slots; ++slot) idle.push_back(slot);
  for (const Segment& segment : segments_) {
    if (segment.together || units == 1) {
      error = RunSteps(segment, {n, 0, n, images, operands, results, whole, unit, executor});
    } else {
      const auto run = [&](int64_t i) {
        Alone alone;
        int64_t slot;
        {
          std::lock_guard<std::mutex> lock(mutex);
          slot = idle.back();
          idle.pop_back();
        }
        const int64_t begin = n * i / units, count = n * (i + 1) / units - begin;
        std::string wrong;
        try {
          wrong = RunSteps(segment, {n, begin, count, images, operands, results, whole, unit + slot * unit_size, alone});
        } catch (const std::exception& thrown) {
          wrong = thrown.what();
        }
        std::lock_guard<std::mutex> lock(mutex);
        idle.push_back(slot);
        if (!wrong.empty()) error = wrong;
      };
      if (threads == 1) {
        for (int64_t i = 0; i < units; ++i) run(i);
      } else {
        executor.For(units, run);
      }
    }
    if (!error.empty()) break;
  }
  std::lock_guard<std::mutex> lock(mutex_);
  arenas_.push_back(std::move(arena));
  return error;
}

}  // namespace sparseflax
