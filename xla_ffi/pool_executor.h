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
#include <vector>

#include "sparse_conv.h"

namespace sparseflax {

using Clock = std::chrono::steady_clock;

// How long a thread stays awake for the next loop, or for the end of its own. To wake one that sleeps takes 10 us on bare
// metal, and on a virtual machine 45 us, of which its caller pays 15: as much as a small convolution. Convolutions of one
// network follow each other faster than this.
constexpr auto kLinger = std::chrono::microseconds(100);

inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// True as soon as `ready` is, false once `end` has passed.
template <typename Ready>
bool AwakeUntil(Clock::time_point end, const Ready& ready) {
  for (;;) {
    for (int i = 0; i < 32; ++i) {
      if (ready()) return true;
      Pause();
    }
    if (Clock::now() >= end) return ready();
  }
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
    ended_.store(Clock::now().time_since_epoch().count(), std::memory_order_relaxed);
    std::lock_guard<std::mutex> lock(mutex_);
    if (error_) std::rethrow_exception(error_);
  }

  // When a thread that came for this loop stops hoping for the next.
  Clock::time_point Hope() const {
    const Clock::rep ended = ended_.load(std::memory_order_relaxed);
    return (ended == 0 ? Clock::now() : Clock::time_point(Clock::duration(ended))) + kLinger;
  }

 private:
  const int64_t n_;
  const std::function<void(int64_t)>* const f_;
  std::atomic<int64_t> next_{0}, done_{0};
  std::atomic<Clock::rep> ended_{0};
  std::mutex mutex_;
  std::condition_variable all_done_;
  std::exception_ptr error_;
};

// Threads that have worked on a loop and are still awake.
class Lobby {
 public:
  // Works on `loop`, then on what it is called to, until nobody has called for a while.
  void Serve(std::shared_ptr<Loop> loop) {
    while (loop != nullptr) {
      loop->Work();
      loop = Next(loop->Hope());
    }
  }

  // Gives `loop` to at most `wanted` threads; returns to how many.
  int64_t Call(const std::shared_ptr<Loop>& loop, int64_t wanted) {
    std::lock_guard<std::mutex> lock(mutex_);
    int64_t called = 0;
    for (; called < wanted && !waiting_.empty(); ++called) {
      Waiter* const waiter = waiting_.back();
      waiting_.pop_back();
      waiter->loop = loop;
      waiter->called.store(true, std::memory_order_release);
    }
    return called;
  }

 private:
  struct Waiter {
    std::shared_ptr<Loop> loop;
    std::atomic<bool> called{false};
  };

  std::shared_ptr<Loop> Next(Clock::time_point end) {
    if (Clock::now() >= end) return nullptr;
    Waiter self;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      waiting_.push_back(&self);
    }
    if (!AwakeUntil(end, [&] { return self.called.load(std::memory_order_acquire); })) {
      std::lock_guard<std::mutex> lock(mutex_);
      waiting_.erase(std::remove(waiting_.begin(), waiting_.end(), &self), waiting_.end());
      // Whoever called in between has taken it off the list, under the lock.
    }
    return std::move(self.loop);
  }

  std::mutex mutex_;
  std::vector<Waiter*> waiting_;
};

// `Pool` has num_threads() and Schedule(std::function<void()>). The caller claims items too and waits only for those that
// somebody running has claimed, so that a pool whose threads all wait in handlers cannot deadlock.
template <typename Pool>
class PoolExecutor final : public Executor {
 public:
  explicit PoolExecutor(Pool& pool) : pool_(pool) {}
  int64_t threads() const override { return std::max<int64_t>(1, pool_.num_threads()); }

  void For(int64_t n, const std::function<void(int64_t)>& f) override {
    static Lobby* const lobby = new Lobby;  // never destroyed: a thread may linger while the process ends
    const auto loop = std::make_shared<Loop>(n, f);
    const int64_t wanted = std::min(n, threads()) - 1;
    for (int64_t called = lobby->Call(loop, wanted); called < wanted; ++called) {
      pool_.Schedule([loop] { lobby->Serve(loop); });
    }
    loop->Work();
    loop->Wait();
  }

 private:
  Pool& pool_;
};

}  // namespace sparseflax
