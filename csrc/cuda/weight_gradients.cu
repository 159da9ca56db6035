// A block makes one tile of one sum. Its threads form teams that cover the tile, 4 x 4 entries per
// thread; team t takes the rows t, t + teams, ... of what is staged in shared memory, and the teams
// are added in order at the end. Small sums get small tiles, so that many blocks share the work;
// sums over many rows are split into parts that a second kernel adds, again in order.
#include "weight_gradients.cuh"

#include <algorithm>

#include "block.cuh"

namespace mimnet_fast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMicro = 4;       // entries of a thread in each direction
constexpr int kStaged = 8192;   // floats of both operands in shared memory at a time
constexpr int kMostTasks = 20;  // keep the arguments of the kernel below 4 KB
constexpr int kSmallTile = 16, kLargeTile = 64;

struct Task {
  OuterSum sum;
  float* partial;  // [parts, m, n], or null: straight to sum.out
  int first_block;
  int tile, parts;
};

struct Addition {
  PartialSum sum;
  int first_block;
};

template <class T>
struct List {
  int count;
  T of[kMostTasks];
};

struct alignas(16) Quad {
  float x[kMicro];
};

MIMNET_FAST_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
MIMNET_FAST_INLINE int tiles_along(int size, int tile) { return (size + tile - 1) / tile; }

// The part of the list that a block works on, and the block's number within it.
template <class T>
MIMNET_FAST_DEVICE const T& own_part(const List<T>& list, int64_t& block) {
  int t = 0;
  while (t + 1 < list.count && block >= list.of[t + 1].first_block) ++t;
  block -= list.of[t].first_block;
  return list.of[t];
}

MIMNET_FAST_DEVICE void write_sum(const View& out, int64_t i, int j, float value) {
  write(out, out.dims == 2 ? i * out.stride[0] + j * out.stride[1] : j * out.stride[0], value);
}

MIMNET_FAST_DEVICE void stage(float* to, int to_stride, const float* from, int64_t from_stride,
                              int rows, int columns) {
  View v;
  v.data = const_cast<float*>(from);
  read_matrix(v, 0, rows, columns, from_stride, 1,
              [&](int r, int c, float value) { to[r * to_stride + c] = value; });
}

// Columns `first` and further of the right operand that is made of factors.
MIMNET_FAST_DEVICE void stage_products(float* to, int to_stride, const OuterSum& sum, int64_t row,
                                       int rows, int first, int columns) {
  for (int e = thread_index(); e < rows * columns; e += kThreads) {
    const int r = e / columns, c = e % columns;
    const int i = (first + c) / sum.width, j = (first + c) % sum.width;
    const float* factor = sum.factor + (row + r) * sum.terms * sum.factor_stride + i;
    const float* right = sum.right + (row + r) * sum.terms * sum.right_stride + j;
    float value = 0;
#pragma unroll 8
    for (int q = 0; q < sum.terms; ++q) {
      value += load(factor + q * sum.factor_stride) * load(right + q * sum.right_stride);
    }
    to[r * to_stride + c] = value;
  }
}

MIMNET_FAST_KERNEL(kThreads, 2) outer_sum_tiles(List<Task> tasks) {
  int64_t block = block_index();
  const Task& task = own_part(tasks, block);
  const OuterSum& sum = task.sum;
  const int part = int(block) % task.parts, tile = int(block) / task.parts;
  const int across = tiles_along(sum.n, task.tile);
  const int first_i = tile / across * task.tile, first_j = tile % across * task.tile;
  const int rows_i = int(least(task.tile, sum.m - first_i));
  const int rows_j = int(least(task.tile, sum.n - first_j));
  const int quads_i = tiles_along(rows_i, kMicro), quads_j = tiles_along(rows_j, kMicro);
  const int team_size = quads_i * quads_j, teams = kThreads / team_size;
  const int team = thread_index() / team_size, member = thread_index() % team_size;
  const int at_i = member / quads_j * kMicro, at_j = member % quads_j * kMicro;

  const int stride_i = quads_i * kMicro, stride_j = quads_j * kMicro;
  const int chunk = kStaged / (stride_i + stride_j);
  float* left = reinterpret_cast<float*>(shared_memory());
  float* right = left + chunk * stride_i;
  const int64_t begin = sum.rows * part / task.parts, end = sum.rows * (part + 1) / task.parts;
  float total[kMicro][kMicro] = {};
  for (int64_t row = begin; row < end; row += chunk) {
    const int rows = int(least(chunk, end - row));
    if (sum.left) {
      stage(left, stride_i, sum.left + row * sum.left_stride + first_i, sum.left_stride, rows,
            rows_i);
    } else {
      for (int r = thread_index(); r < rows; r += kThreads) left[r * stride_i] = 1;
    }
    if (sum.factor) {
      stage_products(right, stride_j, sum, row, rows, first_j, rows_j);
    } else {
      stage(right, stride_j, sum.right + row * sum.right_stride + first_j, sum.right_stride, rows,
            rows_j);
    }
    sync_block();
    if (team < teams) {
#pragma unroll 2
      for (int r = team; r < rows; r += teams) {
        const Quad a = *reinterpret_cast<const Quad*>(left + r * stride_i + at_i);
        const Quad b = *reinterpret_cast<const Quad*>(right + r * stride_j + at_j);
#pragma unroll
        for (int i = 0; i < kMicro; ++i) {
#pragma unroll
          for (int j = 0; j < kMicro; ++j) total[i][j] += a.x[i] * b.x[j];
        }
      }
    }
    sync_block();
  }

  float* totals = left;  // [teams, stride_i, stride_j]
  if (team < teams) {
#pragma unroll
    for (int i = 0; i < kMicro; ++i) {
      Quad row;
#pragma unroll
      for (int j = 0; j < kMicro; ++j) row.x[j] = total[i][j];
      *reinterpret_cast<Quad*>(totals + (team * stride_i + at_i + i) * stride_j + at_j) = row;
    }
  }
  sync_block();
  for (int e = thread_index(); e < rows_i * rows_j; e += kThreads) {
    const int i = e / rows_j, j = e % rows_j;
    float value = 0;
    for (int t = 0; t < teams; ++t) value += totals[(t * stride_i + i) * stride_j + j];
    if (task.partial) {
      store(task.partial + (int64_t(part) * sum.m + first_i + i) * sum.n + first_j + j, value);
    } else {
      write_sum(sum.out, first_i + i, first_j + j, value);
    }
  }
}

MIMNET_FAST_KERNEL(kThreads, 4) add_partial_sums(List<Addition> additions) {
  int64_t block = block_index();
  const PartialSum& sum = own_part(additions, block).sum;
  const int64_t e = block * kThreads + thread_index(), entries = sum.m * sum.n;
  if (e >= entries) return;
  float value = 0;
#pragma unroll 8
  for (int part = 0; part < sum.parts; ++part) value += load(sum.partial + part * entries + e);
  write_sum(sum.out, e / sum.n, int(e % sum.n), value);
}

// How a sum is cut. A tile stays with one block up to as many rows as take a few microseconds.
Task plan(const OuterSum& sum, int multiprocessors) {
  Task task{sum, nullptr, 0, 0, 1};
  const bool large = double(sum.rows) * sum.m * sum.n > double(1 << 24);
  task.tile = large ? kLargeTile : kSmallTile;
  const int64_t tiles = int64_t(tiles_along(sum.m, task.tile)) * tiles_along(sum.n, task.tile);
  const int64_t alone = large ? 128 : 1024;
  const int64_t wanted = (sum.rows + alone - 1) / alone;
  task.parts = int(std::max<int64_t>(1, least(wanted, 4 * multiprocessors / tiles)));
  return task;
}

void run(const Stream& stream, List<Task>& tasks) {
  int blocks = 0;
  int64_t partial = 0;
  for (int t = 0; t < tasks.count; ++t) {
    Task& task = tasks.of[t];
    task.first_block = blocks;
    blocks += tiles_along(task.sum.m, task.tile) * tiles_along(task.sum.n, task.tile) * task.parts;
    if (task.parts > 1) partial += int64_t(task.parts) * task.sum.m * task.sum.n;
  }
  float* memory =
      partial ? static_cast<float*>(stream.allocate(stream.owner, 4 * partial)) : nullptr;
  PartialSum shared[kMostTasks];
  int count = 0;
  for (int t = 0; t < tasks.count; ++t) {
    Task& task = tasks.of[t];
    if (task.parts == 1) continue;
    task.partial = memory;
    memory += int64_t(task.parts) * task.sum.m * task.sum.n;
    shared[count++] = {task.partial, task.parts, task.sum.m, task.sum.n, task.sum.out};
  }
  launch(outer_sum_tiles, blocks, kThreads, kStaged * 4, stream, tasks);
  add_parts(stream, shared, count);
}

}  // namespace

void outer_sums(const Stream& stream, const OuterSum* sums, int count) {
  const int multiprocessors = device_limits().multiprocessors;
  List<Task> tasks{};
  for (int s = 0; s < count; ++s) {
    if (sums[s].out) tasks.of[tasks.count++] = plan(sums[s], multiprocessors);
    if (tasks.count == kMostTasks || (s + 1 == count && tasks.count > 0)) {
      run(stream, tasks);
      tasks.count = 0;
    }
  }
}

void add_parts(const Stream& stream, const PartialSum* sums, int count) {
  List<Addition> additions{};
  int64_t blocks = 0;
  for (int s = 0; s < count; ++s) {
    additions.of[additions.count++] = {sums[s], int(blocks)};
    blocks += (sums[s].m * sums[s].n + kThreads - 1) / kThreads;
  }
  launch(add_partial_sums, blocks, kThreads, 0, stream, additions);
}

}  // namespace mimnet_fast::cuda
