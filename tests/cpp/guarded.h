// Memory with an unreadable page directly before or after it: an access one element outside is a fault, not a wrong sum.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

enum class Flush { kFront, kBack };  // which end of the array touches its guard page

template <typename T>
class GuardedArray {
 public:
  // A copy of `data`; the kernel may not write to it.
  GuardedArray(const std::vector<T>& data, Flush flush) : GuardedArray(data.size(), flush) {
    if (size_ > 0) std::memcpy(at_, data.data(), size_ * sizeof(T));
    Protect(map_ + page_, bytes_ - 2 * page_, PROT_READ);
  }
  // Writable.
  GuardedArray(size_t size, Flush flush) : size_(size), page_(static_cast<size_t>(sysconf(_SC_PAGESIZE))) {
    const size_t inner = (size * sizeof(T) + page_ - 1) / page_ * page_;
    bytes_ = inner + 2 * page_;
    void* map = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED) std::abort();
    map_ = static_cast<char*>(map);
    Protect(map_, page_, PROT_NONE);
    Protect(map_ + page_ + inner, page_, PROT_NONE);
    at_ = reinterpret_cast<T*>(map_ + page_ + (flush == Flush::kFront ? 0 : inner - size * sizeof(T)));
  }
  ~GuardedArray() { munmap(map_, bytes_); }
  GuardedArray(const GuardedArray&) = delete;
  GuardedArray& operator=(const GuardedArray&) = delete;

  T* data() const { return at_; }
  size_t size() const { return size_; }

 private:
  static void Protect(char* from, size_t bytes, int how) {
    if (bytes > 0 && mprotect(from, bytes, how) != 0) std::abort();
  }
  size_t size_, page_, bytes_ = 0;
  char* map_ = nullptr;
  T* at_ = nullptr;
};

using Guarded = GuardedArray<float>;
