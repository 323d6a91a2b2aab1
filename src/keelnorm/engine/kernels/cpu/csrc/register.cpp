// The operators that torch calls: they check tensors, allocate results and call the kernels. Only this file, groups.h,
// operands.h, tensors.h and storage.h know torch, through LibTorch's stable ABI, so that one binary serves several
// versions. The schemas are in keelnorm/engine/ops.py.
//
// For a case that the native kernels do not cover, an operator raises an error that begins with "keelnorm:
// unsupported", before it writes anything; Python then takes the reference back end.
#include <tuple>

#include "groups.h"
#include "operands.h"
#include "running.h"

namespace {

// ---- the four operators

Tensor stats(const Tensor& x, const Optional& mask) {
  Operands o(x, {});
  o.take_mask(mask, nullptr);
  Tensor moments = empty_rows(2, o.p.channels);
  o.p.mean = doubles(moments, "moments");
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
  o.p.y = memory_of(y, "y");
  run(o.p, &Kernels::apply);
  return y;
}

Tensor finish(const Tensor& x, const Tensor& saved, const Optional& weight, const Optional& bias,
              const Optional& residual, int64_t activation, double a, double b) {
  Operands o(x, {activation, a, b});
  o.take_moments(saved);
  o.take_affine(weight, bias);
  o.take_residual(residual);
  Tensor y = empty_as(o.x);
  o.p.y = memory_of(y, "y");
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
  o.p.sum_g = doubles(sums, "sums");
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
  o.p.dx = memory_of(dx, "dx");
  run(o.p, &Kernels::grad_input);
  return dx;
}

// ---- the fused operators

// The running statistics and their options. In training with `update` a forward updates them and the number of batches;
// without a momentum they average over all batches so far.
struct Buffers {
  const Optional &mean, &var, &batches, &counts;
  bool training, update;
  std::optional<double> momentum;
  double eps;
};

// The running statistics as doubles, which put_running writes back.
struct Running {
  double *mean, *var;
  int64_t* batches;  // where they are counted
  bool update;
  std::optional<Placed> counter, counts;  // written by the kernels
};

Running take_running(Operands& o, const Buffers& buffers) {
  Problem& p = o.p;
  Running running{o.vectors.take(buffers.mean, "running_mean"),
                  o.vectors.take(buffers.var, "running_var"),
                  nullptr,
                  buffers.training && buffers.update,
                  {},
                  {}};
  const bool has_moments = running.mean;
  REQUIRE(has_moments == (running.var != nullptr) && (buffers.training || has_moments), "running statistics");
  if (buffers.batches && running.update) {
    const Tensor& t = *buffers.batches;
    REQUIRE(dtype_code(t) == aoti_torch_dtype_int64() && t.numel() == 1 && t.is_cpu(), "num_batches_tracked");
    running.counter = aligned(t, "num_batches_tracked");
    running.batches = static_cast<int64_t*>(running.counter->data);
  }
  REQUIRE(!running.update || !has_moments || buffers.momentum || running.batches,
          "momentum None without num_batches_tracked");
  if (buffers.counts && running.update) {
    const Tensor& t = *buffers.counts;
    REQUIRE(dtype_code(t) == aoti_torch_dtype_int64() && t.numel() == 3 * p.channels && t.is_cpu() && t.is_contiguous(),
            "update counts");
    running.counts = aligned(t, "update counts");
    p.counts = static_cast<int64_t*>(running.counts->data);
  }
  p.momentum = buffers.momentum.value_or(0);
  if (!buffers.momentum) p.batches = running.batches;
  p.training = buffers.training;
  p.eps = buffers.eps;
  if (running.update && has_moments) {
    p.running_mean = running.mean, p.running_var = running.var;
    p.mean_below = keelnorm::infinite_from(dtype_of(*buffers.mean, "running_mean"));
    p.var_below = keelnorm::infinite_from(dtype_of(*buffers.var, "running_var"));
  }
  return running;
}

void put_running(const Buffers& buffers, const Running& running) {
  if (running.update && running.mean) {
    put(*buffers.mean, running.mean, "running_mean");
    put(*buffers.var, running.var, "running_var");
  }
  if (running.counter) put_back(*buffers.batches, running.counter->tensor, "num_batches_tracked");
  if (running.counts) put_back(*buffers.counts, running.counts->tensor, "update counts");
}

Tensor run_forward(Operands& o, const Buffers& buffers,
                   decltype(Kernels::forward) Kernels::* kernel = &Kernels::forward) {
  Problem& p = o.p;
  const Running running = take_running(o, buffers);
  Tensor saved = empty_rows(3, p.channels);
  o.set_moments(doubles(saved, "saved"));
  if (!p.training)
    for (int64_t c = 0; c < p.channels; ++c) p.mean[c] = running.mean[c], p.var[c] = running.var[c];
  run(p, kernel);
  if (running.batches && p.count > 1) ++*running.batches;
  put_running(buffers, running);
  return saved;
}

std::tuple<Tensor, Tensor> forward_(const Tensor& x, const Optional& residual, const Optional& weight,
                                    const Optional& bias, const Optional& running_mean, const Optional& running_var,
                                    const Optional& num_batches_tracked, bool training, bool update,
                                    std::optional<double> momentum, double eps, int64_t activation, double a, double b,
                                    const Optional& counts, const Optional& mask, bool keep) {
  Operands o(x, {activation, a, b});
  o.take_affine(weight, bias);
  o.take_residual(residual);
  o.take_mask(mask, keep ? o.p.x : nullptr);
  Tensor y = empty_as(o.x);
  o.p.y = memory_of(y, "y");
  Tensor saved =
      run_forward(o, {running_mean, running_var, num_batches_tracked, counts, training, update, momentum, eps});
  return {y, saved};
}

// As forward_, without y.
Tensor measure_(const Tensor& x, const Optional& running_mean, const Optional& running_var,
                const Optional& num_batches_tracked, bool training, bool update, std::optional<double> momentum,
                double eps, const Optional& counts) {
  Operands o(x, {});
  o.take_mask({}, nullptr);
  return run_forward(o, {running_mean, running_var, num_batches_tracked, counts, training, update, momentum, eps},
                     &Kernels::measure);
}

// Training only. The running statistics are updated once, with all groups pooled, or group by group.
std::tuple<Tensor, Tensor> forward_groups_(const Tensor& x, const Optional& residual, const Optional& weight,
                                           const Optional& bias, const Optional& running_mean,
                                           const Optional& running_var, const Optional& num_batches_tracked,
                                           int64_t group_count, int64_t group_size, bool pooled, bool update,
                                           std::optional<double> momentum, double eps, int64_t activation, double a,
                                           double b, const Optional& counts) {
  Operands o(x, {activation, a, b});
  Problem& p = o.p;
  const Groups groups = groups_of(p, group_count, group_size);
  o.take_affine(weight, bias);
  o.take_residual(residual);
  const Buffers buffers{running_mean, running_var, num_batches_tracked, counts, true, update, momentum, eps};
  const Running running = take_running(o, buffers);
  Tensor y = empty_as(o.x);
  p.y = memory_of(y, "y");
  Tensor saved = empty_rows(groups.count * 3, p.channels);
  o.set_moments(doubles(saved, "saved"));
  Doubles merged(pooled ? 2 * p.channels : 0);
  for (int64_t g = 0; g < groups.count; ++g) {
    Problem part = groups.part(p, g);
    if (pooled) part.running_mean = part.running_var = nullptr;
    run(part, &Kernels::forward);
    if (!pooled && running.batches) ++*running.batches;
  }
  if (pooled && p.running_mean) {
    merge(groups, p, merged.data(), merged.data() + p.channels);
    p.mean = merged.data(), p.var = p.mean + p.channels;
    keelnorm::update_running(p, static_cast<double>(p.per_channel()), 0, p.channels);
  }
  if (pooled && running.batches) ++*running.batches;
  put_running(buffers, running);
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
                const Optional& counts) {
  REQUIRE(is_dense(x, false) || is_dense(x, true), "x in place");
  Operands o(x, {activation, a, b});
  o.take_affine(weight, bias);
  o.take_mask({}, nullptr);
  o.p.y = memory_of(o.x, "x");
  Tensor saved =
      run_forward(o, {running_mean, running_var, num_batches_tracked, counts, training, update, momentum, eps});
  put_back(x, o.x, "x");
  return saved;
}

Tensor invert(const Tensor& y, const Tensor& saved, const Optional& weight, const Optional& bias, int64_t activation,
              double a, double b) {
  Operands o(y, {activation, a, b}, "y");
  REQUIRE(keelnorm::kHasInverse[activation], "activation");
  o.take_affine(weight, bias);
  o.take_moments(saved);
  o.p.y = memory_of(o.x, "y");
  Tensor x = empty_as(o.x);
  o.p.dx = memory_of(x, "x");
  run(o.p, &Kernels::invert);
  return x;
}

Tensor undefined() { return Tensor(); }

// A gradient per channel, in double for double x, else in float.
Tensor rounded(const double* values, int64_t size, Dtype dtype) {
  const int64_t stride = 1;
  const int32_t wide = torch_dtype(dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32);
  Tensor result = empty_strided(&size, &stride, 1, wide);
  put(result, values, "a gradient");
  return result;
}

// Runs the backward group by group; returns the gradients of weight and bias, where they are needed.
std::tuple<Tensor, Tensor> run_backward(Operands& o, const Groups& groups, bool need_weight, bool need_bias) {
  Problem& p = o.p;
  // The pass that computes the sums also writes the residual's gradient; for ReLU the second pass writes it.
  const bool pass = p.dresidual && (!p.dx || p.activation != Activation::relu);
  const bool need_sums = need_weight || need_bias || pass || (p.training && p.dx);
  Doubles totals(need_sums ? 2 * p.channels : 0), sums(need_sums && groups.count > 1 ? 2 * p.channels : 0);
  for (int64_t g = 0; (need_sums || p.dx) && g < groups.count; ++g) {
    Problem part = groups.count > 1 ? groups.part(p, g) : p;
    if (need_sums) part.sum_g = (g ? sums : totals).data(), part.sum_gxhat = part.sum_g + p.channels;
    run(part, &Kernels::backward);
    for (int64_t i = 0; need_sums && g && i < 2 * p.channels; ++i) totals.data()[i] += sums.data()[i];
  }
  return {need_weight ? rounded(totals.data() + p.channels, p.channels, p.dtype) : undefined(),
          need_bias ? rounded(totals.data(), p.channels, p.dtype) : undefined()};
}

// dx, dresidual, dweight, dbias; those that are not needed are undefined tensors (None in Python).
std::tuple<Tensor, Tensor, Tensor, Tensor> backward_of(Operands& o, const Groups& groups, const Tensor& saved,
                                                       const Tensor& dy, const Optional& weight, const Optional& bias,
                                                       const Optional& y, const Optional& residual, bool need_input,
                                                       bool need_residual, bool need_weight, bool need_bias,
                                                       const Optional& mask, bool keep) {
  // Without an activation the residual's gradient is dy itself: nothing to compute.
  REQUIRE(!need_residual || ((y || residual) && o.p.activation != Activation::none),
          "the gradient of a residual without its activation");
  o.take_affine(weight, bias);
  o.set_moments(o.rows(saved, 3 * groups.count, "saved"));
  o.take_gradient(dy, y, residual);
  o.take_mask(mask, keep ? o.p.dy : nullptr);
  Tensor dx = need_input ? empty_as(o.x) : undefined();
  Tensor dresidual = need_residual ? empty_as(o.x) : undefined();
  if (need_input) o.p.dx = memory_of(dx, "dx");
  if (need_residual) o.p.dresidual = memory_of(dresidual, "dresidual");
  auto [dweight, dbias] = run_backward(o, groups, need_weight, need_bias);
  return {dx, dresidual, dweight, dbias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dy, const Tensor& x, const Tensor& saved,
                                                    const Optional& weight, const Optional& bias, const Optional& y,
                                                    const Optional& residual, bool training, int64_t activation,
                                                    double a, double b, bool need_input, bool need_residual,
                                                    bool need_weight, bool need_bias, const Optional& mask, bool keep) {
  Operands o(x, {activation, a, b});
  o.p.training = training;
  return backward_of(o, {}, saved, dy, weight, bias, y, residual, need_input, need_residual, need_weight, need_bias,
                     mask, keep);
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
  o.p.dx = memory_of(o.x, "x");
  auto gradients = run_backward(o, {}, need_weight, need_bias);
  put_back(x, o.x, "x");
  return gradients;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_groups(const Tensor& dy, const Tensor& x, const Tensor& saved,
                                                           const Optional& weight, const Optional& bias,
                                                           const Optional& y, const Optional& residual,
                                                           int64_t group_count, int64_t group_size, int64_t activation,
                                                           double a, double b, bool need_input, bool need_residual,
                                                           bool need_weight, bool need_bias) {
  Operands o(x, {activation, a, b});
  return backward_of(o, groups_of(o.p, group_count, group_size), saved, dy, weight, bias, y, residual, need_input,
                     need_residual, need_weight, need_bias, {}, false);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(keelnorm, CPU, m) {
  m.impl("stats", TORCH_BOX(&stats));
  m.impl("measure_", TORCH_BOX(&measure_));
  m.impl("apply", TORCH_BOX(&apply));
  m.impl("finish", TORCH_BOX(&finish));
  m.impl("grad_stats", TORCH_BOX(&grad_stats));
  m.impl("grad_input", TORCH_BOX(&grad_input));
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("forward_", TORCH_BOX(&forward_));
  m.impl("inplace_", TORCH_BOX(&inplace_));
  m.impl("invert", TORCH_BOX(&invert));
  m.impl("backward", TORCH_BOX(&backward));
  m.impl("backward_", TORCH_BOX(&backward_));
  m.impl("forward_groups_", TORCH_BOX(&forward_groups_));
  m.impl("backward_groups", TORCH_BOX(&backward_groups));
}
