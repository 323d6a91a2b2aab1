// The activations by their formulas, and what bounds an error of theirs.
#pragma once

#include <cmath>
#include <vector>

#include "problem.h"

namespace native {

using keelnorm::Activation;

constexpr double kRootHalf = 0.70710678118654752440, kRootTwoOverPi = 0.79788456080286535588;

struct Function {
  Activation which;
  double a = 0, b = 0;

  double value(double v) const {
    switch (which) {
      case Activation::none:
        return v;
      case Activation::relu:
        return v > 0 ? v : 0;
      case Activation::relu6:
        return v > 6 ? 6 : v > 0 ? v : 0;
      case Activation::leaky_relu:
        return v > 0 ? v : a * v;
      case Activation::elu:
        return v > 0 ? v : a * std::expm1(v);
      case Activation::silu:
        return v * logistic(v);
      case Activation::gelu:
        return v * 0.5 * std::erfc(-v * kRootHalf);
      case Activation::gelu_tanh:
        return v * logistic(2 * inner(v));
      case Activation::hardswish:
        return v * clamped(v / 6 + 0.5);
      case Activation::hardsigmoid:
        return clamped(v / 6 + 0.5);
      case Activation::sigmoid:
        return logistic(v);
      case Activation::tanh:
        return std::tanh(v);
      case Activation::mish:
        return v * std::tanh(log1p_exp(v));
      case Activation::softplus:
        return v * a > b ? v : log1p_exp(v * a) / a;
    }
    return NAN;
  }

  double slope(double v) const {
    switch (which) {
      case Activation::none:
        return 1;
      case Activation::relu:
        return v > 0;
      case Activation::relu6:
        return v > 0 && v < 6;
      case Activation::leaky_relu:
        return v > 0 ? 1 : a;
      case Activation::elu:
        return v > 0 ? 1 : a * std::exp(v);
      case Activation::silu:
        return logistic(v) * (1 + v * logistic(-v));
      case Activation::gelu:
        return 0.5 * std::erfc(-v * kRootHalf) + v * 0.5 * kRootTwoOverPi * std::exp(-0.5 * v * v);
      case Activation::gelu_tanh: {
        const double p = logistic(2 * inner(v)), q = logistic(-2 * inner(v));
        return p + v * 2 * p * q * kRootTwoOverPi * (1 + 3 * 0.044715 * v * v);
      }
      case Activation::hardswish:
        return v <= -3 ? 0 : v >= 3 ? 1 : v / 3 + 0.5;
      case Activation::hardsigmoid:
        return v > -3 && v < 3 ? 1.0 / 6 : 0;
      case Activation::sigmoid:
        return logistic(v) * logistic(-v);
      case Activation::tanh:
        return 1 / (std::cosh(v) * std::cosh(v));
      case Activation::mish: {
        const double t = std::tanh(log1p_exp(v));
        return t + v * (1 - t * t) * logistic(v);
      }
      case Activation::softplus:
        return v * a > b ? 1 : logistic(v * a);
    }
    return NAN;
  }

  // Where value or slope jumps, and a rounding decides on the side.
  std::vector<double> kinks() const {
    switch (which) {
      case Activation::relu:
      case Activation::leaky_relu:
      case Activation::elu:
        return {0};
      case Activation::relu6:
        return {0, 6};
      case Activation::hardswish:
      case Activation::hardsigmoid:
        return {-3, 3};
      case Activation::softplus:
        return {b / a};
      default:
        return {};
    }
  }

  // By how much the value changes at most, and the slope away from kinks, when v changes by one.
  double steepness() const {
    return which == Activation::leaky_relu || which == Activation::elu ? std::fmax(1.2, a) : 1.2;
  }
  double curvature() const {
    const bool straight = which == Activation::none || which == Activation::relu || which == Activation::relu6 ||
                          which == Activation::leaky_relu || which == Activation::hardsigmoid;
    if (which == Activation::gelu_tanh) return 4;  // the cubic inside multiplies roundings
    return straight ? 0 : which == Activation::elu || which == Activation::softplus ? std::fmax(1, a) : 1;
  }

 private:
  static double logistic(double v) {
    const double e = std::exp(-std::fabs(v));
    return v > 0 ? 1 / (1 + e) : e / (1 + e);
  }
  static double log1p_exp(double v) { return std::fmax(v, 0) + std::log1p(std::exp(-std::fabs(v))); }
  static double inner(double v) { return kRootTwoOverPi * (v + 0.044715 * v * v * v); }
  static double clamped(double v) { return std::fmin(std::fmax(v, 0), 1); }
};

inline const char* name_of(Activation activation) {
#define KEELNORM_STRING(name, function, inverse) #name,
  static const char* const names[] = {KEELNORM_ACTIVATIONS(KEELNORM_STRING)};
#undef KEELNORM_STRING
  return names[static_cast<int>(activation)];
}

}  // namespace native
