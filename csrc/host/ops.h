// The forward ops that serve a trained model, as functions on NumPy arrays.
#pragma once

#include <pybind11/pybind11.h>

namespace mimnet_fast::host {

void define_ops(pybind11::module_& m);

}  // namespace mimnet_fast::host
