// How a batch's moments enter the running ones.
#pragma once

#include <cmath>

#include "problem.h"

namespace keelnorm {

// Where values begin that a dtype would store as infinite, when they are rounded to float first.
constexpr double infinite_from(Dtype dtype) {
  switch (dtype) {
    case Dtype::f64:
      return HUGE_VAL;
    case Dtype::f32:
      return 0x1.ffffffp127;
    case Dtype::bf16:
      return 0x1.ffp127 - 0x1p103;
    default:
      return 65520 - 0x1p-9;
  }
}

// count: values per channel that p.mean and p.var are of. Channels of which something not finite would be stored keep
// their running statistics.
inline void update_running(const Problem& p, double count, int64_t begin, int64_t end) {
  if (count < 2) return;  // no variance to learn from
  const double unbiased = count / (count - 1);
  for (int64_t c = begin; c < end; ++c) {
    double momentum = p.momentum;
    int64_t so_far = 0;
    if (p.batches) {
      const bool known = p.counts && p.counts[2 * p.channels + c] == *p.batches;
      so_far = known ? p.counts[p.channels + c] : *p.batches;
      momentum = 1.0 / static_cast<double>(so_far + 1);
    }
    const double mean = (1 - momentum) * p.running_mean[c] + momentum * p.mean[c];
    const double var = (1 - momentum) * p.running_var[c] + momentum * p.var[c] * unbiased;
    const bool taken = std::fabs(mean) < p.mean_below && std::fabs(var) < p.var_below;  // not where it is NaN
    if (taken) p.running_mean[c] = mean, p.running_var[c] = var;
    if (!p.counts) continue;
    p.counts[c] += !taken;
    if (p.batches) p.counts[p.channels + c] = so_far + taken, p.counts[2 * p.channels + c] = *p.batches + 1;
  }
}

}  // namespace keelnorm
