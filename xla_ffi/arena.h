// Memory that grows and is kept.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sparseflax {

// 64-byte aligned, not initialized, lost when it grows; large blocks ask for huge pages, since what is walked by 4 KB pages misses
// the TLB.
class Arena {
 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena() { std::free(data_); }

  char* Get(size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      const size_t page = bytes >= (1u << 20) ? (2u << 20) : 4096;
      size_ = (bytes + page - 1) / page * page;
      data_ = static_cast<char*>(std::aligned_alloc(page, size_));
      if (data_ == nullptr) {
        size_ = 0;
        throw std::bad_alloc();
      }
#if defined(__linux__) && defined(MADV_HUGEPAGE)
      if (page > 4096) madvise(data_, size_, MADV_HUGEPAGE);
#endif
    }
    return data_;
  }

 private:
  char* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace sparseflax
