// How a batch's moments enter the running ones.
#pragma once

#include "problem.h"

namespace evenkeel {

// count: values per channel that p.mean and p.var are of. Channels whose moments are not finite keep their running
// ones.
inline void update_running(const Problem& p, double count, int64_t begin, int64_t end) {
  if (count < 2) return;  // no variance to learn from
  const double unbiased = count / (count - 1), keep = 1.0 - p.momentum;
  for (int64_t c = begin; c < end; ++c) {
    if (!(p.mean[c] - p.mean[c] == 0 && p.var[c] - p.var[c] == 0)) {  // infinite or NaN
      if (p.skipped) ++p.skipped[c];
      continue;
    }
    p.running_mean[c] = keep * p.running_mean[c] + p.momentum * p.mean[c];
    p.running_var[c] = keep * p.running_var[c] + p.momentum * p.var[c] * unbiased;
  }
}

}  // namespace evenkeel
