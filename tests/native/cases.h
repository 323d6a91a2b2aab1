// What an operator is tried on: a shape and options, drawn at random with a fixed seed, and the numbers they make.
#pragma once

#include <cstdio>
#include <string>
#include <vector>

#include "functions.h"
#include "problem.h"
#include "values.h"

namespace native {

using keelnorm::Layout;

enum class Op { stats, apply, forward, grad_stats, grad_input, backward, invert, transpose };
constexpr Op kOps[] = {Op::stats,      Op::apply,    Op::forward, Op::grad_stats,
                       Op::grad_input, Op::backward, Op::invert,  Op::transpose};

inline const char* name_of(Op op) {
  static const char* const names[] = {"stats",      "apply",    "forward", "grad_stats",
                                      "grad_input", "backward", "invert",  "transpose"};
  return names[static_cast<int>(op)];
}

struct Shape {
  int64_t samples, channels, positions;
};

struct Case {
  uint64_t seed = 0;
  Op op = Op::stats;
  Dtype dtype = Dtype::f32;
  Shape shape{};
  Layout layout = Layout::contiguous;
  Function function{Activation::none};
  bool residual = false, training = true, streaming = false, weight = true, bias = true, mask = false, running = true;
  bool in_place = false;                          // y is x, dx is x
  bool sums = true, dx = true, dresidual = true;  // which results of the backward are wanted
  bool y_kept = false;                            // relu with a residual finds its gate in y
  double offset = 0;                              // mean of x in deviations

  int64_t size() const { return shape.samples * shape.channels * shape.positions; }

  // Where the value of sample n, channel c and position s lies.
  int64_t at(int64_t n, int64_t c, int64_t s) const {
    return layout == Layout::contiguous ? (n * shape.channels + c) * shape.positions + s
                                        : (n * shape.positions + s) * shape.channels + c;
  }

  std::string describe() const {
    char text[400];
    std::snprintf(text, sizeof text,
                  "%s %s N=%lld C=%lld S=%lld %s %s(%g, %g)%s%s%s%s%s%s%s%s%s%s%s%s%s offset=%g seed=%llu", name_of(op),
                  format_of(dtype).name, (long long)shape.samples, (long long)shape.channels,
                  (long long)shape.positions, layout == Layout::contiguous ? "contiguous" : "channels-last",
                  name_of(function.which), function.a, function.b, training ? " training" : " inference",
                  residual ? " residual" : "", streaming ? " streaming" : "", weight ? "" : " no-weight",
                  bias ? "" : " no-bias", mask ? " mask" : "", running ? "" : " no-running",
                  in_place ? " in-place" : "", sums ? "" : " no-sums", dx ? "" : " no-dx",
                  dresidual ? "" : " no-dresidual", y_kept ? " y-kept" : "", "", offset, (unsigned long long)seed);
    return text;
  }
};

// Vectors hold 4 to 32 values: lengths around those, primes, what networks have, long rows and long planes. The last
// ones are large enough for several threads and to be cut into segments and chunks.
inline std::vector<Shape> shapes_of(bool quick) {
  std::vector<Shape> shapes = {{1, 5, 1},   {1, 1, 2},   {2, 1, 1},   {5, 19, 1},  {64, 3, 1},  {7, 5, 7},
                               {1, 6, 9},   {3, 1, 35},  {2, 3, 63},  {2, 65, 2},  {1, 5, 129}, {2, 131, 1},
                               {5, 13, 33}, {3, 18, 6},  {50, 6, 2},  {5, 67, 49}, {1, 110, 6}, {2, 7, 65},
                               {3, 16, 31}, {3, 3, 257}, {2, 37, 127}};
  for (int64_t width : {3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33}) shapes.push_back({3, width, width});
  const std::vector<Shape> large = {{1, 17, 2053}, {40, 1030, 1}, {1, 4, 16411}, {6, 73, 98}, {3, 2, 11000}};
  shapes.insert(shapes.end(), large.begin(), quick ? large.begin() + 3 : large.end());
  if (!quick) {
    for (int64_t width = 1; width <= 40; ++width) shapes.push_back({2, width, 3}), shapes.push_back({2, 3, width});
    shapes.push_back({500, 6, 2}), shapes.push_back({1, 1100, 6}), shapes.push_back({2, 70, 784});
  }
  return shapes;
}

// An activation with the parameters it is tried with.
inline std::vector<Function> variants_of(Activation which) {
  if (which == Activation::leaky_relu) return {{which, 0.01}, {which, 0.3}};
  if (which == Activation::elu) return {{which, 1}, {which, 1.7}};
  if (which == Activation::softplus) return {{which, 1, 20}, {which, 0.5, 20}, {which, 2, 3}};
  return {{which}};
}

inline Case draw_case(uint64_t seed, Op op, Dtype dtype, Shape shape, Activation activation) {
  Random random(seed);
  Case c;
  c.seed = seed, c.op = op, c.dtype = dtype, c.shape = shape;
  c.layout = random.coin() ? Layout::contiguous : Layout::channels_last;
  const std::vector<Function> variants = variants_of(activation);
  c.function = variants[random.below(static_cast<int64_t>(variants.size()))];
  c.residual = random.coin(), c.streaming = random.coin(), c.weight = random.below(4), c.bias = random.below(4);
  c.training = random.coin();
  if (op == Op::forward && shape.samples * shape.positions == 1) c.training = false;
  c.running = !c.training || random.below(3);
  c.mask = op == Op::stats && random.coin();
  c.in_place = random.below(3) == 0;
  if (op == Op::backward) {
    c.dx = random.below(4), c.dresidual = c.residual && activation != Activation::none && random.coin();
    c.sums = (c.training && c.dx) || c.dresidual || random.below(3) || !c.dx;
  }
  const bool backward = op == Op::grad_stats || op == Op::grad_input || op == Op::backward;
  c.y_kept = backward && c.residual && activation == Activation::relu;
  const double offsets[] = {1e6, 1e9, 30, 30};  // beyond these x has no digits left
  const int64_t chosen = random.below(4);
  c.offset = chosen == 0 ? offsets[static_cast<int>(dtype)] : chosen == 1 ? 10 : 0;
  return c;
}

// The numbers, in the order N, C, S; those of the dtype are rounded to it.
struct Numbers {
  std::vector<double> x, residual, dy, weight, bias, mean, var, running_mean, running_var;
  std::vector<char> mask;

  explicit Numbers(const Case& c)
      : x(c.size()), residual(c.size()), dy(c.size()), mask(c.shape.samples * c.shape.positions) {
    Random random(c.seed ^ 0x5eed);
    const int64_t planes = c.shape.samples * c.shape.channels;
    std::vector<double> deviation, center;
    for (int64_t i = 0; i < c.shape.channels; ++i) {
      deviation.push_back(std::exp2(2 * random.uniform() - 1));
      center.push_back(random.coin() ? c.offset : -c.offset);
      const double size = 0.2 + 1.6 * random.uniform();
      weight.push_back(random.coin() ? size : -size);
      bias.push_back(random.normal());
      mean.push_back(deviation[i] * (center[i] + 0.3 * random.normal()));
      var.push_back(std::exp2(2 * random.uniform() - 1));
      running_mean.push_back(mean[i] + random.normal());
      running_var.push_back(std::exp2(2 * random.uniform() - 1));
    }
    for (int64_t plane = 0; plane < planes; ++plane)
      for (int64_t s = 0; s < c.shape.positions; ++s) {
        const int64_t channel = plane % c.shape.channels, i = plane * c.shape.positions + s;
        x[i] = rounded(deviation[channel] * (center[channel] + random.normal()), c.dtype);
        residual[i] = rounded(random.normal(), c.dtype);
        dy[i] = rounded(random.normal(), c.dtype);
      }
    for (char& counts : mask) counts = random.coin() ? static_cast<char>(1 + random.below(255)) : 0;
    mask.front() = mask.back() = 1;
  }
};

}  // namespace native
