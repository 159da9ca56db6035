// A block serves 1, 4 or 16 users, so that a small batch still fills the device and a large one
// reads w2 seldom.
#include "interest_bridge.cuh"

#include "ops.cuh"

namespace mimnet_fast::cuda {
namespace {

constexpr int kThreads = 256;

// put(i, j, value) of some columns of some rows
template <class Put>
MIMNET_FAST_DEVICE void read_rows(const View& v, int64_t first, int rows, int first_column,
                                  int columns, Put put) {
  const int64_t offset = row_offset(v, first) + first_column * v.stride[2];
  if (evenly_spaced(v)) {
    return read_matrix(v, offset, rows, columns, spacing(v), v.stride[2], put);
  }
  for (int e = thread_index(); e < rows * columns; e += block_threads()) {
    const int i = e / columns, j = first_column + e % columns;
    put(i, e % columns, read(v, row_offset(v, first + i) + j * v.stride[2]));
  }
}

template <int D, int U>
struct Layout {
  BridgeBlock<D, U> bridge;
  Tile interests;  // [(U, K), D_i]

  MIMNET_FAST_INLINE Layout(Arena& arena, const BridgeLaunch& args)
      : bridge(arena, args.weights, args.per_user, args.source.size[2], bool(args.grad)),
        interests(arena.tile(U * args.per_user, int(args.weights.w1.size[1]))) {}
};

// The users of this block.
template <int U>
struct Users {
  int64_t first;
  int count;
  explicit MIMNET_FAST_DEVICE Users(const BridgeLaunch& args) : first(block_index() * U) {
    count = args.users - first < U ? int(args.users - first) : U;
  }
};

template <int D, int U>
MIMNET_FAST_DEVICE void load_users(const BridgeLaunch& args, const Users<U>& users,
                                   const Layout<D, U>& memory) {
  const int64_t first_row = users.first * args.per_user;
  read_rows(args.source, users.first, users.count, 0, int(args.source.size[2]),
            [&](int u, int s, float value) {
              memory.bridge.source[s * U + u] = value;
              save(args.rows.source, users.first + u, s, value);
            });
  read_rows(args.interests, first_row, users.count * args.per_user, 0, int(args.interests.size[2]),
            [&](int r, int i, float value) {
              memory.interests(r, i) = value;
              save(args.rows.interests, first_row + r, i, value);
            });
}

template <int D, int U>
MIMNET_FAST_KERNEL(kThreads, 2)
bridge_forward(BridgeLaunch args) {
  Arena arena(shared_memory());
  const Layout<D, U> memory(arena, args);
  const BridgeBlock<D, U>& bridge = memory.bridge;
  const Users<U> users(args);
  const int d_target = int(args.out.size[2]);
  load_users(args, users, memory);
  bridge.make_hidden(users.count, memory.interests);
  for (int first = 0; first < d_target; first += bridge.panel_size(first)) {
    if (first > 0) sync_block();
    bridge.contract(first);
    sync_block();
    bridge.make_output(users.count, first, [&](int u, int k, int t, float value) {
      const int64_t row = (users.first + u) * args.per_user + k;
      write(args.out, row * d_target + t, value);
    });
  }
}

template <int D, int U>
MIMNET_FAST_KERNEL(kThreads, 2)
bridge_backward(BridgeLaunch args) {
  Arena arena(shared_memory());
  const Layout<D, U> memory(arena, args);
  const BridgeBlock<D, U>& bridge = memory.bridge;
  const Users<U> users(args);
  const int d_target = int(args.grad.size[2]), hidden = int(args.weights.w1.size[0]);
  const int64_t first_row = users.first * args.per_user;
  const int rows = users.count * args.per_user;
  load_users(args, users, memory);
  bridge.make_hidden(users.count, memory.interests);
  for (int first = 0; first < d_target; first += bridge.panel_size(first)) {
    if (first > 0) sync_block();
    read_rows(args.grad, first_row, rows, first, bridge.panel_size(first),
              [&](int r, int t, float value) {
                bridge.grad(r, t) = value;
                save(args.rows.grad, first_row + r, first + t, value);
              });
    bridge.contract(first);
    sync_block();
    bridge.add_hidden_grad(users.count, first);
    if (!args.grad_source) continue;
    sync_block();
    bridge.make_contracted_grad(users.count, first);
    sync_block();
    bridge.add_source_grad(first);
  }
  sync_block();
  bridge.mask_hidden_grad(users.count);
  sync_block();
  if (args.rows.hidden.data) {
    for (int e = thread_index(); e < rows * (hidden + 1); e += kThreads) {
      const int r = e / (hidden + 1), h = e % (hidden + 1);
      save(args.rows.hidden, first_row + r, h, bridge.hidden(r, h));
      if (h < hidden) save(args.rows.hidden_grad, first_row + r, h, bridge.hidden_grad(r, h));
    }
  }
  if (args.grad_source) {
    const int d_source = int(args.source.size[2]);
    for (int e = thread_index(); e < users.count * d_source; e += kThreads) {
      write(args.grad_source, users.first * d_source + e,
            bridge.source_grad[e % d_source * U + e / d_source]);
    }
  }
  if (args.grad_interests) {
    const int d_interest = int(args.interests.size[2]);
    bridge.make_interests_grad(users.count, [&](int r, int i, float value) {
      write(args.grad_interests, (first_row + r) * d_interest + i, value);
    });
  }
}

template <int D, int U>
bool launch_blocks(const BridgeLaunch& args, const Stream& stream, const DeviceLimits& limits) {
  Arena arena(nullptr);
  Layout<D, U>(arena, args);
  if (arena.bytes() > limits.shared_memory) return false;
  launch(args.grad ? bridge_backward<D, U> : bridge_forward<D, U>, (args.users + U - 1) / U,
         kThreads, arena.bytes(), stream, args);
  return true;
}

template <int D>
void launch_bridge(const BridgeLaunch& args, const Stream& stream) {
  const DeviceLimits limits = device_limits();
  const int64_t share = args.users / limits.multiprocessors;
  if (share >= 16 && launch_blocks<D, 16>(args, stream, limits)) return;
  if (share >= 2 && launch_blocks<D, 4>(args, stream, limits)) return;
  if (launch_blocks<D, 1>(args, stream, limits)) return;
  throw std::runtime_error(
      "mimnet_fast: interest_bridge with K = " + std::to_string(args.per_user) +
      ", H = " + std::to_string(args.weights.w1.size[0]) +
      ", D_i = " + std::to_string(args.interests.size[2]) +
      ", D_s = " + std::to_string(args.source.size[2]) + " needs more shared memory than the " +
      std::to_string(limits.shared_memory) + " bytes of a block on this device");
}

BridgeLaunch arguments(const BridgeArgs& call) {
  BridgeLaunch args{};
  args.interests = call.interests;
  args.source = call.source;
  args.out = call.out;
  args.grad = call.grad;
  args.grad_interests = call.grad_interests;
  args.grad_source = call.grad_source;
  args.weights = {call.w1, call.b1, call.w2, call.b2};
  const bool own_source = call.source.dims == 3;  // every interest counts as a user
  args.per_user = own_source ? 1 : int(call.interests.size[1]);
  args.users = call.interests.size[0] * (own_source ? call.interests.size[1] : 1);
  if (!own_source) {
    args.source.size[2] = call.source.size[1];
    args.source.stride[2] = call.source.stride[1];
    args.source.size[1] = 1;
    args.source.stride[1] = 0;
  }
  return args;
}

void run(const BridgeLaunch& args, const Stream& stream) {
  const auto is_10 = [](const View& v) { return v.size[2] == 10; };
  const bool paper =
      is_10(args.interests) && is_10(args.source) && is_10(args.grad ? args.grad : args.out);
  paper ? launch_bridge<10>(args, stream) : launch_bridge<0>(args, stream);
}

// Memory for rows that kernels write. Wide rows start where sixteen bytes can be read.
Rows new_rows(const Stream& stream, int64_t rows, int64_t columns) {
  const int64_t stride = columns > 16 ? (columns + 3) / 4 * 4 : columns;
  return {static_cast<float*>(stream.allocate(stream.owner, 4 * rows * stride)), stride};
}

// Rows of an input: its own memory where that holds them already, else new memory, which is also
// left in `written`.
Rows rows_of(const View& v, const Stream& stream, Rows& written) {
  if (v.dtype == DType::float32 && v.stride[2] == 1 && evenly_spaced(v)) {
    return {static_cast<float*>(v.data), spacing(v)};
  }
  return written = new_rows(stream, v.size[0] * v.size[1], v.size[2]);
}

}  // namespace

void bridge_sums(OuterSum (&sums)[kBridgeSums], const BridgeRows& rows,
                 const BridgeWeights& gradients, const BridgeWeights& weights, int64_t users,
                 int interests, int64_t d_source) {
  const int64_t count = users * interests;
  const int hidden = int(weights.w1.size[0]), d_interest = int(weights.w1.size[1]);
  const int d_target = int(weights.b2.size[0] / d_source);
  sums[0] = {rows.hidden_grad.data,
             rows.interests.data,
             rows.hidden_grad.stride,
             rows.interests.stride,
             count,
             hidden,
             d_interest,
             gradients.w1};
  sums[1] = {nullptr, rows.hidden_grad.data, 0, rows.hidden_grad.stride, count, 1,
             hidden,  gradients.b1};
  // w2 as [D_s, (D_t, H)] and b2 as [D_s, D_t]: the source times sums over a user's interests.
  const auto transfer = [&](const float* right, int width, View out) {
    out.dims = 2;
    out.stride[0] = int64_t(d_target) * width;
    out.stride[1] = 1;
    return OuterSum{
        rows.source.data, right, rows.source.stride, rows.hidden.stride, users,     int(d_source),
        d_target * width, out,   rows.grad.data,     rows.grad.stride,   interests, width};
  };
  sums[2] = transfer(rows.hidden.data, hidden, gradients.w2);
  sums[3] = transfer(rows.hidden.data + hidden, 1, gradients.b2);
}

void interest_bridge(const BridgeArgs& call) {
  const BridgeLaunch args = arguments(call);
  tensor_cores_serve(args) ? tensor_bridge(args, call.execution.stream)
                           : run(args, call.execution.stream);
}

void interest_bridge_backward(const BridgeArgs& call) {
  const Stream& stream = call.execution.stream;
  BridgeLaunch args = arguments(call);
  BridgeWeights gradients{call.grad_w1, call.grad_b1, call.grad_w2, call.grad_b2};
  const int64_t count = args.users * args.per_user, hidden = call.w1.size[0];
  BridgeRows rows;
  rows.source = rows_of(args.source, stream, args.rows.source);
  rows.interests = rows_of(args.interests, stream, args.rows.interests);
  rows.grad = rows_of(args.grad, stream, args.rows.grad);
  rows.hidden = args.rows.hidden = new_rows(stream, count, hidden + 1);
  rows.hidden_grad = args.rows.hidden_grad = new_rows(stream, count, hidden);
  if (tensor_cores_serve(args)) {
    tensor_bridge_backward(args, rows, gradients.w2, stream);
    gradients.w2 = {};
  } else {
    run(args, stream);
  }
  OuterSum sums[kBridgeSums];
  bridge_sums(sums, rows, gradients, args.weights, args.users, args.per_user, args.source.size[2]);
  outer_sums(stream, sums, kBridgeSums);
}

}  // namespace mimnet_fast::cuda
