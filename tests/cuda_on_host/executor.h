// Runs the threads of a kernel launch on the host. Blocks run in turn; the threads of a block are
// fibers, each of which runs until it has to meet others. With MIMNET_FAST_HOST_ORDER=descending in
// the environment, blocks and threads run from the last to the first.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <source_location>
#include <string>
#include <vector>

namespace mimnet_fast::cuda::host {

using Site = std::source_location;

constexpr int kLanes = 32;
constexpr int kSharedMemory = 227 * 1024;  // bytes per block

// The running thread.
struct Position {
  int64_t block, blocks;
  int thread, threads;
  char* shared;
  int64_t shared_bytes;
};
extern Position position;

void launch(const std::function<void()>& kernel, int64_t blocks, int threads, int64_t shared_bytes,
            const Site& site);

// Ends the launch: throws out of it.
[[noreturn]] void fail(const std::string& what, const Site& site);

// Meetings of threads

void sync_block(const Site& site);

using Operand = std::array<char, 32>;

// Brings an operand to the other lanes of the warp and waits for them at the same operation;
// returns what each lane brought, until the second meeting from here.
const Operand* meet(const char* operation, const void* mine, size_t bytes, const Site& site);

// Global memory

struct Range {
  uintptr_t begin, end;
  bool writable;
};

// What the launches of the calling thread may touch.
std::vector<Range>& global_memory();

extern Range recent;  // of the last access

// Makes the range that holds the access the recent one, or fails.
void find_range(uintptr_t address, size_t bytes, size_t alignment, bool write, const Site& site);

template <class T>
void check_access(const T* address, bool write, const Site& site) {
  const auto begin = reinterpret_cast<uintptr_t>(address);
  const bool known = begin >= recent.begin && begin + sizeof(T) <= recent.end &&
                     (recent.writable || !write) && begin % alignof(T) == 0;
  if (!known) find_range(begin, sizeof(T), alignof(T), write, site);
}

}  // namespace mimnet_fast::cuda::host
