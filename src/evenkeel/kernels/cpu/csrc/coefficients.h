// Per-channel arithmetic: from sums to moments, and from moments to the few floats that the loops over x need.
//
// A mean in float would cost digits when it is large against the deviation. So the loops subtract a float `center`
// (exactly, where it matters: Sterbenz), and what the rounding of the center left over goes into the shift:
//   y  = (x - center) * scale + shift          with scale = weight * rstd, shift = bias - (mean - center) * scale
//   dx = g * scale + (x - center) * slope + offset
// README.md beside this file has the derivation.
#pragma once

#include "loops.h"
#include "parallel.h"
#include "problem.h"

namespace {

struct Coefficients {
  float *const center, *const scale, *const shift;  // of the forward, C values each
  float *const slope, *const offset;                // of the backward

  static constexpr int64_t doubles(int64_t channels) { return 3 * channels; }

  Coefficients(double* scratch, int64_t channels)
      : center(reinterpret_cast<float*>(scratch)),
        scale(center + channels),
        shift(scale + channels),
        slope(shift + channels),
        offset(slope + channels) {}

  Normalization of(int64_t c) const { return {splat(center[c]), splat(scale[c]), splat(shift[c])}; }

  // Of the channels from c on, one in each lane.
  template <class Lanes>
  Normalization from(int64_t c, Lanes lanes) const {
    return {lanes.load(center + c), lanes.load(scale + c), lanes.load(shift + c)};
  }

  void set_forward(const Problem& p, int64_t begin, int64_t end) const {
    for (int64_t c = begin; c < end; ++c) {
      const double gain = p.weight ? p.rstd[c] * p.weight[c] : p.rstd[c];
      center[c] = (float)p.mean[c];
      scale[c] = (float)gain;
      shift[c] = (float)((p.bias ? p.bias[c] : 0.0) - (p.mean[c] - center[c]) * gain);
    }
  }

  void set_backward(const Problem& p, int64_t begin, int64_t end) const {
    const double share = 1.0 / p.count;
    for (int64_t c = begin; c < end; ++c) {
      if (!p.training) {
        slope[c] = offset[c] = 0;
        continue;
      }
      const double gain = p.weight ? p.rstd[c] * p.weight[c] : p.rstd[c];
      const double along = -gain * p.rstd[c] * p.sum_gxhat[c] * share;
      slope[c] = (float)along;
      offset[c] = (float)(-gain * p.sum_g[c] * share - along * (p.mean[c] - (double)(float)p.mean[c]));
    }
  }
};

// From sums of g * (x - center) to sums of g * xhat.
inline void center_grad_sums(const Problem& p, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; ++c) {
    const double center = (double)(float)p.mean[c];
    p.sum_gxhat[c] = (p.sum_gxhat[c] - (p.mean[c] - center) * p.sum_g[c]) * p.rstd[c];
  }
}

// Sums of d = x - k and d*d to mean and biased variance. False, and nothing is set, where float sums around k have lost
// digits: k lies more than a deviation away from the mean, or squares overflowed or fell out of float's normal range.
// (Sums of exactly zero are those of a constant channel.) share is 1 / M: divisions would cost more than the rest.
inline bool set_moments(const Problem& p, double share, int64_t c, double k, double sum_d, double sum_dd) {
  const double shift = sum_d * share, m2 = sum_dd - sum_d * shift;
  const bool tiny = sum_dd * share < 1e-30 && (sum_dd != 0 || sum_d != 0);
  if (tiny || !(sum_dd - m2 <= m2)) return false;  // also where they are infinite or NaN
  p.mean[c] = k + shift;
  p.var[c] = m2 * share;
  return true;
}

// What follows from mean and var: rstd, and the running moments when the batch's are in use.
inline void finish_moments(const Problem& p, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; ++c) p.rstd[c] = 1.0 / __builtin_sqrt(p.var[c] + p.eps);
  if (!p.training || !p.running_mean) return;
  const double count = (double)p.per_channel(), unbiased = count / (count - 1), keep = 1.0 - p.momentum;
  for (int64_t c = begin; c < end; ++c) {
    p.running_mean[c] = (float)(keep * p.running_mean[c] + p.momentum * p.mean[c]);
    p.running_var[c] = (float)(keep * p.running_var[c] + p.momentum * p.var[c] * unbiased);
  }
}

}  // namespace
