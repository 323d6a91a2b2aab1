// torch's side of the operators: checks tensors, allocates results, calls the kernels. With tensors.h the only file
// that knows torch, through LibTorch's stable ABI, so that one binary serves several versions. The schemas are in
// evenkeel/ops.py.
//
// A case that the native kernels do not cover raises an error that begins with "evenkeel: unsupported" before anything
// was written; Python then takes the reference back end.
#include <tuple>

#include "memory.h"
#include "tensors.h"

namespace {

using Body = void (*)(void*, int64_t, int64_t);

void run_serially(int64_t tasks, Body body, void* context) { body(context, 0, tasks); }

void run_in_parallel(int64_t tasks, Body body, void* context) {
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

// What the activation is called, with its parameters.
struct Act {
  int64_t code;
  double a, b;
};

Problem problem_of(const Tensor& x, Act activation) {
  static const int64_t core_cache = cache_bytes(2, 512 * 1024);
  REQUIRE(x.is_cpu() && x.dim() >= 2 && x.numel() > 0, "x");
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
  p.x = x.data_ptr();
  p.core_cache = core_cache;
  return p;
}

using Operator = void (*Kernels::*)(const Problem&, Parallel);

void run(Problem& p, Operator op) {
  // What is written stays in cache for whoever reads it next, if all that is touched fits.
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

// A contiguous copy of x unless it already lies as one of the two layouts.
Tensor dense(const Tensor& x) { return is_dense(x, false) || is_dense(x, true) ? x : torch::stable::contiguous(x); }

// t laid out as x, copied where it is not: gradients often arrive in another memory format, or expanded.
Tensor laid_out_as(const Tensor& t, const Tensor& x, const char* name) {
  REQUIRE(dtype_code(t) == dtype_code(x) && t.is_cpu(), name);
  REQUIRE(same_shape(t, x), name);
  const bool channels_last = !is_dense(x, false);
  if (is_dense(t, channels_last)) return t;
  Tensor copy = empty_as(x);
  if (is_dense(t, !channels_last)) {
    Problem p = problem_of(t, {});
    p.y = copy.data_ptr();
    run(p, &Kernels::transpose);
  } else {
    torch::stable::copy_(copy, t);
  }
  return copy;
}

// Tensors that live as long as an operator runs, laid out as x.
struct Operands {
  const Tensor x;
  Problem p;
  Vectors vectors;
  Optional dy, y, residual;

  Operands(const Tensor& given, Act activation) : x(dense(given)), p(problem_of(x, activation)), vectors(p.channels) {}

  void take_affine(const Optional& weight, const Optional& bias) {
    p.weight = vectors.take(weight, "weight");
    p.bias = vectors.take(bias, "bias");
  }

  void take_residual(const Optional& given) {
    if (given) residual = laid_out_as(*given, x, "residual"), p.residual = residual->data_ptr();
  }

  void take_gradient(const Tensor& given, const Optional& given_y, const Optional& given_residual) {
    dy = laid_out_as(given, x, "dy"), p.dy = dy->data_ptr();
    if (given_y) y = laid_out_as(*given_y, x, "y"), p.y = y->data_ptr();
    take_residual(given_residual);
  }

  // Which values count, and what the others come out as: what `padding` has there, or 0.
  void take_mask(const Optional& mask, const Tensor* padding) {
    p.count = static_cast<double>(p.per_channel());
    if (!mask) return;
    REQUIRE(dtype_code(*mask) == aoti_torch_dtype_bool() && mask->is_cpu() && mask->is_contiguous(), "mask");
    REQUIRE(mask->numel() == p.per_channel(), "mask");
    p.mask = static_cast<const bool*>(mask->data_ptr());
    int64_t count = 0;
    for (int64_t i = 0; i < p.per_channel(); ++i) count += p.mask[i];
    p.count = static_cast<double>(count);
    if (padding) p.padding = padding->data_ptr();
  }

  double* rows(const Tensor& t, int64_t count, const char* name) const {
    REQUIRE(dtype_code(t) == aoti_torch_dtype_float64() && t.is_cpu() && t.is_contiguous(), name);
    REQUIRE(t.numel() == count * p.channels, name);
    return doubles(t);
  }

  void take_moments(const Tensor& saved) { set_moments(rows(saved, 3, "saved")); }
  void set_moments(double* saved) { p.mean = saved, p.var = saved + p.channels, p.rstd = saved + 2 * p.channels; }
};

// ---- the four operators

Tensor stats(const Tensor& x, const Optional& mask) {
  Operands o(x, {});
  o.take_mask(mask, nullptr);
  Tensor moments = empty_rows(2, o.p.channels);
  o.p.mean = doubles(moments);
  o.p.var = o.p.mean + o.p.channels;
  run(o.p, &Kernels::stats);
  return moments;
}

void take_normalization(Operands& o, const Tensor& mean, const Tensor& rstd, const Optional& weight,
                        const Optional& bias) {
  o.p.mean = o.rows(mean, 1, "mean");
  o.p.rstd = o.rows(rstd, 1, "rstd");
  o.take_affine(weight, bias);
}

Tensor apply(const Tensor& x, const Tensor& mean, const Tensor& rstd, const Optional& weight, const Optional& bias,
             const Optional& residual, int64_t activation, double a, double b) {
  Operands o(x, {activation, a, b});
  take_normalization(o, mean, rstd, weight, bias);
  o.take_residual(residual);
  Tensor y = empty_as(o.x);
  o.p.y = y.data_ptr();
  run(o.p, &Kernels::apply);
  return y;
}

Tensor grad_stats(const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& rstd, const Optional& weight,
                  const Optional& bias, const Optional& y, const Optional& residual, int64_t activation, double a,
                  double b) {
  Operands o(x, {activation, a, b});
  take_normalization(o, mean, rstd, weight, bias);
  o.take_gradient(dy, y, residual);
  Tensor sums = empty_rows(2, o.p.channels);
  o.p.sum_g = doubles(sums);
  o.p.sum_gxhat = o.p.sum_g + o.p.channels;
  run(o.p, &Kernels::grad_stats);
  return sums;
}

Tensor grad_input(const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& rstd, const Optional& weight,
                  const Optional& bias, const Optional& y, const Optional& residual, const Optional& grad_means,
                  int64_t activation, double a, double b) {
  Operands o(x, {activation, a, b});
  take_normalization(o, mean, rstd, weight, bias);
  o.take_gradient(dy, y, residual);
  o.p.training = grad_means.has_value();
  o.p.count = 1;
  if (grad_means) {
    o.p.sum_g = o.rows(*grad_means, 2, "grad_means");
    o.p.sum_gxhat = o.p.sum_g + o.p.channels;
  }
  Tensor dx = empty_as(o.x);
  o.p.dx = dx.data_ptr();
  run(o.p, &Kernels::grad_input);
  return dx;
}

// ---- the fused operators

// What a forward keeps besides y; in training with `update` it also updates the running moments, and the number of
// batches. Without a momentum they average over all batches so far.
struct Buffers {
  const Optional &mean, &var, &batches, &skipped;
  bool training, update;
  std::optional<double> momentum;
  double eps;
};

Tensor run_forward(Operands& o, const Buffers& buffers) {
  Problem& p = o.p;
  double* const mean = o.vectors.take(buffers.mean, "running_mean");
  double* const var = o.vectors.take(buffers.var, "running_var");
  REQUIRE((mean == nullptr) == (var == nullptr) && (buffers.training || mean), "running moments");
  const bool update = buffers.training && buffers.update;
  int64_t* batches = nullptr;
  if (buffers.batches && update) {
    const Tensor& t = *buffers.batches;
    REQUIRE(dtype_code(t) == aoti_torch_dtype_int64() && t.numel() == 1 && t.is_cpu(), "num_batches_tracked");
    batches = static_cast<int64_t*>(t.data_ptr());
  }
  REQUIRE(!update || !mean || buffers.momentum || batches, "momentum None without num_batches_tracked");
  if (buffers.skipped && update) {
    const Tensor& t = *buffers.skipped;
    REQUIRE(dtype_code(t) == aoti_torch_dtype_int64() && t.numel() == p.channels && t.is_cpu() && t.is_contiguous(),
            "skipped_updates");
    p.skipped = static_cast<int64_t*>(t.data_ptr());
  }
  p.momentum = buffers.momentum ? *buffers.momentum : batches ? 1.0 / static_cast<double>(*batches + 1) : 0;
  p.training = buffers.training;
  p.eps = buffers.eps;

  Tensor saved = empty_rows(3, p.channels);
  o.set_moments(doubles(saved));
  if (update) p.running_mean = mean, p.running_var = var;
  if (!p.training)
    for (int64_t c = 0; c < p.channels; ++c) p.mean[c] = mean[c], p.var[c] = var[c];
  run(p, &Kernels::forward);
  if (update && mean) put(*buffers.mean, mean), put(*buffers.var, var);
  if (batches && p.count > 1) ++*batches;
  return saved;
}

std::tuple<Tensor, Tensor> forward_(const Tensor& x, const Optional& residual, const Optional& weight,
                                    const Optional& bias, const Optional& running_mean, const Optional& running_var,
                                    const Optional& num_batches_tracked, bool training, bool update,
                                    std::optional<double> momentum, double eps, int64_t activation, double a, double b,
                                    const Optional& skipped, const Optional& mask, bool keep) {
  Operands o(x, {activation, a, b});
  o.take_affine(weight, bias);
  o.take_residual(residual);
  o.take_mask(mask, keep ? &o.x : nullptr);
  Tensor y = empty_as(o.x);
  o.p.y = y.data_ptr();
  Tensor saved =
      run_forward(o, {running_mean, running_var, num_batches_tracked, skipped, training, update, momentum, eps});
  return {y, saved};
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Optional& residual, const Optional& weight,
                                   const Optional& bias, const Optional& running_mean, const Optional& running_var,
                                   bool training, double eps, int64_t activation, double a, double b) {
  return forward_(x, residual, weight, bias, running_mean, running_var, {}, training, false, {}, eps, activation, a, b,
                  {}, {}, false);
}

// x's memory becomes y.
Tensor inplace_(const Tensor& x, const Optional& weight, const Optional& bias, const Optional& running_mean,
                const Optional& running_var, const Optional& num_batches_tracked, bool training, bool update,
                std::optional<double> momentum, double eps, int64_t activation, double a, double b,
                const Optional& skipped) {
  REQUIRE(is_dense(x, false) || is_dense(x, true), "x in place");
  Operands o(x, {activation, a, b});
  o.take_affine(weight, bias);
  o.take_mask({}, nullptr);
  o.p.y = x.data_ptr();
  return run_forward(o, {running_mean, running_var, num_batches_tracked, skipped, training, update, momentum, eps});
}

Tensor invert(const Tensor& y, const Tensor& saved, const Optional& weight, const Optional& bias, int64_t activation,
              double a, double b) {
  Operands o(y, {activation, a, b});
  o.take_affine(weight, bias);
  o.take_moments(saved);
  o.p.y = o.x.data_ptr();
  Tensor x = empty_as(o.x);
  o.p.dx = x.data_ptr();
  run(o.p, &Kernels::invert);
  return x;
}

Tensor undefined() { return Tensor(); }

// A gradient per channel in double for double x, else in float.
Tensor rounded(const double* values, int64_t size, Dtype dtype) {
  const int64_t stride = 1;
  const int32_t wide = torch_dtype(dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32);
  Tensor result = empty_strided(&size, &stride, 1, wide);
  put(result, values);
  return result;
}

// Runs the backward of all that p asks for; returns the gradients of weight and bias, where they are wanted.
std::tuple<Tensor, Tensor> run_backward(Operands& o, bool need_weight, bool need_bias) {
  Problem& p = o.p;
  // The sums' pass is also what writes the residual's gradient, but for ReLU's in the second one.
  const bool pass = p.dresidual && (!p.dx || p.activation != Activation::relu);
  const bool need_sums = need_weight || need_bias || pass || (p.training && p.dx);
  Doubles sums(need_sums ? 2 * p.channels : 0);
  if (need_sums) p.sum_g = sums.data(), p.sum_gxhat = p.sum_g + p.channels;
  if (need_sums || p.dx) run(p, &Kernels::backward);
  return {need_weight ? rounded(p.sum_gxhat, p.channels, p.dtype) : undefined(),
          need_bias ? rounded(p.sum_g, p.channels, p.dtype) : undefined()};
}

// dx, dresidual, dweight, dbias; those that are not asked for come back undefined (None in Python).
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dy, const Tensor& x, const Tensor& saved,
                                                    const Optional& weight, const Optional& bias, const Optional& y,
                                                    const Optional& residual, bool training, int64_t activation,
                                                    double a, double b, bool need_input, bool need_residual,
                                                    bool need_weight, bool need_bias, const Optional& mask, bool keep) {
  // Without an activation the residual's gradient is dy itself: nothing to compute.
  REQUIRE(!need_residual || ((y || residual) && activation != 0), "the gradient of a residual without its activation");
  Operands o(x, {activation, a, b});
  o.take_affine(weight, bias);
  o.take_moments(saved);
  o.take_gradient(dy, y, residual);
  o.take_mask(mask, keep ? &*o.dy : nullptr);
  o.p.training = training;
  Tensor dx = need_input ? empty_as(o.x) : undefined();
  Tensor dresidual = need_residual ? empty_as(o.x) : undefined();
  if (need_input) o.p.dx = dx.data_ptr();
  if (need_residual) o.p.dresidual = dresidual.data_ptr();
  auto [dweight, dbias] = run_backward(o, need_weight, need_bias);
  return {dx, dresidual, dweight, dbias};
}

// x's memory becomes dx.
std::tuple<Tensor, Tensor> backward_(const Tensor& dy, const Tensor& x, const Tensor& saved, const Optional& weight,
                                     const Optional& bias, bool training, int64_t activation, double a, double b,
                                     bool need_weight, bool need_bias) {
  REQUIRE(is_dense(x, false) || is_dense(x, true), "x in place");
  Operands o(x, {activation, a, b});
  o.take_affine(weight, bias);
  o.take_moments(saved);
  o.take_gradient(dy, {}, {});
  o.take_mask({}, nullptr);
  o.p.training = training;
  o.p.dx = x.data_ptr();
  return run_backward(o, need_weight, need_bias);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(evenkeel, CPU, m) {
  m.impl("stats", TORCH_BOX(&stats));
  m.impl("apply", TORCH_BOX(&apply));
  m.impl("grad_stats", TORCH_BOX(&grad_stats));
  m.impl("grad_input", TORCH_BOX(&grad_input));
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("forward_", TORCH_BOX(&forward_));
  m.impl("inplace_", TORCH_BOX(&inplace_));
  m.impl("invert", TORCH_BOX(&invert));
  m.impl("backward", TORCH_BOX(&backward));
  m.impl("backward_", TORCH_BOX(&backward_));
}
