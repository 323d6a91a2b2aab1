// Updates the running statistics with a batch's moments.
#pragma once

#include <cmath>

#include "problem.h"

namespace keelnorm {

// The smallest value that a dtype stores as infinity, when it is rounded to float first.
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

// count: how many values per channel p.mean and p.var were taken over. A channel keeps its running statistics where a
// new one would not be finite.
inline void update_running(const Problem& p, double count, int64_t begin, int64_t end) {
  if (count < 2) return;  // one value has no variance
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
    const bool taken = std::fabs(mean) < p.mean_below && std::fabs(var) < p.var_below;  // false for NaN too
    if (taken) p.running_mean[c] = mean, p.running_var[c] = var;
    if (!p.counts) continue;
    p.counts[c] += !taken;
    if (p.batches) p.counts[p.channels + c] = so_far + taken, p.counts[2 * p.channels + c] = *p.batches + 1;
  }
}

}  // namespace keelnorm
