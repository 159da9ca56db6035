// Memory of the kernels: scratch that a thread keeps between calls, and buffers of one call.
#pragma once

#include <cstdlib>
#include <new>
#include <utility>

#include "lanes.h"

namespace mimnet_fast::cpu::MIMNET_FAST_ISA {

inline void* aligned(size_t bytes) {
  void* memory = std::aligned_alloc(64, (bytes + 64) & ~size_t(63));
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

// The calling thread's scratch, cut into arrays of vectors. It grows to what was asked for at most
// and stays until the thread ends, so the loop over users allocates nothing.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t vectors) {
    const size_t bytes = size_t(vectors) * sizeof(Vec<T>);
    if (pool().bytes < bytes) {
      std::free(pool().memory);
      pool() = {};
      pool().memory = aligned(bytes);
      pool().bytes = bytes;
    }
    next_ = static_cast<Vec<T>*>(pool().memory);
  }

  // A part of a scratch, to be cut anew for every group.
  explicit Scratch(Vec<T>* part) : next_(part) {}

  Vec<T>* take(int64_t vectors) {
    Vec<T>* result = next_;
    next_ += vectors;
    return result;
  }

 private:
  struct Pool {
    void* memory = nullptr;
    size_t bytes = 0;
  };
  struct Owner : Pool {
    ~Owner() { std::free(this->memory); }
  };
  static Pool& pool() {
    static thread_local Owner owner;
    return owner;
  }

  Vec<T>* next_;
};

// The block that the buffers of one call are cut from. The calling thread keeps it, because fresh
// pages cost as much as the work on them; a call that does not fit takes the rest from the system
// and enlarges the block for the next one, up to a limit.
class CallMemory {
 public:
  static CallMemory& of_this_thread() {
    static thread_local CallMemory memory;
    return memory;
  }

  void* take(size_t bytes) {
    bytes = (bytes + 63) & ~size_t(63);
    ++live_;
    wanted_ += bytes;
    if (used_ + bytes <= capacity_) {
      used_ += bytes;
      return block_ + used_ - bytes;
    }
    return aligned(bytes);
  }

  void give_back(void* memory) {
    char* const p = static_cast<char*>(memory);
    if (p < block_ || p >= block_ + capacity_) std::free(memory);
    if (--live_ > 0) return;
    if (wanted_ > capacity_ && wanted_ <= kMost) {
      std::free(block_);
      block_ = static_cast<char*>(aligned(wanted_));
      capacity_ = wanted_;
    }
    used_ = wanted_ = 0;
  }

  ~CallMemory() { std::free(block_); }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t kMost = 0;  // every buffer an allocation of its own, with guarded ends
#else
  static constexpr size_t kMost = size_t(64) << 20;
#endif
  char* block_ = nullptr;
  size_t capacity_ = 0, used_ = 0, wanted_ = 0;
  int live_ = 0;
};

// An uninitialised array that lives as long as the call.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count) {
    if (count == 0) return;
    data_ = static_cast<T*>(CallMemory::of_this_thread().take(size_t(count) * sizeof(T)));
  }
  ~Buffer() {
    if (data_ != nullptr) CallMemory::of_this_thread().give_back(data_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  Buffer(Buffer&& other) : data_(std::exchange(other.data_, nullptr)) {}
  Buffer& operator=(Buffer&& other) {
    std::swap(data_, other.data_);
    return *this;
  }

  T* get() const { return data_; }

 private:
  T* data_ = nullptr;
};

// A parameter as a contiguous array of the compute type: the tensor's own memory where it already
// is one, else a converted copy.
template <class T>
class Parameter {
 public:
  Parameter() = default;
  explicit Parameter(const View& view) { reset(view); }

  void reset(const View& view) {
    if (!view) return;
    int64_t count = 1;
    bool contiguous = view.dtype == LaneTypes<T>::dtype;
    for (int d = view.dims - 1; d >= 0; --d) {
      contiguous = contiguous && (view.size[d] == 1 || view.stride[d] == count);
      count *= view.size[d];
    }
    if (contiguous) {
      data_ = static_cast<const T*>(view.data);
      return;
    }
    copy_ = Buffer<T>(count);
    data_ = copy_.get();
    T* out = copy_.get();
    with_storage(view.dtype, [&](auto storage) {
      using S = decltype(storage);
      const int last = view.dims - 1;
      const int64_t columns = view.size[last], stride = view.stride[last];
      int64_t index[kMaxDims] = {};
      for (int64_t n = 0; n < count; n += columns) {
        const S* in = static_cast<const S*>(view.data);
        for (int d = 0; d < last; ++d) in += index[d] * view.stride[d];
        for (int64_t j = 0; j < columns; ++j) out[n + j] = widen<T>(in[j * stride]);
        for (int d = last - 1; d >= 0 && ++index[d] == view.size[d]; --d) index[d] = 0;
      }
    });
  }

  const T* get() const { return data_; }

 private:
  const T* data_ = nullptr;
  Buffer<T> copy_;
};

// Width of a padded row of n values.
template <class T>
MIMNET_FAST_INLINE int64_t padded(int64_t n) {
  return (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

// How B users are cut: groups of kLanes users, blocks of up to kTileM groups. A block shares every
// load of a weight; small batches get smaller blocks so that all threads have one.
template <class T>
struct Blocks {
  static constexpr int64_t kMost = 4;  // groups in a block
  int64_t batch;
  int64_t groups;
  int64_t per_block;
  int64_t count;
  const int64_t* order;  // of the users; null: as they are

  Blocks(int64_t b, int64_t threads, const int64_t* o = nullptr) : batch(b), order(o) {
    groups = (b + kLanes<T> - 1) / kLanes<T>;
    per_block = (groups + threads - 1) / threads;
    if (per_block > kMost) per_block = kMost;
    if (per_block < 1) per_block = 1;
    count = (groups + per_block - 1) / per_block;
  }

  // The same with a multiple of so many groups in each block; 1, 2 or 4.
  Blocks in_multiples_of(int64_t some) const {
    Blocks result = *this;
    result.per_block = (per_block + some - 1) / some * some;
    result.count = (groups + result.per_block - 1) / result.per_block;
    return result;
  }

  // Groups in block i.
  int64_t size(int64_t i) const {
    const int64_t left = groups - i * per_block;
    return left < per_block ? left : per_block;
  }

  Group group(int64_t block, int64_t g) const {
    const int64_t first = (block * per_block + g) * kLanes<T>;
    const int64_t left = batch - first;
    return {first, left < kLanes<T> ? int(left) : kLanes<T>, order};
  }
};

}  // namespace mimnet_fast::cpu::MIMNET_FAST_ISA
