// One row per group of lanes. Bytes decide: a row that is 1 to 32 packs of 16 bytes is read once
// and kept in registers, any other is read twice, the second time from cache.
#include "squash.cuh"

#include "block.cuh"
#include "ops.cuh"

namespace mimnet_fast::cuda {
namespace {

constexpr int kThreads = 256;

struct SquashLaunch {
  View x, grad, out;
  Squash squash;
  int64_t rows;
  int width;  // D
  int lanes;  // per row, a power of two
};

MIMNET_FAST_DEVICE int64_t row_offset(const View& v, int64_t row) {
  int64_t offset = 0;
  for (int d = v.dims - 2; d >= 0; --d) {
    offset += row % v.size[d] * v.stride[d];
    row /= v.size[d];
  }
  return offset;
}

MIMNET_FAST_DEVICE float group_sum(float value, int lanes) {
  for (int mask = lanes / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

// The result is scale * grad + along * x; forward has no grad.
struct Result {
  float scale, along;
};

MIMNET_FAST_DEVICE Result result_of(const SquashLaunch& args, float norm2, float dot) {
  const SquashFactor<float> f = squash_factor(norm2, args.squash);
  if (!args.grad) return {0.0f, f.factor};
  return {f.factor, norm2 > 0.0f ? 2.0f * f.radial * (dot / norm2) : 0.0f};
}

MIMNET_FAST_KERNEL(kThreads, 4) squash_packed(SquashLaunch args) {
  const int64_t row = (block_index() * kThreads + thread_index()) / args.lanes;
  const int lane = thread_index() % args.lanes;
  const bool valid = row < args.rows;
  const int per_pack = 16 / int(element_size(args.x.dtype));
  float x[8] = {}, grad[8] = {};
  if (valid) {
    read_pack(args.x, row_offset(args.x, row) + lane * per_pack,
              [&](int n, float value) { x[n] = value; });
    if (args.grad) {
      read_pack(args.grad, row_offset(args.grad, row) + lane * per_pack,
                [&](int n, float value) { grad[n] = value; });
    }
  }
  float norm2 = 0, dot = 0;
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    norm2 += x[n] * x[n];
    dot += x[n] * grad[n];
  }
  norm2 = group_sum(norm2, args.lanes);
  dot = group_sum(dot, args.lanes);
  if (!valid) return;
  const Result result = result_of(args, norm2, dot);
  write_pack(args.out, row_offset(args.out, row) + lane * per_pack,
             [&](int n) { return result.scale * grad[n] + result.along * x[n]; });
}

MIMNET_FAST_KERNEL(kThreads, 4) squash_strided(SquashLaunch args) {
  const int64_t row = (block_index() * kThreads + thread_index()) / args.lanes;
  const int lane = thread_index() % args.lanes;
  const bool valid = row < args.rows;
  const int64_t from = valid ? row_offset(args.x, row) : 0;
  const int64_t grad_from = valid && args.grad ? row_offset(args.grad, row) : 0;
  const int64_t step = args.x.stride[args.x.dims - 1];
  const int64_t grad_step = args.grad ? args.grad.stride[args.grad.dims - 1] : 0;
  const int width = valid ? args.width : 0;
  float norm2 = 0, dot = 0;
  for (int d = lane; d < width; d += args.lanes) {
    const float x = read(args.x, from + d * step);
    norm2 += x * x;
    if (args.grad) dot += x * read(args.grad, grad_from + d * grad_step);
  }
  norm2 = group_sum(norm2, args.lanes);
  dot = group_sum(dot, args.lanes);
  if (!valid) return;
  const Result result = result_of(args, norm2, dot);
  const int64_t to = row_offset(args.out, row);
  for (int d = lane; d < width; d += args.lanes) {
    float value = result.along * read(args.x, from + d * step);
    if (args.grad) value += result.scale * read(args.grad, grad_from + d * grad_step);
    write(args.out, to + d, value);
  }
}

bool rows_are_aligned(const View& v, int per_pack) {
  if (!v) return true;
  bool whole = aligned(v, 0) && v.stride[v.dims - 1] == 1;
  for (int d = 0; d < v.dims - 1; ++d) whole = whole && v.stride[d] % per_pack == 0;
  return whole;
}

}  // namespace

void squash(const SquashArgs& call) {
  SquashLaunch args{call.x, call.grad, call.out, call.squash, 1, 0, 1};
  for (int d = 0; d < call.x.dims - 1; ++d) args.rows *= call.x.size[d];
  args.width = int(call.x.size[call.x.dims - 1]);
  const int per_pack = 16 / int(element_size(call.x.dtype));
  const int packs = args.width / per_pack;
  const bool packed = args.width % per_pack == 0 && packs <= kWarp && (packs & (packs - 1)) == 0 &&
                      rows_are_aligned(call.x, per_pack) && rows_are_aligned(call.grad, per_pack);
  const int wanted = packed ? packs : args.width;
  while (args.lanes < wanted && args.lanes < kWarp) args.lanes *= 2;
  const int64_t blocks = (args.rows * args.lanes + kThreads - 1) / kThreads;
  launch(packed ? squash_packed : squash_strided, blocks, kThreads, 0, call.execution.stream, args);
}

void squash_backward(const SquashArgs& call) { squash(call); }

}  // namespace mimnet_fast::cuda
