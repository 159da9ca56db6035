#include "ops.h"

namespace mimnet_fast::binding {

Tensor matrix_factorization_adam(Tensor user_table, Tensor item_table, Tensor user_first,
                                 Tensor user_second, Tensor item_first, Tensor item_second,
                                 Tensor user_ids, Tensor item_ids, Tensor ratings,
                                 int64_t batch_size, int64_t first_step, double learning_rate,
                                 double beta1, double beta2, double eps) {
  STD_TORCH_CHECK(kernels().matrix_factorization_adam != nullptr,
                  "mimnet_fast: no kernel for matrix_factorization_adam on this device");
  Tensor losses = empty(ratings, {(ratings.size(0) + batch_size - 1) / batch_size});
  Device device(user_table);
  FactorizationArgs args{};
  args.user_table = view(user_table);
  args.user_first = view(user_first);
  args.user_second = view(user_second);
  args.item_table = view(item_table);
  args.item_first = view(item_first);
  args.item_second = view(item_second);
  args.user_ids = view(user_ids);
  args.item_ids = view(item_ids);
  args.ratings = view(ratings);
  args.batch_size = batch_size;
  args.adam = {learning_rate, beta1, beta2, eps, first_step};
  args.losses = view(losses);
  args.execution = device.execution();
  kernels().matrix_factorization_adam(args);
  return losses;
}

}  // namespace mimnet_fast::binding
