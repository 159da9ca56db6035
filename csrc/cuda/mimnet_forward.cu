// Narrow models, D <= 16: one kernel takes a few users through all stages, with everything between
// the history and the rating in shared memory. So does its backward, which leaves rows for one
// launch that makes the gradients of all parameters. Time at these sizes is launches, not
// arithmetic.
//
// Wide models: the stages are the kernels of the other ops, which have tensor cores and tiles of
// their own, with float32 tensors between them.
#include <algorithm>
#include <initializer_list>

#include "dynamic_routing.cuh"
#include "interest_bridge.cuh"
#include "multi_granularity_attention.cuh"
#include "ops.cuh"

namespace mimnet_fast::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kNarrow = 16;

struct MIMNetLaunch {
  RoutingPlan routing;
  BridgeWeights bridge;
  AttentionPlan attention;
  GatePlan gate;
  View history, table, source, item, pooled, transferred, ratings;
  View grad, grad_history, grad_source, grad_item, grad_prototype;
  // Backward: rows for the gradients of the parameters, besides those of the attention's plan.
  BridgeRows rows;
  float* pooled_rows;   // [B*K, D]: a copy of pooled; or null
  float* capsule_rows;  // [B*K, D]
  float* gate_rows;     // [B]
  float* coupling;      // [B*K, L], for the gradient of the history
};

MIMNET_FAST_DEVICE float not_a_number() { return bits_as_float(0x7fc00000u); }

// A row of a tile is a user and a capsule.
template <int D, int U>
struct Narrow {
  RoutingState routing;
  BridgeBlock<D, U> bridge;
  AttentionState attention;  // its keys are the transferred interests
  Tile user;                 // user x D
  // Backward only
  Tile interests;
  Tile interests_grad;  // first of those transferred

  MIMNET_FAST_INLINE Narrow(const MIMNetLaunch& args, Arena& arena, bool backward)
      : routing(args.routing, arena),
        bridge(arena, args.bridge, args.routing.capsules, args.routing.d, backward),
        attention(args.attention, arena, backward) {
    const int rows = U * args.routing.capsules, d = args.routing.d;
    user = arena.tile(U, d);
    if (!backward) return;
    interests = arena.tile(rows, d);
    interests_grad = arena.tile(rows, d);
  }
};

// Elements of the first dimension of a [B, D].
template <class Put>
MIMNET_FAST_DEVICE void read_users(const View& v, int64_t first, int users, int d, Put put) {
  read_matrix(v, first * v.stride[0], users, d, v.stride[0], v.stride[1], put);
}

// Histories of users, by id from the table where there is one. An id that is no row of it makes the
// user's numbers NaN: raising an error would stall the stream.
MIMNET_FAST_DEVICE void load_history(const MIMNetLaunch& args, const Tile& inputs, int64_t first,
                                     int users, int start, int count) {
  const RoutingPlan& p = args.routing;
  const View &history = args.history, &table = args.table;
  if (!table) {
    for (int u = 0; u < users; ++u) {
      read_matrix(history, (first + u) * history.stride[0] + start * history.stride[1], count,
                  p.d_in, history.stride[1], history.stride[2],
                  [&](int l, int d, float value) { inputs(u * p.positions + l, d) = value; });
    }
    return;
  }
  for (int t = thread_index(); t < users * count * p.d_in; t += block_threads()) {
    const int d = t % p.d_in, l = t / p.d_in % count, u = t / p.d_in / count;
    const int64_t id =
        read_integer(history, (first + u) * history.stride[0] + (start + l) * history.stride[1]);
    const bool known = id >= 0 && id < table.size[0];
    inputs(u * p.positions + l, d) =
        known ? read(table, id * table.stride[0] + d * table.stride[1]) : not_a_number();
  }
}

MIMNET_FAST_DEVICE int users_of_block(const MIMNetLaunch& args, int64_t first) {
  const int64_t left = args.attention.batch - first;
  return left < args.routing.users ? int(left) : args.routing.users;
}

template <int D, int U>
MIMNET_FAST_DEVICE void load_source(const MIMNetLaunch& args, const BridgeBlock<D, U>& bridge,
                                    int64_t first, int users) {
  read_users(args.source, first, users, args.routing.d, [&](int u, int s, float value) {
    bridge.source[s * U + u] = value;
    save(args.rows.source, first + u, s, value);
  });
}

template <int D, int U>
MIMNET_FAST_KERNEL(kThreads, 3)
mimnet_narrow_forward(MIMNET_FAST_ARGUMENTS MIMNetLaunch args) {
  const RoutingPlan& p = args.routing;
  const AttentionPlan& a = args.attention;
  Arena arena(shared_memory());
  const Narrow<D, U> n(args, arena, false);
  const RoutingState& s = n.routing;
  const int64_t first = block_index() * U, first_row = first * p.capsules;
  const int users = users_of_block(args, first), rows = users * p.capsules;
  const AttentionTile tile = attention_tile(a, block_index(), 0);
  load_routing_weight(p, s.weight);
  stage_weights(a, n.attention);
  load_queries(a, n.attention, tile);
  load_source(args, n.bridge, first, users);
  route<D>(
      p, s, first, users,
      [&](int start, int count) { load_history(args, s.inputs, first, users, start, count); },
      [](int, int) {});
  squash_factors(p, rows, s.capsules, true, s.factor);
  for (int t = thread_index(); t < rows * p.d; t += block_threads()) {
    write(args.pooled, first_row * p.d + t, s.pooled(t / p.d, t % p.d));
  }
  sync_block();
  for (int t = thread_index(); t < rows * p.d; t += block_threads()) {
    s.capsules(t / p.d, t % p.d) *= s.factor[t / p.d];
  }

  n.bridge.make_hidden(users, s.capsules);
  for (int t = 0; t < p.d; t += n.bridge.panel_size(t)) {
    if (t > 0) sync_block();
    n.bridge.contract(t);
    sync_block();
    n.bridge.make_output(users, t, [&](int u, int k, int column, float value) {
      const int row = u * p.capsules + k;
      n.attention.keys(row, column) = value;
      write(args.transferred, (first_row + row) * p.d + column, value);
    });
  }
  sync_block();

  open_gate<D, false>(a, args.gate, n.attention, tile, [](int, float) {});
  fold_queries<D, 0>(a, n.attention, tile);
  sync_block();
  attend_forward<D, 0>(a, n.attention, tile);
  sync_block();
  project_pooled<D, 0>(a, n.attention, tile,
                       [&](int u, int d, float value) { n.user(u, d) = value; });
  sync_block();
  for (int u = thread_index(); u < users; u += block_threads()) {
    const int64_t item = (first + u) * args.item.stride[0];
    float rating = 0;
    for (int d = 0; d < p.d; ++d) {
      rating += n.user(u, d) * read(args.item, item + d * args.item.stride[1]);
    }
    write(args.ratings, first + u, rating);
  }
}

template <int D, int U>
MIMNET_FAST_KERNEL(kThreads, 3)
mimnet_narrow_backward(MIMNET_FAST_ARGUMENTS MIMNetLaunch args) {
  const RoutingPlan& p = args.routing;
  const AttentionPlan& a = args.attention;
  Arena arena(shared_memory());
  const Narrow<D, U> n(args, arena, true);
  const RoutingState& s = n.routing;
  const int64_t first = block_index() * U, first_row = first * p.capsules;
  const int users = users_of_block(args, first), rows = users * p.capsules;
  const AttentionTile tile = attention_tile(a, block_index(), 0);
  const auto each_element = [&](auto body) {
    for (int t = thread_index(); t < rows * p.d; t += block_threads()) body(t / p.d, t % p.d);
  };
  const auto rating_grad = [&](int u) {
    return read(args.grad, (first + u) * args.grad.stride[0]);
  };
  load_routing_weight(p, s.weight);
  stage_weights(a, n.attention);
  stage_keys(a, n.attention, tile);
  load_queries(a, n.attention, tile);
  load_source(args, n.bridge, first, users);
  read_users(args.item, first, users, p.d, [&](int u, int d, float value) {
    const float grad = rating_grad(u) * value;
    n.attention.grad(u, d) = grad;
    store(a.rows.grad + (first + u) * p.d + d, grad);
  });
  if (args.grad_history) {  // which alone needs the couplings
    route<D>(
        p, s, first, users,
        [&](int start, int count) { load_history(args, s.inputs, first, users, start, count); },
        [&](int start, int count) {
          for (int t = thread_index(); t < rows * count; t += block_threads()) {
            store(args.coupling + (first_row + t / count) * p.length + start + t % count,
                  s.coupling(t / count, t % count));
          }
        });
  }
  each_element([&](int row, int d) {
    const View& pooled = args.pooled;
    const float value =
        read(pooled, (first + row / p.capsules) * pooled.stride[0] +
                         row % p.capsules * pooled.stride[1] + d * pooled.stride[2]);
    s.pooled(row, d) = value;
    if (args.pooled_rows) store(args.pooled_rows + (first_row + row) * p.d + d, value);
  });
  sync_block();

  times_weight<D>(p, s.weight, rows, s.pooled,
                  [&](int row, int j, float sum) { s.capsules(row, j) = sum; });
  open_gate<D, true>(a, args.gate, n.attention, tile, [](int, float) {});
  fold_queries<D, 0>(a, n.attention, tile);
  project_grad<D, 0>(a, n.attention, tile);
  sync_block();
  squash_factors(p, rows, s.capsules, true, s.factor);
  attend_backward<D, 0>(a, n.attention, tile);
  sync_block();
  save_shares(a, n.attention, tile);
  for (int u = thread_index(); u < users; u += block_threads()) {
    store(args.gate_rows + first + u, gate_gradient(n.attention, users, u));
  }
  interests_gradient<D>(a, n.attention, tile, [&](int u, int k, int d, float value) {
    const int row = u * p.capsules + k;
    n.interests_grad(row, d) = value;
    save(args.rows.grad, first_row + row, d, value);
  });
  each_element([&](int row, int d) {
    n.interests(row, d) = s.factor[row] * s.capsules(row, d);
    save(args.rows.interests, first_row + row, d, n.interests(row, d));
  });
  if (args.grad_item) {
    project_pooled<D, 0>(a, n.attention, tile,
                         [&](int u, int d, float value) { n.user(u, d) = value; });
  }

  n.bridge.make_hidden(users, n.interests);
  for (int t = 0; t < p.d; t += n.bridge.panel_size(t)) {
    if (t > 0) sync_block();
    const int columns = n.bridge.panel_size(t);
    for (int e = thread_index(); e < rows * columns; e += block_threads()) {
      n.bridge.grad(e / columns, e % columns) = n.interests_grad(e / columns, t + e % columns);
    }
    n.bridge.contract(t);
    sync_block();
    n.bridge.add_hidden_grad(users, t);
    if (!args.grad_source) continue;
    sync_block();
    n.bridge.make_contracted_grad(users, t);
    sync_block();
    n.bridge.add_source_grad(t);
  }
  sync_block();
  n.bridge.mask_hidden_grad(users);
  sync_block();
  const int hidden = int(args.bridge.w1.size[0]);
  for (int e = thread_index(); e < rows * (hidden + 1); e += block_threads()) {
    const int r = e / (hidden + 1), h = e % (hidden + 1);
    save(args.rows.hidden, first_row + r, h, n.bridge.hidden(r, h));
    if (h < hidden) save(args.rows.hidden_grad, first_row + r, h, n.bridge.hidden_grad(r, h));
  }
  n.bridge.make_interests_grad(users,
                               [&](int r, int i, float value) { n.interests_grad(r, i) = value; });
  sync_block();
  squash_backward(p, rows, s.capsules, n.interests_grad);
  sync_block();
  each_element([&](int row, int d) {
    store(args.capsule_rows + (first_row + row) * p.d + d, n.interests_grad(row, d));
  });

  // Embeddings
  for (int t = thread_index(); args.grad_source && t < users * p.d; t += block_threads()) {
    write(args.grad_source, first * p.d + t, n.bridge.source_grad[t % p.d * U + t / p.d]);
  }
  if (args.grad_item || args.grad_prototype) {
    queries_gradient<D, 0>(a, args.gate, n.attention, tile,
                           [&](int head, int u, int d, float value) {
                             const View& to = head == 0 ? args.grad_item : args.grad_prototype;
                             if (!to) return;
                             if (head == 0) value += rating_grad(u) * n.user(u, d);
                             write(to, (first + u) * p.d + d, value);
                           });
  }
  if (!args.grad_history) return;
  times_weight_transposed<D>(p, s.weight, rows, n.interests_grad,
                             [&](int row, int i, float sum) { s.back(row, i) = sum; });
  for (int start = 0; start < p.length; start += p.positions) {
    const int count = p.length - start < p.positions ? p.length - start : p.positions;
    sync_block();  // until nobody reads the tile before
    for (int t = thread_index(); t < rows * count; t += block_threads()) {
      s.coupling(t / count, t % count) =
          load(args.coupling + (first_row + t / count) * p.length + start + t % count);
    }
    sync_block();
    input_gradient<D>(p, users, count, s.coupling, s.back, [&](int u, int l, int d, float value) {
      write(args.grad_history, ((first + u) * p.length + start + l) * p.d + d, value);
    });
  }
}

// Between the kernels of the other ops

struct Between {
  View history, table, item, user, grad, pooled, weight;
  View gathered, interests, user_grad, ratings, grad_item;
  int64_t count;
  Squash squash;
};

MIMNET_FAST_DEVICE int64_t element_of_thread() { return block_index() * kThreads + thread_index(); }

// gathered[b, l] = the row of the table; NaN where the id is none of its rows
MIMNET_FAST_KERNEL(kThreads, 8) gather_history(Between args) {
  const int64_t e = element_of_thread();
  if (e >= args.count) return;
  const int64_t d = args.table.size[1], length = args.history.size[1];
  const int64_t b = e / d / length, l = e / d % length;
  const int64_t id =
      read_integer(args.history, b * args.history.stride[0] + l * args.history.stride[1]);
  const bool known = id >= 0 && id < args.table.size[0];
  write(args.gathered, e,
        known ? read(args.table, id * args.table.stride[0] + e % d * args.table.stride[1])
              : not_a_number());
}

// ratings[b] = user[b] . item[b], a warp each
MIMNET_FAST_KERNEL(kThreads, 8) rate_users(Between args) {
  const int64_t b = element_of_thread() / kWarp;
  if (b >= args.count) return;
  const int d = int(args.item.size[1]);
  float rating = 0;
  for (int j = thread_index() % kWarp; j < d; j += kWarp) {
    rating += read(args.user, b * d + j) *
              read(args.item, b * args.item.stride[0] + j * args.item.stride[1]);
  }
  rating = warp_sum(rating);
  if (thread_index() % kWarp == 0) write(args.ratings, b, rating);
}

// user_grad = grad item, and grad_item += grad user where it is wanted
MIMNET_FAST_KERNEL(kThreads, 8) rate_users_backward(Between args) {
  const int64_t e = element_of_thread();
  if (e >= args.count) return;
  const int64_t d = args.item.size[1], b = e / d;
  const float grad = read(args.grad, b * args.grad.stride[0]);
  if (args.user_grad) {
    write(args.user_grad, e,
          grad * read(args.item, b * args.item.stride[0] + e % d * args.item.stride[1]));
  } else {
    write(args.grad_item, e, read(args.grad_item, e) + grad * read(args.user, e));
  }
}

// On the host

View contiguous(DType dtype, void* data, std::initializer_list<int64_t> sizes) {
  View v;
  v.data = data;
  v.dtype = dtype;
  v.dims = int(sizes.size());
  std::copy(sizes.begin(), sizes.end(), v.size);
  int64_t stride = 1;
  for (int d = v.dims - 1; d >= 0; --d) {
    v.stride[d] = stride;
    stride *= v.size[d];
  }
  return v;
}

View allocate(const Stream& stream, DType dtype, std::initializer_list<int64_t> sizes) {
  int64_t bytes = element_size(dtype);
  for (const int64_t size : sizes) bytes *= size;
  return contiguous(dtype, stream.allocate(stream.owner, bytes), sizes);
}

bool is_contiguous(const View& v) {
  return v.stride[2] == 1 && v.stride[1] == v.size[2] && v.stride[0] == v.size[1] * v.size[2];
}

// [B, D] as [B, 1, D].
View as_candidate(View v) {
  if (!v) return v;
  v.dims = 3;
  v.size[2] = v.size[1];
  v.stride[2] = v.stride[1];
  v.size[1] = 1;
  v.stride[1] = 0;
  return v;
}

struct Sizes {
  int64_t batch, length, k, d;
  explicit Sizes(const MIMNetArgs& call)
      : batch(call.source.size[0]),
        length(call.history.size[1]),
        k(call.logits.size[1]),
        d(call.source.size[1]) {}
};

constexpr Squash kSquash = {SquashForm::sqrt_eps, 1e-8, 1.0};

MIMNetLaunch make_launch(const MIMNetArgs& call) {
  const Sizes size(call);
  MIMNetLaunch args{};
  RoutingPlan& p = args.routing;
  p.length = int(size.length);
  p.capsules = int(size.k);
  p.d_in = p.d = int(size.d);
  p.votes = p.matrices = 1;
  p.iterations = int(call.iterations);
  p.axis = SoftmaxAxis::capsules;
  p.padding = call.padding;
  p.inner_squash = true;
  p.inverse_temperature = 1;
  p.squash = kSquash;
  p.weight = call.routing_weight;
  p.logits = call.logits;
  p.mask = call.mask;
  p.positions = call.grad && !call.grad_history ? 1 : std::min(p.length, 64);
  args.bridge = {call.w1, call.b1, call.w2, call.b2};
  AttentionPlan& a = args.attention;
  a.heads = 2;
  a.interests = p.capsules;
  a.d = p.d;
  a.batch = size.batch;
  a.candidates = a.tile_candidates = a.candidate_tiles = 1;
  a.query[0] = as_candidate(call.item);
  a.query[1] = as_candidate(call.prototype);
  a.keys = call.transferred;
  a.weights[0] = call.fusion.fine;
  a.weights[1] = call.fusion.coarse;
  a.keeps_pooled = bool(call.grad_item);
  a.row_stride = tile_stride(p.d);
  a.stages_keys = a.stages_weights = true;
  args.gate = {call.fusion.weight, call.fusion.bias, View{}};
  args.history = call.history;
  args.table = call.table;
  args.source = call.source;
  args.item = call.item;
  args.pooled = call.pooled;
  args.transferred = call.transferred;
  args.ratings = call.ratings;
  args.grad = call.grad;
  args.grad_history = call.grad_history;
  args.grad_source = call.grad_source;
  args.grad_item = call.grad_item;
  args.grad_prototype = call.grad_prototype;
  return args;
}

// All rows of a backward in one piece of memory: at these sizes a request for it costs as much as a
// stage.
void place_rows(const MIMNetArgs& call, Arena& arena, MIMNetLaunch& args) {
  const Sizes size(call);
  const int64_t count = size.batch * size.k, d = size.d, hidden = call.w1.size[0];
  const auto rows = [&](int64_t n, int64_t width) { return Rows{arena.floats(n * width), width}; };
  AttentionRows& attention = args.attention.rows;
  attention.query = arena.floats(2 * size.batch * d);
  attention.grad = arena.floats(size.batch * d);
  attention.folded_grad = arena.floats(2 * size.batch * d);
  attention.pooled = arena.floats(2 * size.batch * d);
  attention.share = arena.floats(2 * size.batch);
  args.gate_rows = arena.floats(size.batch);
  args.pooled_rows = is_contiguous(call.pooled) ? nullptr : arena.floats(count * d);
  args.capsule_rows = arena.floats(count * d);
  args.coupling = call.grad_history ? arena.floats(count * size.length) : nullptr;
  args.rows.source = rows(size.batch, d);
  args.rows.interests = rows(count, d);
  args.rows.grad = rows(count, d);
  args.rows.hidden = rows(count, hidden + 1);
  args.rows.hidden_grad = rows(count, hidden);
}

template <int D, int U>
bool launch_narrow(MIMNetLaunch args, const Stream& stream, const DeviceLimits& limits) {
  args.routing.users = args.attention.tile_users = U;
  const bool backward = bool(args.grad);
  Arena arena(nullptr);
  Narrow<D, U>(args, arena, backward);
  if (arena.bytes() > limits.shared_memory) return false;
  launch(backward ? mimnet_narrow_backward<D, U> : mimnet_narrow_forward<D, U>,
         (args.attention.batch + U - 1) / U, kThreads, arena.bytes(), stream, args);
  return true;
}

template <int D>
bool launch_narrow(const MIMNetLaunch& args, const Stream& stream) {
  const DeviceLimits limits = device_limits();
  const bool many = args.attention.batch >= 8 * limits.multiprocessors;
  return (many && launch_narrow<D, 4>(args, stream, limits)) ||
         launch_narrow<D, 1>(args, stream, limits);
}

// False where the sizes are another kernel's.
bool run_narrow(const MIMNetLaunch& args, const Stream& stream) {
  switch (args.routing.d) {
    case 8:
      return launch_narrow<8>(args, stream);
    case 10:
      return launch_narrow<10>(args, stream);
    case 16:
      return launch_narrow<16>(args, stream);
    default:
      return args.routing.d <= kNarrow && launch_narrow<0>(args, stream);
  }
}

void launch_elements(void (*kernel)(Between), Between args, int64_t threads, const Stream& stream) {
  launch(kernel, (threads + kThreads - 1) / kThreads, kThreads, 0, stream, args);
}

View embedded(const MIMNetArgs& call) {
  if (!call.table) return call.history;
  const Sizes size(call);
  const Stream& stream = call.execution.stream;
  Between args{};
  args.history = call.history;
  args.table = call.table;
  args.count = size.batch * size.length * size.d;
  args.gathered = allocate(stream, call.table.dtype, {size.batch, size.length, size.d});
  launch_elements(gather_history, args, args.count, stream);
  return args.gathered;
}

RoutingArgs routing_of(const MIMNetArgs& call) {
  RoutingArgs args{};
  args.weight = call.routing_weight;
  args.logits = call.logits;
  args.mask = call.mask;
  args.capsules = call.logits.size[1];
  args.iterations = call.iterations;
  args.axis = SoftmaxAxis::capsules;
  args.padding = call.padding;
  args.inner_squash = args.final_squash = true;
  args.temperature = 1;
  args.squash = kSquash;
  args.pooled = call.pooled;
  args.execution = call.execution;
  return args;
}

BridgeArgs bridge_of(const MIMNetArgs& call) {
  BridgeArgs args{};
  args.source = call.source;
  args.w1 = call.w1;
  args.b1 = call.b1;
  args.w2 = call.w2;
  args.b2 = call.b2;
  args.execution = call.execution;
  return args;
}

MultiGranularityArgs attention_of(const MIMNetArgs& call) {
  MultiGranularityArgs args{};
  args.item = as_candidate(call.item);
  args.prototype = as_candidate(call.prototype);
  args.interests = call.transferred;
  args.weights = call.fusion;
  args.execution = call.execution;
  return args;
}

void compose(const MIMNetArgs& call) {
  const Sizes size(call);
  const Stream& stream = call.execution.stream;
  RoutingArgs routing = routing_of(call);
  routing.inputs = embedded(call);
  routing.coupling = allocate(stream, DType::float32, {size.batch, size.k, size.length});
  routing.out = allocate(stream, DType::float32, {size.batch, size.k, size.d});
  dynamic_routing(routing);
  BridgeArgs bridge = bridge_of(call);
  bridge.interests = routing.out;
  bridge.out = call.transferred;
  interest_bridge(bridge);
  MultiGranularityArgs attention = attention_of(call);
  attention.out = allocate(stream, DType::float32, {size.batch, 1, size.d});
  attention.gate = allocate(stream, DType::float32, {size.batch, 1});
  multi_granularity_attention(attention);
  Between rating{};
  rating.user = attention.out;
  rating.item = call.item;
  rating.ratings = call.ratings;
  rating.count = size.batch;
  launch_elements(rate_users, rating, size.batch * kWarp, stream);
}

// The interests in backward. With the gradient of the history `routing` runs again, which leaves
// its couplings; else they are the squashed capsules of what the forward saved, by a pass of
// routing over one input for each capsule, that has its softmax alone.
View interests_again(const MIMNetArgs& call, RoutingArgs& routing) {
  const Sizes size(call);
  const Stream& stream = call.execution.stream;
  const auto rows = [&](int64_t width) {
    return allocate(stream, DType::float32, {size.batch, size.k, width});
  };
  RoutingArgs once = routing;
  if (call.grad_history) {
    once.coupling = routing.coupling = rows(size.length);
  } else {
    View& x = once.inputs = call.pooled;
    x.dims = 4;
    x.size[3] = x.size[2];
    x.stride[3] = x.stride[2];
    x.size[2] = 1;
    once.logits = once.mask = View{};
    once.iterations = 1;
    once.axis = SoftmaxAxis::inputs;
    once.coupling = rows(1);
  }
  once.pooled = rows(size.d);
  once.out = rows(size.d);
  dynamic_routing(once);
  return once.out;
}

void compose_backward(const MIMNetArgs& call) {
  const Sizes size(call);
  const Stream& stream = call.execution.stream;
  const auto rows = [&] { return allocate(stream, DType::float32, {size.batch, size.k, size.d}); };
  Between rating{};
  rating.item = call.item;
  rating.grad = call.grad;
  rating.count = size.batch * size.d;
  rating.user_grad = allocate(stream, DType::float32, {size.batch, 1, size.d});
  launch_elements(rate_users_backward, rating, rating.count, stream);

  MultiGranularityArgs attention = attention_of(call);
  if (call.grad_item) {
    attention.out = allocate(stream, DType::float32, {size.batch, 1, size.d});
  }
  attention.grad = rating.user_grad;
  attention.grad_item = as_candidate(call.grad_item);
  attention.grad_prototype = as_candidate(call.grad_prototype);
  attention.grad_interests = rows();
  attention.grad_weights = call.grad_fusion;
  multi_granularity_attention_backward(attention);
  if (call.grad_item) {
    rating.user = attention.out;
    rating.user_grad = View{};
    rating.grad_item = call.grad_item;
    launch_elements(rate_users_backward, rating, rating.count, stream);
  }

  RoutingArgs routing = routing_of(call);
  routing.inputs =
      contiguous(call.routing_weight.dtype, nullptr, {size.batch, size.length, size.d});
  if (call.grad_history) routing.inputs = call.history;
  const View interests = interests_again(call, routing);
  BridgeArgs bridge = bridge_of(call);
  bridge.interests = interests;
  bridge.grad = attention.grad_interests;
  bridge.grad_interests = rows();
  bridge.grad_source = call.grad_source;
  bridge.grad_w1 = call.grad_w1;
  bridge.grad_b1 = call.grad_b1;
  bridge.grad_w2 = call.grad_w2;
  bridge.grad_b2 = call.grad_b2;
  interest_bridge_backward(bridge);
  routing.pooled = call.pooled;
  routing.grad = bridge.grad_interests;
  routing.grad_inputs = call.grad_history;
  routing.grad_weight = call.grad_routing_weight;
  dynamic_routing_backward(routing);
}

}  // namespace

void mimnet_forward(const MIMNetArgs& call) {
  if (call.hidden_grad) throw std::runtime_error("mimnet_forward: only the CPU keeps gradients");
  if (!run_narrow(make_launch(call), call.execution.stream)) compose(call);
}

void mimnet_forward_backward(const MIMNetArgs& call) {
  const Sizes size(call);
  const Stream& stream = call.execution.stream;
  if (size.d > kNarrow) return compose_backward(call);

  MIMNetLaunch args = make_launch(call);
  AttentionPlan& a = args.attention;
  const int64_t count = size.batch * size.k, d = size.d;
  Arena counted(nullptr);
  place_rows(call, counted, args);
  // An empty batch still needs an address: an outer sum without one has no left operand.
  const int64_t bytes = std::max<int64_t>(1, counted.bytes());
  Arena arena(static_cast<char*>(stream.allocate(stream.owner, bytes)));
  place_rows(call, arena, args);
  if (!run_narrow(args, stream)) return compose_backward(call);

  a.grad = contiguous(DType::float32, a.rows.grad, {size.batch, 1, d});
  const AttentionWeights of_heads[] = {call.grad_fusion.fine, call.grad_fusion.coarse};
  OuterSum sums[1 + kBridgeSums + 9];
  int n = 0;
  sums[n++] = {args.pooled_rows ? args.pooled_rows : static_cast<const float*>(call.pooled.data),
               args.capsule_rows,
               d,
               d,
               count,
               int(d),
               int(d),
               call.grad_routing_weight};
  OuterSum of_bridge[kBridgeSums];
  bridge_sums(of_bridge, args.rows, {call.grad_w1, call.grad_b1, call.grad_w2, call.grad_b2},
              args.bridge, size.batch, int(size.k), d);
  for (const OuterSum& sum : of_bridge) sums[n++] = sum;
  add_sums(a, of_heads, sums, n);
  for (int h = 0; h < 2; ++h) {
    const FloatRows query = query_rows(a, h);
    sums[n++] = {args.gate_rows, query.data, 1,      query.stride,
                 size.batch,     1,          int(d), as_row(call.grad_fusion.weight, h * d)};
  }
  sums[n++] = {nullptr, args.gate_rows, 0, 1, size.batch, 1, 1, call.grad_fusion.bias};
  outer_sums(stream, sums, n);
}

}  // namespace mimnet_fast::cuda
