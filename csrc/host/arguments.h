// Between NumPy arrays and the kernels' views: what was got, what is needed, which argument.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "../common/view.h"

namespace mimnet_fast::host {

namespace py = pybind11;
using Shape = std::vector<py::ssize_t>;

inline std::string text(const Shape& shape) {
  std::string result = "[";
  for (size_t i = 0; i < shape.size(); ++i) {
    result += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  }
  return result + "]";
}

inline bool is(const py::array& array, const char* dtype) {
  return array.dtype().equal(py::dtype(dtype));
}

inline View view(const std::string& name, const py::array& array) {
  View v;
  v.data = const_cast<void*>(array.data());
  v.dtype = is(array, "float64")   ? DType::float64
            : is(array, "float16") ? DType::float16
            : is(array, "int64")   ? DType::int64
            : is(array, "int32")   ? DType::int32
                                   : DType::float32;
  v.dims = int(array.ndim());
  for (int d = 0; d < v.dims; ++d) {
    if (array.strides(d) % array.itemsize() != 0) {
      throw py::value_error(name + ": is a view whose strides are no whole numbers of elements, " +
                            "copy it with numpy.ascontiguousarray");
    }
    v.size[d] = array.shape(d);
    v.stride[d] = array.strides(d) / array.itemsize();
  }
  if (v.dims == 0) {  // a number is a vector of one
    v.dims = 1;
    v.size[0] = v.stride[0] = 1;
  }
  return v;
}

inline void not_empty(const char* name, const char* size, py::ssize_t value) {
  if (value < 1) {
    throw py::value_error(std::string(name) + ": got " + size + " = " + std::to_string(value) +
                          ", need at least 1 (only B may be 0)");
  }
}

inline void at_least_one(const char* name, int64_t value) {
  if (value < 1) {
    throw py::value_error(std::string(name) + ": got " + std::to_string(value) +
                          ", need at least 1");
  }
}

// `value` as so many parts, each of them an argument.
inline std::vector<py::object> parts(const std::string& name, py::handle value, size_t count,
                                     const char* meaning) {
  if (!py::isinstance<py::tuple>(value) && !py::isinstance<py::list>(value)) {
    throw py::type_error(name + ": got " + Py_TYPE(value.ptr())->tp_name + ", need a tuple " +
                         meaning);
  }
  std::vector<py::object> found;
  for (py::handle part : value) found.push_back(py::reinterpret_borrow<py::object>(part));
  if (found.size() != count) {
    throw py::value_error(name + ": got " + std::to_string(found.size()) + " values, need " +
                          meaning);
  }
  return found;
}

// The arrays of a call, which live as long as it does.
class Arguments {
 public:
  // The array that settles the dtype of the others.
  View leading(const char* name, py::handle value, int dims, const char* meaning) {
    const py::array array = take(name, value, dims, meaning);
    if (!is(array, "float32") && !is(array, "float64") && !is(array, "float16")) {
      throw py::type_error(std::string(name) + ": got dtype " + dtype_name(array) +
                           ", need float32, float64 or float16");
    }
    dtype_ = array.dtype();
    return view(name, array);
  }

  // An array of exactly this shape and the leading dtype; a size of -1 may be any.
  View same(const std::string& name, py::handle value, const Shape& shape, const char* meaning) {
    const py::array array = take(name, value, int(shape.size()), meaning);
    if (!array.dtype().equal(dtype_)) {
      throw py::type_error(name + ": got dtype " + dtype_name(array) + ", need " +
                           std::string(py::str(dtype_)) + " as in the other arguments");
    }
    check_shape(name, array, shape, meaning);
    return view(name, array);
  }

  // Integers in [low, high], as contiguous int64.
  View integers(const std::string& name, py::handle value, const Shape& shape, const char* meaning,
                int64_t low, int64_t high) {
    const py::array array = take(name, value, int(shape.size()), meaning);
    if (!is(array, "int64") && !is(array, "int32")) {
      throw py::type_error(name + ": got dtype " + dtype_name(array) + ", need int64 or int32");
    }
    check_shape(name, array, shape, meaning);
    const auto wide = py::array_t<int64_t, py::array::c_style | py::array::forcecast>(array);
    for (py::ssize_t i = 0; i < wide.size(); ++i) {
      if (wide.data()[i] < low || wide.data()[i] > high) {
        throw py::value_error(name + ": got " + std::to_string(wide.data()[i]) + ", need " +
                              std::to_string(low) + " to " + std::to_string(high));
      }
    }
    taken_.push_back(wide);
    return view(name, wide);
  }

  const py::dtype& dtype() const { return dtype_; }

 private:
  static std::string dtype_name(const py::array& array) { return py::str(array.dtype()); }

  static void check_shape(const std::string& name, const py::array& array, const Shape& shape,
                          const char* meaning) {
    const Shape got(array.shape(), array.shape() + array.ndim());
    for (size_t d = 0; d < shape.size(); ++d) {
      if (shape[d] < 0 || got[d] == shape[d]) continue;
      throw py::value_error(name + ": got shape " + text(got) + ", need " + meaning + " = " +
                            text(shape));
    }
  }

  py::array take(const std::string& name, py::handle value, int dims, const char* meaning) {
    if (!py::isinstance<py::array>(value)) {
      throw py::type_error(name + ": got " + Py_TYPE(value.ptr())->tp_name +
                           ", need a NumPy array " + meaning);
    }
    taken_.push_back(py::reinterpret_borrow<py::array>(value));
    const py::array& array = taken_.back();
    if (array.ndim() != dims) {
      const Shape got(array.shape(), array.shape() + array.ndim());
      throw py::value_error(name + ": got shape " + text(got) + ", need " + meaning);
    }
    return array;
  }

  std::vector<py::array> taken_;
  py::dtype dtype_;
};

}  // namespace mimnet_fast::host
