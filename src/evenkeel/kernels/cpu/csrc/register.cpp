// torch's side of the operators: checks tensors, allocates results, calls the kernels. The only file that knows torch,
// through LibTorch's stable ABI, so that one binary serves several versions. The schemas are in evenkeel/ops.py.
//
// A case that the native kernels do not cover raises an error that begins with "evenkeel: unsupported" before anything
// was written; Python then takes the reference back end.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdio>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "dispatch.h"

namespace {

using namespace evenkeel;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

#define REQUIRE(condition, what) STD_TORCH_CHECK(condition, "evenkeel: unsupported: ", what)

using Body = void (*)(void*, int64_t, int64_t);

void run_serially(int64_t tasks, Body body, void* context) { body(context, 0, tasks); }

void run_in_parallel(int64_t tasks, Body body, void* context) {
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

Parallel parallel_for_size(const Problem& p) { return {p.is_small() ? run_serially : run_in_parallel}; }

ScalarType dtype_of(const Tensor& t) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  if (dtype == aoti_torch_dtype_float32()) return ScalarType::Float;
  if (dtype == aoti_torch_dtype_float64()) return ScalarType::Double;
  if (dtype == aoti_torch_dtype_int64()) return ScalarType::Long;
  return ScalarType::Undefined;
}

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

Tensor empty_as(const Tensor& t) {
  return empty_strided(t.sizes().data(), t.strides().data(), t.dim(), aoti_torch_dtype_float32());
}

// True where the strides are those of consecutive values in the given order of dimensions; a dimension of size 1 may
// have any stride.
bool is_dense(const Tensor& t, bool channels_last) {
  const auto sizes = t.sizes(), strides = t.strides();
  const int64_t dim = t.dim();
  int64_t expected = 1;
  if (channels_last) {
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

// A contiguous copy of x unless it already lies as one of the two layouts.
Tensor dense(const Tensor& x) { return is_dense(x, false) || is_dense(x, true) ? x : torch::stable::contiguous(x); }

// t laid out as x, copied where it is not: gradients often arrive in another memory format, or expanded.
Tensor laid_out_as(const Tensor& t, const Tensor& x, const char* name) {
  REQUIRE(dtype_of(t) == ScalarType::Float && t.is_cpu(), name);
  REQUIRE(same_shape(t, x), name);
  if (is_dense(x, false) ? is_dense(t, false) : is_dense(t, true)) return t;
  Tensor copy = empty_as(x);
  torch::stable::copy_(copy, t);
  return copy;
}

float* floats(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }
double* doubles(const Tensor& t) { return static_cast<double*>(t.data_ptr()); }

Tensor rounded(const double* values, int64_t size) {
  const int64_t stride = 1;
  Tensor result = empty_strided(&size, &stride, 1, aoti_torch_dtype_float32());
  float* to = floats(result);
  for (int64_t i = 0; i < size; ++i) to[i] = static_cast<float>(values[i]);
  return result;
}

// A float per channel, or nullptr.
float* per_channel(const Optional& t, const Problem& p, const char* name) {
  if (!t) return nullptr;
  REQUIRE(dtype_of(*t) == ScalarType::Float && t->is_cpu(), name);
  REQUIRE(t->dim() == 1 && t->size(0) == p.channels && t->is_contiguous(), name);
  return floats(*t);
}

double* per_channel_double(const Tensor& t, int64_t rows, const Problem& p, const char* name) {
  REQUIRE(dtype_of(t) == ScalarType::Double && t.is_cpu() && t.is_contiguous(), name);
  REQUIRE(t.numel() == rows * p.channels, name);
  return doubles(t);
}

// The last level of cache that this core shares with others, or a usual size where the system does not tell.
// (sysconf's _SC_LEVEL3_CACHE_SIZE adds up those of all groups of cores on some machines.)
int64_t cache_bytes() {
  static const int64_t bytes = [] {
    int64_t kibibytes = 0;
    if (FILE* file = std::fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "r")) {
      long long read = 0;
      if (std::fscanf(file, "%lldK", &read) == 1) kibibytes = read;
      std::fclose(file);
    }
    return (kibibytes > 0 ? kibibytes : 32 * 1024) * 1024;
  }();
  return bytes;
}

Problem problem_of(const Tensor& x, int64_t activation) {
  REQUIRE(dtype_of(x) == ScalarType::Float && x.is_cpu() && x.dim() >= 2 && x.numel() > 0, "x");
  REQUIRE(activation == 0 || activation == 1, "activation");
  Problem p;
  p.samples = x.size(0);
  p.channels = x.size(1);
  p.positions = x.numel() / (p.samples * p.channels);
  // With one position per channel the two layouts coincide, and rows are the longer runs.
  p.layout = p.positions > 1 && is_dense(x, false) ? Layout::contiguous : Layout::channels_last;
  p.activation = static_cast<Activation>(activation);
  p.x = floats(x);
  p.streaming = x.numel() * static_cast<int64_t>(sizeof(float)) > cache_bytes() / 2;
  return p;
}

using Operator = void (*Kernels::*)(const Problem&, Parallel);

void run(Problem& p, Operator op) {
  const Kernels& kernels = active_kernels();
  constexpr int64_t kOnStack = 512;
  double on_stack[kOnStack];
  const int64_t size = kernels.scratch_doubles(p);
  std::unique_ptr<double[]> on_heap(size > kOnStack ? new double[size] : nullptr);
  p.scratch = on_heap ? on_heap.get() : on_stack;
  (kernels.*op)(p, parallel_for_size(p));
}

// ---- the four operators

Tensor stats(const Tensor& x) {
  const Tensor xx = dense(x);
  Problem p = problem_of(xx, 0);
  Tensor moments = empty_rows(2, p.channels);
  p.mean = doubles(moments);
  p.var = p.mean + p.channels;
  run(p, &Kernels::stats);
  return moments;
}

void set_normalization(Problem& p, const Tensor& mean, const Tensor& rstd, const Optional& weight,
                       const Optional& bias) {
  p.mean = per_channel_double(mean, 1, p, "mean");
  p.rstd = per_channel_double(rstd, 1, p, "rstd");
  p.weight = per_channel(weight, p, "weight");
  p.bias = per_channel(bias, p, "bias");
}

Tensor apply(const Tensor& x, const Tensor& mean, const Tensor& rstd, const Optional& weight, const Optional& bias,
             const Optional& residual, int64_t activation) {
  const Tensor xx = dense(x);
  Problem p = problem_of(xx, activation);
  set_normalization(p, mean, rstd, weight, bias);
  Optional r;
  if (residual) r = laid_out_as(*residual, xx, "residual"), p.residual = floats(*r);
  Tensor y = empty_as(xx);
  p.y = floats(y);
  run(p, &Kernels::apply);
  return y;
}

Tensor grad_stats(const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& rstd, const Optional& weight,
                  const Optional& bias, const Optional& y, int64_t activation) {
  const Tensor xx = dense(x);
  Problem p = problem_of(xx, activation);
  set_normalization(p, mean, rstd, weight, bias);
  const Tensor g = laid_out_as(dy, xx, "dy");
  p.dy = floats(g);
  Optional yy;
  if (y) yy = laid_out_as(*y, xx, "y"), p.y = floats(*yy);
  Tensor sums = empty_rows(2, p.channels);
  p.sum_g = doubles(sums);
  p.sum_gxhat = p.sum_g + p.channels;
  run(p, &Kernels::grad_stats);
  return sums;
}

Tensor grad_input(const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& rstd, const Optional& weight,
                  const Optional& bias, const Optional& y, const Optional& grad_means, int64_t activation) {
  const Tensor xx = dense(x);
  Problem p = problem_of(xx, activation);
  set_normalization(p, mean, rstd, weight, bias);
  const Tensor g = laid_out_as(dy, xx, "dy");
  p.dy = floats(g);
  Optional yy;
  if (y) yy = laid_out_as(*y, xx, "y"), p.y = floats(*yy);
  p.training = grad_means.has_value();
  p.count = 1;
  if (grad_means) {
    p.sum_g = per_channel_double(*grad_means, 2, p, "grad_means");
    p.sum_gxhat = p.sum_g + p.channels;
  }
  Tensor dx = empty_as(xx);
  p.dx = floats(dx);
  run(p, &Kernels::grad_input);
  return dx;
}

// ---- the fused operators

std::tuple<Tensor, Tensor> run_forward(const Tensor& x, const Optional& residual, const Optional& weight,
                                       const Optional& bias, const Optional& running_mean, const Optional& running_var,
                                       bool training, bool update, double momentum, double eps, int64_t activation) {
  const Tensor xx = dense(x);
  Problem p = problem_of(xx, activation);
  p.training = training;
  p.momentum = momentum;
  p.eps = eps;
  p.weight = per_channel(weight, p, "weight");
  p.bias = per_channel(bias, p, "bias");
  float* mean = per_channel(running_mean, p, "running_mean");
  float* var = per_channel(running_var, p, "running_var");
  REQUIRE((mean == nullptr) == (var == nullptr) && (training || mean), "running moments");
  Optional r;
  if (residual) r = laid_out_as(*residual, xx, "residual"), p.residual = floats(*r);

  Tensor saved = empty_rows(3, p.channels);
  p.mean = doubles(saved);
  p.var = p.mean + p.channels;
  p.rstd = p.var + p.channels;
  if (training) {
    if (update) p.running_mean = mean, p.running_var = var;
  } else {
    for (int64_t c = 0; c < p.channels; ++c) p.mean[c] = mean[c], p.var[c] = var[c];
  }
  Tensor y = empty_as(xx);
  p.y = floats(y);
  run(p, &Kernels::forward);
  return {y, saved};
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Optional& residual, const Optional& weight,
                                   const Optional& bias, const Optional& running_mean, const Optional& running_var,
                                   bool training, double eps, int64_t activation) {
  return run_forward(x, residual, weight, bias, running_mean, running_var, training, false, 0, eps, activation);
}

// May update the running moments; without a momentum they average over all batches so far.
std::tuple<Tensor, Tensor> forward_(const Tensor& x, const Optional& residual, const Optional& weight,
                                    const Optional& bias, const Optional& running_mean, const Optional& running_var,
                                    const Optional& num_batches_tracked, bool training, bool update,
                                    std::optional<double> momentum, double eps, int64_t activation) {
  int64_t* batches = nullptr;
  if (num_batches_tracked && training && update) {
    const Tensor& t = *num_batches_tracked;
    REQUIRE(dtype_of(t) == ScalarType::Long && t.numel() == 1 && t.is_cpu(), "num_batches_tracked");
    batches = static_cast<int64_t*>(t.data_ptr());
  }
  if (training && update && !momentum && running_mean) {
    REQUIRE(batches, "momentum None without num_batches_tracked");
    momentum = 1.0 / static_cast<double>(*batches + 1);
  }
  auto result = run_forward(x, residual, weight, bias, running_mean, running_var, training, update,
                            momentum.value_or(0), eps, activation);
  if (batches) ++*batches;
  return result;
}

Tensor undefined() { return Tensor(); }

// dx, dresidual, dweight, dbias; those that are not asked for come back undefined (None in Python).
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dy, const Tensor& x, const Tensor& saved,
                                                    const Optional& weight, const Optional& bias, const Optional& y,
                                                    bool training, int64_t activation, bool need_input,
                                                    bool need_residual, bool need_weight, bool need_bias) {
  const Tensor xx = dense(x);
  Problem p = problem_of(xx, activation);
  p.training = training;
  p.count = static_cast<double>(p.per_channel());
  p.weight = per_channel(weight, p, "weight");
  p.bias = per_channel(bias, p, "bias");
  p.mean = per_channel_double(saved, 3, p, "saved");
  p.var = p.mean + p.channels;
  p.rstd = p.var + p.channels;
  const Tensor g = laid_out_as(dy, xx, "dy");
  p.dy = floats(g);
  Optional yy;
  if (y) yy = laid_out_as(*y, xx, "y"), p.y = floats(*yy);

  Tensor dx = need_input ? empty_as(xx) : undefined();
  if (need_input) p.dx = floats(dx);
  // Without an activation the residual's gradient is dy itself: nothing to compute.
  REQUIRE(!need_residual || (y && activation != 0), "the gradient of a residual needs an activation and its y");
  Tensor dresidual = need_residual ? empty_as(xx) : undefined();
  if (need_residual) p.dresidual = floats(dresidual);

  const bool need_sums = need_weight || need_bias || need_residual || (training && need_input);
  std::unique_ptr<double[]> sums(need_sums ? new double[2 * p.channels] : nullptr);
  if (need_sums) p.sum_g = sums.get(), p.sum_gxhat = p.sum_g + p.channels;
  run(p, &Kernels::backward);

  Tensor dweight = need_weight ? rounded(p.sum_gxhat, p.channels) : undefined();
  Tensor dbias = need_bias ? rounded(p.sum_g, p.channels) : undefined();
  return {dx, dresidual, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(evenkeel, CPU, m) {
  m.impl("stats", TORCH_BOX(&stats));
  m.impl("apply", TORCH_BOX(&apply));
  m.impl("grad_stats", TORCH_BOX(&grad_stats));
  m.impl("grad_input", TORCH_BOX(&grad_input));
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("forward_", TORCH_BOX(&forward_));
  m.impl("backward", TORCH_BOX(&backward));
}
