// Per-channel arithmetic: from sums to moments, and from moments to the coefficients of the loops over x.
//
// A mean rounded to float loses digits when it is much larger than the standard deviation. So the loops subtract the
// rounded mean, `center`, which is exact for x near it (Sterbenz), and the shift corrects for the rounding:
//   y  = (x - center) * scale + shift          with scale = weight * rstd, shift = bias - (mean - center) * scale
//   dx = g * scale + (x - center) * slope + offset
// README.md in this folder has the derivation.
#pragma once

#include "loops.h"
#include "parallel.h"
#include "problem.h"
#include "running.h"

namespace {

struct Coefficients {
  Value *const center, *const scale, *const shift;  // of the forward, C values each
  Value *const slope, *const offset;                // of the backward

  static constexpr int64_t doubles(int64_t channels) { return 5 * channels; }

  Coefficients(double* scratch, int64_t channels)
      : center(reinterpret_cast<Value*>(scratch)),
        scale(center + channels),
        shift(scale + channels),
        slope(shift + channels),
        offset(slope + channels) {}

  KEELNORM_INLINE Normalization of(int64_t c) const { return {splat(center[c]), splat(scale[c]), splat(shift[c])}; }

  // Of the channels from c on, one in each lane.
  template <class Lanes>
  KEELNORM_INLINE Normalization from(int64_t c, Lanes lanes) const {
    return {lanes.values(center + c), lanes.values(scale + c), lanes.values(shift + c)};
  }

  void set_forward(const Problem& p, int64_t begin, int64_t end) const {
    for (int64_t c = begin; c < end; ++c) {
      const double gain = p.weight ? p.rstd[c] * p.weight[c] : p.rstd[c];
      center[c] = (Value)p.mean[c];
      scale[c] = (Value)gain;
      shift[c] = (Value)((p.bias ? p.bias[c] : 0.0) - (p.mean[c] - center[c]) * gain);
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
      slope[c] = (Value)along;
      offset[c] = (Value)(-gain * p.sum_g[c] * share - along * (p.mean[c] - (double)(Value)p.mean[c]));
    }
  }
};

// From sums of g * (x - center) to sums of g * xhat.
inline void center_grad_sums(const Problem& p, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; ++c) {
    const double center = (double)(Value)p.mean[c];
    p.sum_gxhat[c] = (p.sum_gxhat[c] - (p.mean[c] - center) * p.sum_g[c]) * p.rstd[c];
  }
}

// Sums of d = x - k and d*d to mean and biased variance. Returns false and sets nothing where the sums have lost
// digits: k is more than two standard deviations away from the mean, or squares overflowed or left float's normal
// range. (Sums of exactly zero belong to a constant channel.) share is 1 / M: a division would cost more than all the
// rest.
inline bool set_moments(const Problem& p, double share, int64_t c, double k, double sum_d, double sum_dd) {
  const double shift = sum_d * share, m2 = sum_dd - sum_d * shift;
  const bool tiny = sum_dd * share < 1e-30 && (sum_dd != 0 || sum_d != 0);
  if (tiny || !(sum_dd - m2 <= 4 * m2)) return false;  // also where they are infinite or NaN
  p.mean[c] = k + shift;
  p.var[c] = m2 * share;
  return true;
}

// Mean and variance in two passes of double, for the rare channel whose sums lost digits: value(i) is the channel's
// i-th value, and counts(i) whether it counts.
template <class ValueAt, class Counts>
KEELNORM_SHARED void set_moments_slowly(const Problem& p, double share, int64_t c, const ValueAt& value,
                                        const Counts& counts) {
  double total = 0, m2 = 0;
  for (int64_t i = 0; i < p.per_channel(); ++i)
    if (counts(i)) total += value(i);
  const double mean = total * share;
  double rest = 0;  // corrects the mean for the roundings of the total
  for (int64_t i = 0; i < p.per_channel(); ++i)
    if (counts(i)) rest += value(i) - mean, m2 += (value(i) - mean) * (value(i) - mean);
  p.mean[c] = mean + rest * share;
  p.var[c] = (m2 - rest * rest * share) * share;
}

// A few of the channel's values that count, spread over the batch: their average is near the channel's mean.
struct Spread {
  int64_t count = 0, at[16];

  Spread(const Problem& p, int64_t most) {
    const int64_t values = p.per_channel(), steps = values < most ? values : most;
    for (int64_t k = 0; k < steps; ++k) {
      int64_t i = k * values / steps;
      const int64_t end = (k + 1) * values / steps;
      while (p.mask && i < end && !p.mask[i]) ++i;
      if (i < end) at[count++] = i;
    }
  }
};

// Values per channel that count.
inline int64_t counted(const Problem& p) { return p.mask ? (int64_t)p.count : p.per_channel(); }

// Whether results are stored past the caches. dresidual must then be aligned as dx is.
inline bool streams(const Problem& p) {
  return p.streaming && !p.mask &&
         (!p.dx || !p.dresidual || to_alignment(elements(p.dx)) == to_alignment(elements(p.dresidual)));
}

// Computes rstd from var, and in training updates the running statistics.
inline void finish_moments(const Problem& p, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; ++c) p.rstd[c] = 1.0 / __builtin_sqrt(p.var[c] + p.eps);
  if (p.training && p.running_mean) update_running(p, p.mask ? p.count : (double)p.per_channel(), begin, end);
}

}  // namespace
