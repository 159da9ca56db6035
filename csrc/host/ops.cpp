#include "ops.h"

#include <algorithm>
#include <cstdlib>
#include <future>
#include <thread>

#include "../common/kernels.h"
#include "arguments.h"

namespace mimnet_fast::host {
namespace {

// As many as torch takes: the CPUs that the process may use, or fewer by OMP_NUM_THREADS.
int64_t threads() {
  static const int64_t count = [] {
    const char* set = std::getenv("OMP_NUM_THREADS");
    const int64_t wanted = set == nullptr ? 0 : std::atoll(set);
    const int64_t usable = std::thread::hardware_concurrency();
    return std::max<int64_t>(1, wanted > 0 ? wanted : usable);
  }();
  return count;
}

void run(int64_t count, int64_t grain, void* context, Parallel::Body body) {
  if (count == 0) return;
  const int64_t pieces = std::min(threads(), (count + grain - 1) / grain);
  const int64_t size = (count + pieces - 1) / pieces;
  std::vector<std::future<void>> others;  // which wait for their threads, whatever is thrown
  for (int64_t begin = size; begin < count; begin += size) {
    others.push_back(
        std::async(std::launch::async, body, context, begin, std::min(begin + size, count)));
  }
  body(context, 0, std::min(size, count));
  for (auto& other : others) other.get();
}

template <class Args>
void call(void (*kernel)(const Args&), Args& args) {
  args.execution.parallel = {&run, threads()};
  const py::gil_scoped_release release;
  kernel(args);
}

AttentionWeights attention(Arguments& arguments, const std::string& name, py::handle value,
                           py::ssize_t d) {
  const auto given = parts(name, value, 4, "(key_weight, key_bias, value_weight, value_bias)");
  const auto part = [&](int i, const char* what, const Shape& shape, const char* meaning) {
    return arguments.same(name + "." + what, given[i], shape, meaning);
  };
  const View key_weight = part(0, "key_weight", {d, d}, "[D, D]");
  part(1, "key_bias", {d}, "[D]");  // which cancels in the softmax
  return {key_weight, part(2, "value_weight", {d, d}, "[D, D]"), part(3, "value_bias", {d}, "[D]")};
}

FusionWeights fusion(Arguments& arguments, py::handle fine, py::handle coarse, py::handle weight,
                     py::handle bias, py::ssize_t d) {
  const bool number =
      py::isinstance<py::array>(bias) && py::reinterpret_borrow<py::array>(bias).ndim() == 0;
  return {attention(arguments, "fine", fine, d), attention(arguments, "coarse", coarse, d),
          arguments.same("fusion_weight", weight, {2 * d}, "[2*D]"),
          arguments.same("fusion_bias", bias, number ? Shape{} : Shape{1}, "[] or [1]")};
}

py::tuple mimnet_forward(py::object history, py::object source, py::object item,
                         py::object prototype, py::object parameters, py::object logits,
                         py::object lengths, py::object table, int64_t iterations,
                         const std::string& padding) {
  Arguments arguments;
  MIMNetArgs args{};
  args.source = arguments.leading("source", source, 2, "[B, D]");
  const py::ssize_t batch = args.source.size[0], d = args.source.size[1];
  not_empty("source", "D", d);
  args.item = arguments.same("item", item, {batch, d}, "[B, D]");
  args.prototype = arguments.same("prototype", prototype, {batch, d}, "[B, D]");
  if (table.is_none()) {
    args.history = arguments.same("history", history, {batch, -1, d}, "[B, L, D]");
  } else {
    args.table = arguments.same("table", table, {-1, d}, "[N, D]");
    args.history = arguments.integers("history", history, {batch, -1}, "ids [B, L] with a table", 0,
                                      args.table.size[0] - 1);
  }
  const py::ssize_t length = args.history.size[1];
  args.logits = arguments.same("logits", logits, {-1, -1, length}, "[B, K, L] or [1, K, L]");
  if (args.logits.size[0] != 1 && args.logits.size[0] != batch) {
    throw py::value_error("logits: got B = " + std::to_string(args.logits.size[0]) +
                          ", need 1 or " + std::to_string(batch));
  }
  const py::ssize_t k = args.logits.size[1];
  not_empty("logits", "K", k);
  not_empty("logits", "L", length);
  if (!lengths.is_none()) {
    args.mask = arguments.integers("lengths", lengths, {batch}, "[B]", 0, length);
  }
  const auto weights =
      parts("parameters", parameters, 9,
            "(routing_weight, w1, b1, w2, b2, fine, coarse, fusion_weight, fusion_bias)");
  args.routing_weight = arguments.same("routing_weight", weights[0], {d, d}, "[D, D]");
  args.w1 = arguments.same("w1", weights[1], {-1, d}, "[H, D]");
  const py::ssize_t hidden = args.w1.size[0];
  not_empty("w1", "H", hidden);
  args.b1 = arguments.same("b1", weights[2], {hidden}, "[H]");
  args.w2 = arguments.same("w2", weights[3], {d * d, hidden}, "[D*D, H]");
  args.b2 = arguments.same("b2", weights[4], {d * d}, "[D*D]");
  args.fusion = fusion(arguments, weights[5], weights[6], weights[7], weights[8], d);
  at_least_one("iterations", iterations);
  args.iterations = iterations;
  const py::module_ options = py::module_::import("mimnet_fast._options");
  args.padding =
      Padding(options.attr("code")("padding", padding, options.attr("PADDINGS")).cast<int64_t>());

  const py::dtype saved(is(py::array(arguments.dtype(), Shape{0}), "float64") ? "float64"
                                                                              : "float32");
  const py::array ratings(arguments.dtype(), Shape{batch});
  const py::array pooled(saved, Shape{batch, k, d}), transferred(saved, Shape{batch, k, d});
  args.ratings = view("ratings", ratings);
  args.pooled = view("pooled", pooled);
  args.transferred = view("transferred", transferred);
  call(kernels().mimnet_forward, args);
  return py::make_tuple(ratings, transferred);
}

py::tuple catalogue_top_k(py::object interests, py::object items, py::object prototypes,
                          py::object fine, py::object coarse, py::object fusion_weight,
                          py::object fusion_bias, int64_t k, py::object prototype_ids,
                          py::object exclude) {
  Arguments arguments;
  CatalogueArgs args{};
  args.interests = arguments.leading("interests", interests, 3, "[B, K, D]");
  const py::ssize_t batch = args.interests.size[0], d = args.interests.size[2];
  not_empty("interests", "K", args.interests.size[1]);
  not_empty("interests", "D", d);
  args.items = arguments.same("items", items, {-1, d}, "[N, D]");
  args.prototypes = arguments.same("prototypes", prototypes, {-1, d}, "[P, D]");
  const py::ssize_t n = args.items.size[0], p = args.prototypes.size[0];
  not_empty("items", "N", n);
  not_empty("prototypes", "P", p);
  args.weights = fusion(arguments, fine, coarse, fusion_weight, fusion_bias, d);
  at_least_one("k", k);
  if (!prototype_ids.is_none()) {
    args.prototype_ids = arguments.integers("prototype_ids", prototype_ids, {n}, "[N]", 0, p - 1);
  } else if (p != n) {
    throw py::value_error("prototypes: got " + std::to_string(p) + " rows for " +
                          std::to_string(n) + " items, need one for each item, or prototype_ids");
  }
  if (!exclude.is_none()) {
    const auto given = parts("exclude", exclude, 2, "(indices [T], offsets [B+1])");
    args.excluded = arguments.integers("exclude[0]", given[0], {-1}, "[T]", 0, n - 1);
    const int64_t total = args.excluded.size[0];
    args.excluded_offsets =
        arguments.integers("exclude[1]", given[1], {batch + 1}, "[B+1]", 0, total);
    const int64_t* offsets = static_cast<const int64_t*>(args.excluded_offsets.data);
    if (offsets[0] != 0 || offsets[batch] != total ||
        !std::is_sorted(offsets, offsets + batch + 1)) {
      throw py::value_error("exclude[1]: need offsets that rise from 0 to T = " +
                            std::to_string(total));
    }
  }
  const py::array scores(arguments.dtype(), Shape{batch, py::ssize_t(k)});
  const py::array_t<int64_t> indices(Shape{batch, py::ssize_t(k)});
  args.scores = view("scores", scores);
  args.indices = view("indices", indices);
  call(kernels().catalogue_top_k, args);
  return py::make_tuple(scores, indices);
}

}  // namespace

void define_ops(py::module_& m) {
  using namespace pybind11::literals;
  m.def("mimnet_forward", &mimnet_forward, "history"_a, "source"_a, "item"_a, "prototype"_a,
        "parameters"_a, "logits"_a, py::kw_only(), "lengths"_a = py::none(), "table"_a = py::none(),
        "iterations"_a = 3, "padding"_a = "zero_after",
        "Ratings [B] and transferred interests [B, K, D]; arguments as in "
        "mimnet_fast.ops.mimnet_forward.");
  m.def("catalogue_top_k", &catalogue_top_k, "interests"_a, "items"_a, "prototypes"_a, "fine"_a,
        "coarse"_a, "fusion_weight"_a, "fusion_bias"_a, "k"_a, py::kw_only(),
        "prototype_ids"_a = py::none(), "exclude"_a = py::none(),
        "Scores and indices [B, k]; arguments as in mimnet_fast.ops.catalogue_top_k.");
}

}  // namespace mimnet_fast::host
