// Batch normalization and its derivatives by their formulas in double, each value with what bounds its error.
//
// A value that takes a few roundings of terms is right within kFew roundings of the sum of their magnitudes. What is
// added up in float takes up to kSummed values before it goes on in double.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "cases.h"

namespace native {

constexpr double kFew = 8, kSummed = 16;

struct Expected {
  double value, error;  // what is right, and how far off a result may be
};

class Definition {
 public:
  // mean and rstd are those that the operator was given, or that it computed.
  Definition(const Case& c, const Numbers& numbers, std::vector<double> mean, std::vector<double> rstd)
      : c_(c),
        in_(numbers),
        mean_(std::move(mean)),
        rstd_(std::move(rstd)),
        format_(format_of(c.dtype)),
        kinks_(c.function.kinks()) {}

  // The moments of a channel, two passes.
  static void moments(const Case& c, const Numbers& in, int64_t channel, Expected& mean, Expected& var) {
    const double u = format_of(c.dtype).arithmetic;
    Sum total, squares, count;
    each(c, channel, [&](int64_t i, int64_t at) {
      if (!c.mask || in.mask[at]) total.add(in.x[i]), count.add(1);
    });
    mean.value = total.value() / count.value();
    each(c, channel, [&](int64_t i, int64_t at) {
      const double d = in.x[i] - mean.value;
      if (!c.mask || in.mask[at]) squares.add(d * d);
    });
    var.value = squares.value() / count.value();
    // d is taken from a number within a deviation of the mean.
    const double few = kFew + addends(c), ulp = 0x1p-52 * std::fabs(mean.value);
    mean.error = few * u * 2 * std::sqrt(var.value) + 2 * ulp;
    var.error = few * u * 4 * var.value + 4 * ulp * ulp;
  }

  Expected y(int64_t channel, int64_t i) const {
    const double v = before(channel, i), size = terms(channel, i), u = format_.arithmetic;
    const double value = c_.function.value(v), reach = kFew * u * size;
    double error = kFew * u * (c_.function.steepness() * size + std::fabs(value)) + stored(value);
    if (near_kink(v, reach)) error += std::fabs(c_.function.value(v + reach) - c_.function.value(v - reach));
    return {value, error};
  }

  // The gradient before the activation. dy is zero where rounding may decide on the slope: see quiet_kinks.
  Expected g(int64_t channel, int64_t i) const {
    const double value = in_.dy[i] * c_.function.slope(before(channel, i));
    return {value, kFew * format_.arithmetic * g_size(channel, i)};
  }

  Expected dresidual(int64_t channel, int64_t i) const {
    const Expected found = g(channel, i);
    return {found.value, found.error + stored(found.value)};
  }

  void sums(int64_t channel, Expected& sum_g, Expected& sum_gxhat) const {
    Sum first, second, first_size, second_size;
    each(c_, channel, [&](int64_t i, int64_t) {
      const double value = g(channel, i).value, size = g_size(channel, i);
      first.add(value), first_size.add(size);
      second.add(value * xhat(channel, i)), second_size.add(size * xhat_size(channel, i));
    });
    const double few = (kFew + addends(c_)) * format_.arithmetic;
    sum_g = {first.value(), few * first_size.value()};
    sum_gxhat = {second.value(), few * second_size.value()};
  }

  // From the sums that the operator was given, or that it computed.
  Expected dx(int64_t channel, int64_t i, double sum_g, double sum_gxhat, double count) const {
    const double gain = scale(channel), few = kFew * format_.arithmetic;
    double value = g(channel, i).value, size = g_size(channel, i);
    if (c_.training) {
      value -= sum_g / count + xhat(channel, i) * sum_gxhat / count;
      size += std::fabs(sum_g) / count + xhat_size(channel, i) * std::fabs(sum_gxhat) / count;
    }
    value *= gain;
    // The first pass may keep g, in the dtype, for the second.
    const double kept = c_.op == Op::backward ? stored(g(channel, i).value) : 0;
    return {value, std::fabs(gain) * (few * size + kept) + stored(value)};
  }

  // The x whose image is y.
  Expected inverse(int64_t channel, double y) const {
    const Function& f = c_.function;
    double v = y, size = std::fabs(y);
    if (y < 0 && f.which == Activation::leaky_relu) v = y / f.a, size = std::fabs(v);
    if (y < 0 && f.which == Activation::elu) v = std::log1p(y / f.a), size = std::fabs(v) + std::fabs(y / (f.a + y));
    const double bias = c_.bias ? in_.bias[channel] : 0, d = (v - bias) / scale(channel);
    const double value = d + mean_[channel], few = kFew * format_.arithmetic;
    const double error =
        few * (size + std::fabs(bias)) / std::fabs(scale(channel)) + format_.arithmetic * std::fabs(value);
    return {value, error + stored(value)};
  }

  // Sets dy to zero where a rounding may turn the gate.
  void quiet_kinks(Numbers& numbers) const {
    for (int64_t channel = 0; channel < c_.shape.channels; ++channel)
      each(c_, channel, [&](int64_t i, int64_t) {
        const double reach = kFew * format_.arithmetic * terms(channel, i) + format_.tiny();
        if (near_kink(before(channel, i), reach)) numbers.dy[i] = 0;
      });
  }

  // Calls body(index in N, C, S; index in N, S) for the values of a channel.
  template <class Body>
  static void each(const Case& c, int64_t channel, const Body& body) {
    for (int64_t n = 0; n < c.shape.samples; ++n)
      for (int64_t s = 0; s < c.shape.positions; ++s)
        body((n * c.shape.channels + channel) * c.shape.positions + s, n * c.shape.positions + s);
  }

 private:
  const Case& c_;
  const Numbers& in_;
  std::vector<double> mean_, rstd_;
  const Format& format_;
  const std::vector<double> kinks_;

  // How many roundings in a row a sum takes.
  static double addends(const Case& c) {
    const double count = static_cast<double>(c.shape.samples * c.shape.positions);
    return c.dtype == Dtype::f64 ? std::sqrt(count) : kSummed;
  }

  double scale(int64_t channel) const { return rstd_[channel] * (c_.weight ? in_.weight[channel] : 1); }
  double xhat(int64_t channel, int64_t i) const { return (in_.x[i] - mean_[channel]) * rstd_[channel]; }
  // The loops subtract the mean as it is rounded to their arithmetic, and correct the rest later.
  double xhat_size(int64_t channel, int64_t i) const {
    return std::fabs(xhat(channel, i)) + format_.arithmetic * std::fabs(mean_[channel]) * rstd_[channel];
  }
  double before(int64_t channel, int64_t i) const {
    return (in_.x[i] - mean_[channel]) * scale(channel) + (c_.bias ? in_.bias[channel] : 0) +
           (c_.residual ? in_.residual[i] : 0);
  }
  double terms(int64_t channel, int64_t i) const {
    return xhat_size(channel, i) * std::fabs(scale(channel) / rstd_[channel]) +
           (c_.bias ? std::fabs(in_.bias[channel]) : 0) + (c_.residual ? std::fabs(in_.residual[i]) : 0);
  }
  double g_size(int64_t channel, int64_t i) const {
    return std::fabs(in_.dy[i]) * (c_.function.steepness() + c_.function.curvature() * terms(channel, i));
  }
  // What writing a result in the dtype may cost.
  double stored(double value) const { return 1.01 * (format_.roundoff() * std::fabs(value) + format_.tiny() / 2); }

  bool near_kink(double v, double reach) const {
    return std::any_of(kinks_.begin(), kinks_.end(), [&](double kink) { return std::fabs(v - kink) <= reach; });
  }
};

}  // namespace native
