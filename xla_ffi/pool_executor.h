// Parallel loops on a thread pool that belongs to somebody else and may be busy, blocked or asleep.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "sparse_conv.h"

namespace sparseflax {

using Clock = std::chrono::steady_clock;

// How long a thread stays awake for the next loop, or for the end of its own. To wake one that sleeps takes 10 us on bare
// metal, and on a virtual machine 45 us, of which its caller pays 15: as much as a small convolution. Worse, it is often woken
// where its caller runs, and waits there for milliseconds: a network of 300 small steps took 8.5 ms or 14 on two threads when
// this was 100 us, as its next call came later than that.
constexpr auto kLinger = std::chrono::microseconds(1000);
constexpr auto kYield = std::chrono::microseconds(10);  // of waiting, after which others are let run

inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// True as soon as `ready` is, false once `end` has passed. Who waits may keep from the processor the very thread that it waits for,
// for milliseconds, with another processor idle. So it lets others run, and where one did, sleeps for a moment: who wakes up is
// given an idle processor.
template <typename Ready>
bool AwakeUntil(Clock::time_point end, const Ready& ready) {
  for (Clock::time_point now = Clock::now(), next = now + kYield; now < end;) {
    for (int i = 0; i < 32; ++i) {
      if (ready()) return true;
      Pause();
    }
    now = Clock::now();
    if (now < next) continue;
    std::this_thread::yield();
    const Clock::time_point back = Clock::now();
    if (back - now > kYield) std::this_thread::sleep_for(std::chrono::microseconds(1));
    now = Clock::now();
    next = now + kYield;
  }
  return ready();
}

// One loop whose items are claimed one by one by whoever comes. `f` is touched only after a live item was claimed, while
// the caller waits; a thread that comes late finds nothing to claim.
class Loop {
 public:
  Loop(int64_t n, const std::function<void(int64_t)>& f) : n_(n), f_(&f) {}

  void Work() {
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < n_;) {
      try {
        (*f_)(i);
      } catch (...) {
        std::lock_guard<std::mutex> lock(mutex_);
        error_ = std::current_exception();
      }
      if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == n_) {
        std::lock_guard<std::mutex> lock(mutex_);
        all_done_.notify_one();
      }
    }
  }

  // Waits for the items that others have claimed: they are running, so this ends.
  void Wait() {
    const auto ready = [this] { return done_.load(std::memory_order_acquire) == n_; };
    if (!AwakeUntil(Clock::now() + kLinger, ready)) {
      std::unique_lock<std::mutex> lock(mutex_);
      all_done_.wait(lock, ready);
    }
  }

  void Rethrow() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (error_) std::rethrow_exception(error_);
  }

  // The lobby's, under its lock: threads that it gave the loop to and that were not back when it ended.
  int64_t helpers = 0;
  bool ended = false;

 private:
  const int64_t n_;
  const std::function<void(int64_t)>* const f_;
  std::atomic<int64_t> next_{0}, done_{0};
  std::mutex mutex_;
  std::condition_variable all_done_;
  std::exception_ptr error_;
};

// Where threads that are awake and loops that want help meet.
class Lobby {
 public:
  // Asks `wanted` threads to help with a loop; returns for how many a pool is to be asked. Those that are on their way already
  // will do: who was asked for and has not begun, or is not back from a loop that has ended. More of them would take the
  // processors from those that work.
  int64_t Call(const std::shared_ptr<Loop>& loop, int64_t wanted) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (; wanted > 0 && !waiting_.empty(); --wanted) {
      Waiter* const waiter = waiting_.back();
      waiting_.pop_back();
      waiter->loop = loop;
      ++loop->helpers;
      waiter->called.store(true, std::memory_order_release);
    }
    if (wanted == 0) return 0;
    open_.push_back({loop, wanted});
    const int64_t more = std::max<int64_t>(0, wanted - asked_ - late_);
    asked_ += more;
    return more;
  }

  void End(const std::shared_ptr<Loop>& loop) {
    std::lock_guard<std::mutex> lock(mutex_);
    open_.erase(std::remove_if(open_.begin(), open_.end(), [&](const Open& each) { return each.loop == loop; }), open_.end());
    loop->ended = true;
    late_ += loop->helpers;
    ended_ = Clock::now();
  }

  // Somebody who was asked for: works on whatever wants help, until nothing has for a while.
  void Serve() {
    std::shared_ptr<Loop> loop = Next(nullptr);
    while (loop != nullptr) {
      loop->Work();
      loop = Next(std::move(loop));
    }
  }

  // Somebody who was asked for will not come.
  void Cancel() {
    std::lock_guard<std::mutex> lock(mutex_);
    --asked_;
  }

 private:
  struct Open {
    std::shared_ptr<Loop> loop;
    int64_t wanted;
  };
  struct Waiter {
    std::shared_ptr<Loop> loop;
    std::atomic<bool> called{false};
  };

  // The next loop of a thread that comes from another, or, from none, was asked for.
  std::shared_ptr<Loop> Next(std::shared_ptr<Loop> before) {
    Waiter self;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (before == nullptr) --asked_;
      else if (before->ended) --late_;
      else --before->helpers;
      if (!open_.empty()) {
        const std::shared_ptr<Loop> loop = open_.back().loop;
        if (--open_.back().wanted == 0) open_.pop_back();
        ++loop->helpers;
        return loop;
      }
      waiting_.push_back(&self);
    }
    for (;;) {
      const auto called = [&] { return self.called.load(std::memory_order_acquire); };
      if (AwakeUntil(Clock::now() + kLinger / 4, called)) return std::move(self.loop);  // loops that end meanwhile move the end
      std::lock_guard<std::mutex> lock(mutex_);
      if (self.loop != nullptr) return std::move(self.loop);
      if (Clock::now() < ended_ + kLinger) continue;
      waiting_.erase(std::remove(waiting_.begin(), waiting_.end(), &self), waiting_.end());
      return nullptr;
    }
  }

  std::mutex mutex_;
  std::vector<Waiter*> waiting_;
  std::vector<Open> open_;                // loops that want more help
  int64_t asked_ = 0;                     // threads that a pool was asked for and that have not begun
  int64_t late_ = 0;                      // threads that are not back from a loop that has ended
  Clock::time_point ended_ = Clock::now();  // the last loop
};

// `Pool` has num_threads() and Schedule(std::function<void()>). The caller claims items too and waits only for those that
// somebody running has claimed, so that a pool whose threads all wait in handlers cannot deadlock.
template <typename Pool>
class PoolExecutor final : public Executor {
 public:
  explicit PoolExecutor(Pool& pool) : pool_(pool) {}
  int64_t threads() const override { return std::max<int64_t>(1, pool_.num_threads()); }

  void For(int64_t n, const std::function<void(int64_t)>& f) override {
    const auto loop = std::make_shared<Loop>(n, f);
    for (int64_t more = lobby().Call(loop, std::min(n, threads()) - 1); more > 0; --more) {
      pool_.Schedule([ticket = std::make_shared<Ticket>()] { ticket->Use(); });
    }
    loop->Work();
    loop->Wait();
    lobby().End(loop);
    loop->Rethrow();
  }

 private:
  // A pool that ends may drop what was scheduled.
  class Ticket {
   public:
    void Use() {
      used_ = true;
      lobby().Serve();
    }
    ~Ticket() {
      if (!used_) lobby().Cancel();
    }

   private:
    bool used_ = false;
  };
  static Lobby& lobby() {
    static Lobby* const all = new Lobby;  // never destroyed: a thread may linger while the process ends
    return *all;
  }

  Pool& pool_;
};

}  // namespace sparseflax
