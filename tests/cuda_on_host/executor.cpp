#include "executor.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string_view>
#include <utility>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace mimnet_fast::cuda::host {

Position position;
Range recent;

namespace {

#if defined(__x86_64__)

struct Context {
  void** stack_pointer;

  void start(char* stack, size_t bytes, void (*entry)()) {
    void** end = reinterpret_cast<void**>(stack + bytes);
    stack_pointer = end - 8;  // six registers, where to go, and nowhere to return to
    std::fill(stack_pointer, end, nullptr);
    end[-2] = reinterpret_cast<void*>(entry);
  }
};

__attribute__((naked, noinline, noipa)) void switch_context(Context& /*from*/, Context& /*to*/) {
  asm(R"(
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq (%rsi), %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
  )");
}

#else

struct Context {
  ucontext_t state;

  void start(char* stack, size_t bytes, void (*entry)()) {
    getcontext(&state);
    state.uc_stack.ss_sp = stack;
    state.uc_stack.ss_size = bytes;
    makecontext(&state, entry, 0);
  }
};

void switch_context(Context& from, Context& to) { swapcontext(&from.state, &to.state); }

#endif

constexpr int kMaxThreads = 1024;
constexpr int64_t kMaxBlocks = INT32_MAX;
constexpr size_t kStack = 64 * 1024;
constexpr int kScheduler = -1;  // as position.thread: none runs
constexpr int kRedzone = 4096;
constexpr char kPoison = char(0xff);  // NaN in every floating type

enum class State { ready, at_barrier, at_warp, finished };

struct Fiber {
  Context context;
  State state;
  const char* operation;  // what it waits at
  Site site;
};

struct Warp {
  // A lane may bring its next operand before others have looked at the last ones.
  Operand operands[2][kLanes];
  int turn;
};

std::mutex one_launch;
const std::function<void()>* kernel;
Site launch_site;
bool descending;
std::vector<Range> ranges;  // disjoint and in order
Context scheduler;
Fiber fibers[kMaxThreads];
Warp warps[kMaxThreads / kLanes];
std::exception_ptr failure;
alignas(16) char shared[kRedzone + kSharedMemory + kRedzone];

// Above a page that traps.
char* stack_of(int thread) {
  static const size_t page = size_t(sysconf(_SC_PAGESIZE));
  static char* const stacks = [] {
    void* memory = mmap(nullptr, kMaxThreads * (page + kStack), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    char* first = static_cast<char*>(memory);
    for (int i = 0; i < kMaxThreads; ++i) mprotect(first + i * (page + kStack), page, PROT_NONE);
    return first;
  }();
  return stacks + thread * (page + kStack) + page;
}

std::string text(const Site& site) {
  const std::string_view file = site.file_name();
  return std::string(file.substr(file.rfind('/') + 1)) + ":" + std::to_string(site.line());
}

[[noreturn]] void fail(const std::string& what) {
  std::string where = "block " + std::to_string(position.block);
  if (position.thread != kScheduler) where += ", thread " + std::to_string(position.thread);
  throw std::runtime_error("mimnet_fast: " + what + ", in " + where + " of the launch at " +
                           text(launch_site) + " in " + launch_site.function_name());
}

int ordered(int i, int count) { return descending ? count - 1 - i : i; }

void pause(State state, const char* operation, const Site& site) {
  Fiber& fiber = fibers[position.thread];
  fiber.state = state;
  fiber.operation = operation;
  fiber.site = site;
  switch_context(fiber.context, scheduler);
}

void run_thread() {
  try {
    (*kernel)();
  } catch (...) {
    failure = std::current_exception();
  }
  pause(State::finished, "the end", launch_site);
}

void resume(int thread) {
  position.thread = thread;
  switch_context(scheduler, fibers[thread].context);
  position.thread = kScheduler;
  if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
}

bool same_place(const Fiber& a, const Fiber& b) {
  return a.state == b.state && a.site.line() == b.site.line() &&
         a.site.column() == b.site.column() &&
         std::strcmp(a.site.file_name(), b.site.file_name()) == 0;
}

// Lets threads go on that have met.
void release(Fiber* begin, Fiber* end) {
  if (!std::all_of(begin, end, [begin](const Fiber& f) { return same_place(f, *begin); })) {
    std::map<std::string, int> places;
    for (const Fiber* f = begin; f < end; ++f) {
      const bool finished = f->state == State::finished;
      ++places[f->operation + (finished ? "" : " (" + text(f->site) + ")")];
    }
    std::string what = "threads " + std::to_string(begin - fibers) + " to " +
                       std::to_string(end - fibers - 1) + " do not meet: ";
    for (const auto& [place, count] : places) {
      what += std::to_string(count) + " are at " + place + "; ";
    }
    fail(what.substr(0, what.size() - 2));
  }
  for (Fiber* f = begin; f < end; ++f) f->state = State::ready;
}

// Until every lane has finished or waits for the block.
void run_warp(int warp) {
  Fiber* const lanes = fibers + warp * kLanes;
  for (;;) {
    for (int i = 0; i < kLanes; ++i) {
      const int lane = ordered(i, kLanes);
      if (lanes[lane].state == State::ready) resume(warp * kLanes + lane);
    }
    if (std::none_of(lanes, lanes + kLanes,
                     [](const Fiber& f) { return f.state == State::at_warp; })) {
      return;
    }
    release(lanes, lanes + kLanes);
    warps[warp].turn ^= 1;
  }
}

void check_redzone(const char* zone, const char* what) {
  if (!std::all_of(zone, zone + kRedzone, [](char c) { return c == kPoison; })) fail(what);
}

void run_block() {
  std::memset(shared, kPoison, size_t(kRedzone + position.shared_bytes + kRedzone));
  Fiber* const end = fibers + position.threads;
  for (int t = 0; t < position.threads; ++t) {
    fibers[t].context.start(stack_of(t), kStack, run_thread);
    fibers[t].state = State::ready;
  }
  for (;;) {
    const int count = position.threads / kLanes;
    for (int i = 0; i < count; ++i) run_warp(ordered(i, count));
    if (std::all_of(fibers, end, [](const Fiber& f) { return f.state == State::finished; })) break;
    release(fibers, end);
  }
  check_redzone(shared, "a write before the start of shared memory");
  check_redzone(position.shared + position.shared_bytes, "a write past the end of shared memory");
}

std::vector<Range> merged(std::vector<Range> given) {
  std::sort(given.begin(), given.end(),
            [](const Range& a, const Range& b) { return a.begin < b.begin; });
  std::vector<Range> result;
  for (const Range& r : given) {
    if (result.empty() || r.begin >= result.back().end) {
      result.push_back(r);
    } else {
      result.back().end = std::max(result.back().end, r.end);
    }
  }
  return result;
}

}  // namespace

void launch(const std::function<void()>& function, int64_t blocks, int threads,
            int64_t shared_bytes, const Site& site) {
  const std::lock_guard lock(one_launch);
  launch_site = site;
  position = {0, blocks, kScheduler, threads, shared + kRedzone, shared_bytes};
  if (threads <= 0 || threads > kMaxThreads || threads % kLanes != 0) {
    fail(std::to_string(threads) + " threads per block");
  }
  if (blocks < 0 || blocks > kMaxBlocks) fail(std::to_string(blocks) + " blocks");
  if (shared_bytes < 0 || shared_bytes > kSharedMemory) {
    fail(std::to_string(shared_bytes) + " bytes of shared memory");
  }
  const char* order = std::getenv("MIMNET_FAST_HOST_ORDER");
  descending = order != nullptr && order == std::string_view("descending");
  kernel = &function;
  ranges = merged(global_memory());
  recent = {};
  for (int64_t i = 0; i < blocks; ++i) {
    position.block = descending ? blocks - 1 - i : i;
    run_block();
  }
}

void fail(const std::string& what, const Site& site) { fail(what + " (" + text(site) + ")"); }

void sync_block(const Site& site) { pause(State::at_barrier, "sync_block", site); }

const Operand* meet(const char* operation, const void* mine, size_t bytes, const Site& site) {
  Warp& warp = warps[position.thread / kLanes];
  Operand* operands = warp.operands[warp.turn];
  std::memcpy(operands[position.thread % kLanes].data(), mine, bytes);
  pause(State::at_warp, operation, site);
  return operands;
}

std::vector<Range>& global_memory() {
  thread_local std::vector<Range> memory;
  return memory;
}

void find_range(uintptr_t address, size_t bytes, size_t alignment, bool write, const Site& site) {
  const std::string access =
      (write ? "a store of " : "a load of ") + std::to_string(bytes) + " bytes ";
  if (address % alignment != 0) fail(access + "at an address that is not aligned", site);
  const auto next = std::upper_bound(ranges.begin(), ranges.end(), address,
                                     [](uintptr_t a, const Range& r) { return a < r.begin; });
  if (next == ranges.begin() || address + bytes > next[-1].end) {
    std::string where;
    if (next != ranges.begin()) {
      where = ", ends " + std::to_string(address + bytes - next[-1].end) + " bytes after a tensor";
    }
    if (next != ranges.end()) {
      where += ", starts " + std::to_string(next->begin - address) + " bytes before a tensor";
    }
    fail(access + "outside of every tensor and workspace" + where, site);
  }
  if (write && !next[-1].writable) fail(access + "to an input", site);
  recent = next[-1];
}

}  // namespace mimnet_fast::cuda::host
