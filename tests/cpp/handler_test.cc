// Tests of the border to XLA: the handler's own call frames, from a runtime of a few lines. Exits with 1 after the first failure.
#include <cstdio>
#include <string>
#include <thread>
#include <vector>

#include "runtime.h"

namespace {

void CheckRefused(const std::string& message, const std::string& wanted) {
  if (message.find(wanted) == std::string::npos) Fail("said \"" + message + "\", wanted \"..." + wanted + "...\"");
}

}  // namespace

int main() {
  Register();
  Pool pool(3);
  // Two call sites, each executed by four threads at once: the first executions race for the plan.
  const Shape shape = MakeShape(2, 24, 25, 40, 1, 67, 3, 3, 16, 1, 1, 1, 1, 1, 1, 1, 1);
  for (const bool residual : {true, false}) {
    const Problem p = MakeProblem(shape, 0.1, 1, residual, 5);
    XLA_FFI_ExecutionContext site = {&pool};
    if (const std::string error = Instantiate(&site, AttributesOf(p)); !error.empty()) Fail(error);
    std::vector<std::thread> callers;
    for (int t = 0; t < 4; ++t) {
      callers.emplace_back([&] {
        for (int repeat = 0; repeat < 3; ++repeat) {
          std::vector<float> y(p.y.size());
          const std::string error = Execute(&site, p, y, static_cast<int64_t>(p.values.size()));
          if (!error.empty()) Fail(error);
          for (size_t i = 0; i < y.size(); ++i) {
            if (!(std::abs(y[i] - p.y[i]) <= p.bound[i])) Fail("y[" + std::to_string(i) + "] is " + std::to_string(y[i]));
          }
        }
      });
    }
    for (std::thread& caller : callers) caller.join();

    std::vector<float> y(p.y.size());
    CheckRefused(Execute(&site, p, y, static_cast<int64_t>(p.values.size()) - 1), "weights, values holds");
  }

  Problem p = MakeProblem(shape, 0.1, 1, false, 5);
  {
    XLA_FFI_ExecutionContext site = {&pool};
    Attributes few = AttributesOf(p);
    few.layout.pop_back();
    CheckRefused(Instantiate(&site, few), "malformed attributes");
    Attributes far = AttributesOf(p);
    far.window[2] = INT64_MAX;
    CheckRefused(Instantiate(&site, far), "padding is too large");
    std::vector<float> y(p.y.size());
    CheckRefused(Execute(&site, p, y, static_cast<int64_t>(p.values.size())), "no state");
  }
  p.gaps.insert(p.gaps.end(), 1000, 255);
  p.gaps.push_back(0);
  XLA_FFI_ExecutionContext site = {&pool};
  CheckRefused(Instantiate(&site, AttributesOf(p)), "points outside its kernel");
  std::puts("ok");
  return 0;
}
