// Tensors through LibTorch's stable ABI: dtypes, layouts, allocation and per-channel vectors.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <memory>
#include <optional>
#include <type_traits>

#include "dispatch.h"
#include "storage.h"

namespace {

using namespace keelnorm;
using Optional = std::optional<Tensor>;

#define REQUIRE(condition, what) STD_TORCH_CHECK(condition, "keelnorm: unsupported: ", what)

// ---- dtypes

int32_t dtype_code(const Tensor& t) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}

// The kernels' name for a tensor's dtype; declines those that they don't know.
Dtype dtype_of(const Tensor& t, const char* name) {
  const int32_t dtype = dtype_code(t);
  if (dtype == aoti_torch_dtype_float32()) return Dtype::f32;
  if (dtype == aoti_torch_dtype_bfloat16()) return Dtype::bf16;
  if (dtype == aoti_torch_dtype_float16()) return Dtype::f16;
  REQUIRE(dtype == aoti_torch_dtype_float64(), name);
  return Dtype::f64;
}

int32_t torch_dtype(Dtype dtype) {
  switch (dtype) {
    case Dtype::f64:
      return aoti_torch_dtype_float64();
    case Dtype::bf16:
      return aoti_torch_dtype_bfloat16();
    case Dtype::f16:
      return aoti_torch_dtype_float16();
    default:
      return aoti_torch_dtype_float32();
  }
}

int64_t bytes_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

// Calls body with a value of the C++ type of the dtype.
template <class Body>
void with_type(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::f32:
      return body(float{});
    case Dtype::f64:
      return body(double{});
    case Dtype::bf16:
      return body(torch::headeronly::BFloat16{});
    case Dtype::f16:
      return body(torch::headeronly::Half{});
  }
}

// ---- layouts

// True where the strides are those of consecutive values in the given order of dimensions; a dimension of size 1 may
// have any stride.
bool is_dense(const Tensor& t, bool channels_last) {
  const auto sizes = t.sizes(), strides = t.strides();
  const int64_t dim = t.dim();
  int64_t expected = 1;
  if (channels_last) {
    if (dim < 2) return false;
    if (sizes[1] != 1 && strides[1] != 1) return false;
    expected = sizes[1];
  }
  for (int64_t i = dim - 1; i >= 0; --i) {
    if (channels_last && i == 1) continue;
    if (sizes[i] != 1 && strides[i] != expected) return false;
    expected *= sizes[i];
  }
  return true;
}

bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); ++i)
    if (a.size(i) != b.size(i)) return false;
  return true;
}

// ---- allocation

Tensor empty_strided(const int64_t* sizes, const int64_t* strides, int64_t dim, int32_t dtype) {
  AtenTensorHandle result;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dim, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &result));
  return Tensor(result);
}

Tensor empty_rows(int64_t rows, int64_t size) {  // double
  const int64_t sizes[] = {rows, size}, strides[] = {size, 1};
  return empty_strided(sizes, strides, 2, aoti_torch_dtype_float64());
}

Tensor empty_as(const Tensor& t) { return empty_strided(t.sizes().data(), t.strides().data(), t.dim(), dtype_code(t)); }

double* doubles(const Tensor& t, const char* name) { return static_cast<double*>(memory_of(t, name)); }

// A tensor and the address of its first value.
struct Placed {
  Tensor tensor;
  void* data;
};

// Kernels need values at multiples of their width; in a view of a file's bytes they may lie elsewhere.
bool is_aligned(const void* data, int64_t width) { return reinterpret_cast<uintptr_t>(data) % width == 0; }

// t, or an aligned copy; put_back copies what was written there to t.
Placed aligned(const Tensor& t, const char* name) {
  void* const data = memory_of(t, name);
  if (is_aligned(data, t.element_size())) return {t, data};
  Tensor result = empty_as(t);
  copy(result, t, name);
  return {result, memory_of(result, name)};
}

void put_back(const Tensor& t, const Tensor& written, const char* name) {
  if (written.get() != t.get()) copy(t, written, name);
}

// ---- a value per channel

// Doubles for as long as an operator runs: on the stack where they are few.
class Doubles {
 public:
  explicit Doubles(int64_t size) : heap_(size > kOnStack ? new double[size] : nullptr) {}
  double* data() { return heap_ ? heap_.get() : stack_; }

 private:
  static constexpr int64_t kOnStack = 512;
  double stack_[kOnStack];
  std::unique_ptr<double[]> heap_;
};

// Up to four parameters and buffers of any floating-point dtype, as doubles.
class Vectors {
 public:
  explicit Vectors(int64_t channels) : channels_(channels), values_(4 * channels) {}

  // The values of t, or nullptr where there is no t.
  double* take(const Optional& t, const char* name) {
    if (!t) return nullptr;
    REQUIRE(t->is_cpu() && t->dim() == 1 && t->size(0) == channels_ && t->is_contiguous(), name);
    double* const to = values_.data() + taken_++ * channels_;
    const char* from = static_cast<const char*>(memory_of(*t, name));
    with_type(dtype_of(*t, name), [&](auto value) {
      for (int64_t c = 0; c < channels_; ++c, from += sizeof value) {
        std::memcpy(&value, from, sizeof value);  // which may lie at any address
        to[c] = static_cast<double>(value);
      }
    });
    return to;
  }

 private:
  const int64_t channels_;
  int64_t taken_ = 0;
  Doubles values_;
};

// values, rounded to t's dtype.
void put(const Tensor& t, const double* values, const char* name) {
  char* to = static_cast<char*>(memory_of(t, name));
  with_type(dtype_of(t, name), [&](auto value) {
    using T = decltype(value);
    using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;  // what 16-bit types convert from
    for (int64_t c = 0; c < t.size(0); ++c, to += sizeof value) {
      value = static_cast<T>(static_cast<Wide>(values[c]));
      std::memcpy(to, &value, sizeof value);
    }
  });
}

}  // namespace
