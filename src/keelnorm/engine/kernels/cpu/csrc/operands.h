// The tensors that torch gives an operator: checked, brought into one layout, put into a Problem, and run.
#pragma once

#include <vector>

#include "memory.h"
#include "tensors.h"

namespace {

using Body = void (*)(void*, int64_t, int64_t);

void run_serially(int64_t tasks, Body body, void* context) { body(context, 0, tasks); }

void run_in_parallel(int64_t tasks, Body body, void* context) {
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

// An activation as an operator takes it.
struct Act {
  int64_t code;
  double a, b;
};

Problem problem_of(const Tensor& x, const void* data, Act activation) {
  static const int64_t core_cache = cache_bytes(2, 512 * 1024);
  REQUIRE(activation.code >= 0 && activation.code < kActivations, "activation");
  Problem p;
  p.dtype = dtype_of(x, "x");
  p.samples = x.size(0);
  p.channels = x.size(1);
  p.positions = x.numel() / (p.samples * p.channels);
  // With one position per channel the two layouts coincide, and rows are the longer runs.
  p.layout = p.positions > 1 && is_dense(x, false) ? Layout::contiguous : Layout::channels_last;
  p.activation = static_cast<Activation>(activation.code);
  p.a = activation.a;
  p.b = activation.b;
  p.x = data;
  p.core_cache = core_cache;
  return p;
}

using Operator = void (*Kernels::*)(const Problem&, Parallel);

void run(Problem& p, Operator op) {
  // A result stays in the cache for its next reader if all tensors fit.
  static const int64_t last_cache = cache_bytes(3, 32 * 1024 * 1024);
  int64_t tensors = 0;
  for (const void* t : {p.x, p.residual, (const void*)p.y, p.dy, (const void*)p.dx, (const void*)p.dresidual})
    tensors += t != nullptr;
  const int64_t bytes = p.channels * p.per_channel() * bytes_of(p.dtype);
  const void* const written = p.dx ? p.dx : p.dresidual ? p.dresidual : p.y;
  p.large = tensors * bytes > last_cache / 2;
  p.streaming = p.large && written && has_pages(written, bytes);
  const Kernels& kernels = active_kernels(p.dtype);
  Doubles scratch(op == &Kernels::transpose ? 0 : kernels.scratch_doubles(p));
  p.scratch = scratch.data();
  (kernels.*op)(p, {p.is_small() ? run_serially : run_in_parallel});
}

// x as the kernels take it: a copy unless it already lies as one of the two layouts.
Placed dense(const Tensor& x, const char* name) {
  REQUIRE(x.is_cpu() && x.dim() >= 2 && x.numel() > 0, "x");
  if (is_dense(x, false) || is_dense(x, true)) return aligned(x, name);
  memory_of(x, name);
  Tensor copy = torch::stable::contiguous(x);
  return {copy, memory_of(copy, name)};
}

// t in x's layout, copied if need be: gradients often arrive in another memory format, or expanded.
Placed laid_out_as(const Tensor& t, const Tensor& x, const char* name) {
  REQUIRE(dtype_code(t) == dtype_code(x) && t.is_cpu(), name);
  REQUIRE(same_shape(t, x), name);
  const bool channels_last = !is_dense(x, false);
  void* const data = memory_of(t, name);
  const bool readable = is_aligned(data, bytes_of(dtype_of(t, name)));
  if (readable && is_dense(t, channels_last)) return {t, data};
  Tensor result = empty_as(x);
  if (readable && is_dense(t, !channels_last)) {
    Problem p = problem_of(t, data, {});
    p.y = memory_of(result, name);
    run(p, &Kernels::transpose);
  } else {
    copy(result, t, name);
  }
  return {result, memory_of(result, name)};
}

// The tensors of a running operator, in x's layout.
struct Operands {
  const Tensor x;
  Problem p;
  Vectors vectors;
  std::optional<Placed> dy, y, residual;
  std::vector<Placed> copies;  // of moments that kernels can't read

  Operands(const Tensor& given, Act activation, const char* name = "x") : Operands(dense(given, name), activation) {}
  Operands(const Placed& given, Act activation)
      : x(given.tensor), p(problem_of(x, given.data, activation)), vectors(p.channels) {}

  void take_affine(const Optional& weight, const Optional& bias) {
    p.weight = vectors.take(weight, "weight");
    p.bias = vectors.take(bias, "bias");
  }

  void take_residual(const Optional& given) {
    if (given) residual = laid_out_as(*given, x, "residual"), p.residual = residual->data;
  }

  void take_gradient(const Tensor& given, const Optional& given_y, const Optional& given_residual) {
    dy = laid_out_as(given, x, "dy"), p.dy = dy->data;
    if (given_y) y = laid_out_as(*given_y, x, "y"), p.y = y->data;
    take_residual(given_residual);
  }

  // Takes the mask of values that count. In results the others are copied from `padding`, or are 0. Any byte but 0 is
  // True, as in a view of an image's bytes.
  void take_mask(const Optional& mask, const void* padding) {
    p.count = static_cast<double>(p.per_channel());
    if (!mask) return;
    REQUIRE(dtype_code(*mask) == aoti_torch_dtype_bool() && mask->is_cpu() && mask->is_contiguous(), "mask");
    REQUIRE(mask->numel() == p.per_channel(), "mask");
    p.mask = static_cast<const unsigned char*>(memory_of(*mask, "mask"));
    int64_t count = 0;
    for (int64_t i = 0; i < p.per_channel(); ++i) count += p.mask[i] != 0;
    p.count = static_cast<double>(count);
    p.padding = padding;
  }

  double* rows(const Tensor& t, int64_t count, const char* name) {
    REQUIRE(dtype_code(t) == aoti_torch_dtype_float64() && t.is_cpu() && t.is_contiguous(), name);
    REQUIRE(t.numel() == count * p.channels, name);
    void* data = memory_of(t, name);
    if (!is_aligned(data, sizeof(double))) data = copies.emplace_back(aligned(t, name)).data;
    return static_cast<double*>(data);
  }

  void take_moments(const Tensor& saved) { set_moments(rows(saved, 3, "saved")); }
  void set_moments(double* saved) { p.mean = saved, p.var = saved + p.channels, p.rstd = saved + 2 * p.channels; }
};

}  // namespace
