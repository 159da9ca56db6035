// Small kernels that show what the executor does; `probe` runs one of them by name.
#include <intrinsics.cuh>

#include <exception>
#include <map>
#include <string>

namespace mimnet_fast::cuda {
namespace {

struct Probe {
  const char* in;
  char* out;
  template <class T>
  const T* input() const {
    return reinterpret_cast<const T*>(in);
  }
  template <class T>
  T* output() const {
    return reinterpret_cast<T*>(out);
  }
};

MIMNET_FAST_DEVICE int64_t thread_of_grid() {
  return block_index() * block_threads() + thread_index();
}
template <class T>
MIMNET_FAST_DEVICE T* shared() {
  return reinterpret_cast<T*>(shared_memory());
}

// What works

MIMNET_FAST_KERNEL(1024, 1) positions(Probe p) {
  int64_t* out = p.output<int64_t>() + 4 * thread_of_grid();
  store(out, block_index());
  store(out + 1, grid_blocks());
  store(out + 2, int64_t(thread_index()));
  store(out + 3, int64_t(block_threads()));
}

// Each thread gets what the opposite thread of the block read, several times over.
MIMNET_FAST_KERNEL(1024, 1) reverse(Probe p) {
  float value = load(p.input<float>() + thread_of_grid());
  for (int round = 0; round < 3; ++round) {
    shared<float>()[thread_index()] = value;
    sync_block();
    value = shared<float>()[block_threads() - 1 - thread_index()];
    sync_block();
  }
  store(p.output<float>() + thread_of_grid(), value);
}

MIMNET_FAST_KERNEL(1024, 1) reverse_without_barrier(Probe p) {
  shared<float>()[thread_index()] = load(p.input<float>() + thread_of_grid());
  store(p.output<float>() + thread_of_grid(),
        shared<float>()[block_threads() - 1 - thread_index()]);
}

MIMNET_FAST_KERNEL(32, 1) reverse_in_warp(Probe p) {
  shared<float>()[thread_index()] = load(p.input<float>() + thread_index());
  sync_warp();
  store(p.output<float>() + thread_index(), shared<float>()[kWarp - 1 - thread_index()]);
}

MIMNET_FAST_KERNEL(1024, 1) shuffles(Probe p) {
  const float value = load(p.input<float>() + thread_of_grid());
  float* out = p.output<float>() + 3 * thread_of_grid();
  store(out, shuffle(value, 5));
  store(out + 1, shuffle(value, thread_index() % kWarp + 1));
  store(out + 2, shuffle_xor(value, 5));
}

MIMNET_FAST_KERNEL(1024, 1) first_of_shared_memory(Probe p) {
  store(p.output<float>() + thread_of_grid(), shared<float>()[thread_index()]);
  shared<float>()[thread_index()] = 1;
}

template <class S>
MIMNET_FAST_KERNEL(32, 1)
round_trip(Probe p) {
  store(p.output<float>() + thread_of_grid(),
        widen(narrow<S>(load(p.input<float>() + thread_of_grid()))));
}

MIMNET_FAST_KERNEL(32, 1) round_trip_of_pairs(Probe p) {
  const float* in = p.input<float>() + 2 * thread_of_grid();
  float* out = p.output<float>() + 2 * thread_of_grid();
  const uint32_t pair = narrow_pair(load(in), load(in + 1));
  store(out, widen(BFloat16{uint16_t(pair)}));
  store(out + 1, widen(BFloat16{uint16_t(pair >> 16)}));
}

MIMNET_FAST_KERNEL(32, 1) copy_packs(Probe p) {
  store_pack(p.out + 16 * thread_index(), load_pack(p.in + 16 * thread_index()));
}

// Matrices: a[16,16] and b[16,8] follow one another in the input, c[16,8] is the output.

MIMNET_FAST_DEVICE void store_c(const Probe& p, const float (&c)[4]) {
  const int group = thread_index() / 4, member = thread_index() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = i < 2 ? group : group + 8, column = member * 2 + (i & 1);
    store(p.output<float>() + row * 8 + column, c[i]);
  }
}

MIMNET_FAST_KERNEL(32, 1) multiply_by_layout(Probe p) {
  const int group = thread_index() / 4, member = thread_index() % 4;
  const auto element = [&](int offset) { return uint32_t(load(p.input<uint16_t>() + offset)); };
  uint32_t a[4] = {}, b[2] = {};
  for (int i = 0; i < 8; ++i) {
    const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
    const int column = member * 2 + (i & 1) + (i < 4 ? 0 : 8);
    a[i / 2] |= element(row * 16 + column) << 16 * (i & 1);
  }
  for (int i = 0; i < 4; ++i) {
    const int row = member * 2 + (i & 1) + (i < 2 ? 0 : 8);
    b[i / 2] |= element(16 * 16 + row * 8 + group) << 16 * (i & 1);
  }
  float c[4] = {1, 1, 1, 1};
  multiply_add(c, a, b);
  store_c(p, c);
}

MIMNET_FAST_DEVICE uint16_t* load_input(const Probe& p, int count) {
  for (int i = thread_index(); i < count; i += block_threads()) {
    shared<uint16_t>()[i] = load(p.input<uint16_t>() + i);
  }
  sync_block();
  return shared<uint16_t>();
}

MIMNET_FAST_KERNEL(32, 1) multiply_loaded(Probe p) {
  const int lane = thread_index();
  const uint16_t* memory = load_input(p, 16 * 16 + 16 * 8);
  uint32_t a[4], b[4];
  load_matrices(a, memory + lane % 16 * 16 + lane / 16 * 8);
  load_matrices_transposed(b, memory + 16 * 16 + lane % 16 * 8);
  float c[4] = {1, 1, 1, 1};
  multiply_add(c, a, {b[0], b[1]});
  store_c(p, c);
}

// b one matrix at a time, transposed in registers.
MIMNET_FAST_KERNEL(32, 1) multiply_transposed(Probe p) {
  const int lane = thread_index();
  const uint16_t* memory = load_input(p, 16 * 16 + 16 * 8);
  uint32_t a[4], b[4];
  load_matrices(a, memory + lane % 16 * 16 + lane / 16 * 8);
  load_matrices(b, memory + 16 * 16 + lane % 16 * 8);
  float c[4] = {1, 1, 1, 1};
  multiply_add(c, a, {transpose_matrix(b[0]), transpose_matrix(b[1])});
  store_c(p, c);
}

// What is wrong

MIMNET_FAST_KERNEL(1024, 1) return_before_barrier(Probe) {
  if (thread_index() >= 40) return;
  sync_block();
}
MIMNET_FAST_KERNEL(1024, 1) wait_at_two_barriers(Probe) {
  if (thread_index() >= 32) {
    sync_block();
  } else {
    sync_block();
  }
}
MIMNET_FAST_KERNEL(1024, 1) shuffle_without_a_lane(Probe) {
  if (thread_index() != 37) shuffle(1.0f, 0);
}
MIMNET_FAST_KERNEL(1024, 1) shuffle_in_two_places(Probe) {
  if (thread_index() < 16) {
    shuffle(1.0f, 0);
  } else {
    shuffle(1.0f, 0);
  }
}
MIMNET_FAST_KERNEL(1024, 1) meet_warp_and_block(Probe) {
  if (thread_index() == 3) sync_block();
  sync_warp();
}
MIMNET_FAST_KERNEL(1024, 1) load_past_the_end(Probe p) { load(p.input<float>() + thread_index()); }
MIMNET_FAST_KERNEL(1024, 1) load_before_the_start(Probe p) { load(p.in - 1); }
MIMNET_FAST_KERNEL(1024, 1) load_across_the_end(Probe p) {
  load(reinterpret_cast<const int64_t*>(p.in + 8 * thread_index()));
}
MIMNET_FAST_KERNEL(1024, 1) store_past_the_end(Probe p) {
  store(p.output<float>() + thread_index(), 1.0f);
}
MIMNET_FAST_KERNEL(1024, 1) store_to_input(Probe p) { store(const_cast<char*>(p.in), char(1)); }
MIMNET_FAST_KERNEL(1024, 1) load_misaligned(Probe p) {
  load(reinterpret_cast<const float*>(p.in + 2));
}
MIMNET_FAST_KERNEL(1024, 1) load_pack_misaligned(Probe p) { load_pack(p.in + 8); }
MIMNET_FAST_KERNEL(1024, 1) store_pack_misaligned(Probe p) { store_pack(p.out + 8, Pack{}); }
MIMNET_FAST_KERNEL(1024, 1) write_before_shared_memory(Probe) { shared<char>()[-1] = 0; }
MIMNET_FAST_KERNEL(1024, 1) write_past_shared_memory(Probe) {
  shared<float>()[thread_index() + 1] = 0;
}
MIMNET_FAST_KERNEL(1024, 1) matrix_past_shared_memory(Probe) {
  uint32_t m[4];
  load_matrices(m, shared_memory() + 16 * thread_index());
}
MIMNET_FAST_KERNEL(1024, 1) matrix_misaligned(Probe) {
  uint32_t m[4];
  load_matrices_transposed(m, shared_memory() + 2);
}

#define KERNEL(name) {#name, name}
const std::map<std::string, void (*)(Probe)> kernels = {
    KERNEL(positions),
    KERNEL(reverse),
    KERNEL(reverse_without_barrier),
    KERNEL(reverse_in_warp),
    KERNEL(shuffles),
    KERNEL(first_of_shared_memory),
    {"round_trip_of_bfloat16", round_trip<BFloat16>},
    {"round_trip_of_float16", round_trip<Float16>},
    KERNEL(round_trip_of_pairs),
    KERNEL(copy_packs),
    KERNEL(multiply_by_layout),
    KERNEL(multiply_loaded),
    KERNEL(multiply_transposed),
    KERNEL(return_before_barrier),
    KERNEL(wait_at_two_barriers),
    KERNEL(shuffle_without_a_lane),
    KERNEL(shuffle_in_two_places),
    KERNEL(meet_warp_and_block),
    KERNEL(load_past_the_end),
    KERNEL(load_before_the_start),
    KERNEL(load_across_the_end),
    KERNEL(store_past_the_end),
    KERNEL(store_to_input),
    KERNEL(load_misaligned),
    KERNEL(load_pack_misaligned),
    KERNEL(store_pack_misaligned),
    KERNEL(write_before_shared_memory),
    KERNEL(write_past_shared_memory),
    KERNEL(matrix_past_shared_memory),
    KERNEL(matrix_misaligned),
};

}  // namespace
}  // namespace mimnet_fast::cuda

// Returns what was wrong; the kernel may read `in` and write `out`.
extern "C" __attribute__((visibility("default"))) const char* probe(
    const char* name, const char* in, int64_t in_bytes, char* out, int64_t out_bytes,
    int64_t blocks, int threads, int64_t shared_bytes) {
  using namespace mimnet_fast::cuda;
  static std::string problem;
  const auto range = [](const char* data, int64_t bytes, bool writable) {
    const auto begin = reinterpret_cast<uintptr_t>(data);
    return host::Range{begin, begin + uintptr_t(bytes), writable};
  };
  host::global_memory() = {range(in, in_bytes, false), range(out, out_bytes, true)};
  problem.clear();
  try {
    launch(kernels.at(name), blocks, threads, shared_bytes, {}, Probe{in, out});
  } catch (const std::exception& error) {
    problem = error.what();
  }
  return problem.c_str();
}
