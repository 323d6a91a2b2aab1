// Memory in which a tensor lies between pages whose access ends the process, at any distance from an aligned address.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace native {

// Where a tensor lies: right after the page that faults, right before the other one, or some values after the first.
struct Place {
  bool at_end = false;
  int64_t offset = 0;  // in values, from the start
  bool mixed = false;  // each of the tensors in another way

  // Of an operator's i-th argument.
  Place of(int64_t i) const { return mixed ? Place{(i + offset) % 3 == 0, (i * 7 + offset * 3) % 16, false} : *this; }
};

class Guarded {
 public:
  Guarded() = default;
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() { release(); }

  // Room for `count` values of `width` bytes, all of it filled with bytes that are a NaN in every floating-point dtype.
  void* allot(int64_t count, int64_t width, Place place) {
    const int64_t bytes = count * width, wanted = bytes + place.offset * width + kMargin;
    if (wanted > capacity_) reserve(wanted);
    data_ = place.at_end ? first_ + capacity_ - bytes : first_ + place.offset * width;
    bytes_ = bytes;
    before_ = data_ - first_ < kMargin ? data_ - first_ : kMargin;
    const int64_t left = first_ + capacity_ - (data_ + bytes);
    after_ = left < kMargin ? left : kMargin;
    std::memset(data_ - before_, kFill, before_ + bytes + after_);
    return data_;
  }

  void* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

  // Whether what lies between the values and the pages that fault is as it was.
  bool neighbours_unchanged() const {
    for (int64_t i = 1; i <= before_; ++i)
      if (static_cast<unsigned char>(data_[-i]) != kFill) return false;
    for (int64_t i = 0; i < after_; ++i)
      if (static_cast<unsigned char>(data_[bytes_ + i]) != kFill) return false;
    return true;
  }

 private:
  static constexpr int64_t kMargin = 256;
  static constexpr unsigned char kFill = 0xff;

  char *first_ = nullptr, *data_ = nullptr;
  int64_t capacity_ = 0, bytes_ = 0, before_ = 0, after_ = 0;

  static int64_t page() { return sysconf(_SC_PAGESIZE); }

  void release() {
    if (first_) munmap(first_ - page(), capacity_ + 2 * page());
    first_ = nullptr;
  }

  void reserve(int64_t bytes) {
    release();
    capacity_ = (bytes + page() - 1) / page() * page();
    void* start = mmap(nullptr, capacity_ + 2 * page(), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start != MAP_FAILED) first_ = static_cast<char*>(start) + page();
    if (start == MAP_FAILED || mprotect(first_, capacity_, PROT_READ | PROT_WRITE) != 0) {
      std::perror("no memory between guard pages");
      std::exit(2);
    }
  }
};

}  // namespace native
