#include "ops.h"

namespace mimnet_fast::binding {

Tensor mimnet_adam(Tensor parameters, Tensor first, Tensor second, OptionalTensor average,
                   Tensor users, Tensor items, Tensor ratings, OptionalTensor weights,
                   Tensor histories, Tensor lengths, Tensor history_table, Tensor source_table,
                   Tensor item_table, Tensor prototype_table, Tensor logits, int64_t hidden,
                   int64_t batch_size, int64_t iterations, int64_t padding, int64_t first_step,
                   double learning_rate, double beta1, double beta2, double eps,
                   double weight_decay, double averaging) {
  STD_TORCH_CHECK(kernels().mimnet_adam != nullptr,
                  "mimnet_fast: no kernel for mimnet_adam on this device");
  Tensor losses = empty(ratings, {(ratings.size(0) + batch_size - 1) / batch_size});
  Device device(parameters);
  TrainingArgs args{};
  args.parameters = view(parameters);
  args.first = view(first);
  args.second = view(second);
  args.average = view(average);
  args.users = view(users);
  args.items = view(items);
  args.ratings = view(ratings);
  args.weights = view(weights);
  args.histories = view(histories);
  args.lengths = view(lengths);
  args.history_table = view(history_table);
  args.source_table = view(source_table);
  args.item_table = view(item_table);
  args.prototype_table = view(prototype_table);
  args.logits = view(logits);
  args.hidden = hidden;
  args.batch_size = batch_size;
  args.iterations = iterations;
  args.padding = Padding(padding);
  args.adam = {learning_rate, beta1, beta2, eps, first_step};
  args.weight_decay = weight_decay;
  args.averaging = averaging;
  args.losses = view(losses);
  args.execution = device.execution();
  kernels().mimnet_adam(args);
  return losses;
}

}  // namespace mimnet_fast::binding
