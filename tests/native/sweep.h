// Single values through `apply` without a batch: every number of the 16-bit dtypes, and each activation over its range.
#pragma once

#include <string>
#include <vector>

#include "execution.h"

namespace native {

class Sweep {
 public:
  Sweep(Memory& memory, const Kernels& kernels, Dtype dtype) : m_(memory), kernels_(kernels), dtype_(dtype) {}

  // What is wrong, or an empty text.
  std::string identity() {
    std::vector<double> values = {INFINITY, -INFINITY, NAN, 0, format_of(dtype_).tiny(), format_of(dtype_).greatest};
    if (format_of(dtype_).bytes == 2) {
      values.clear();
      for (int bits = 0; bits < 65536; ++bits) {
        const uint16_t half = static_cast<uint16_t>(bits);
        values.push_back(load(&half, 0, dtype_));
      }
    }
    return through({Activation::none}, values, true);
  }

  std::string activation(Function function) {
    std::vector<double> values = {0, -0.0};
    for (double size = 0x1p-20; size < 3000; size *= 1.03) values.push_back(size), values.push_back(-size);
    for (double kink : function.kinks())
      for (int i = -4; i <= 4; ++i)
        values.push_back(kink + i * std::fmax(std::fabs(kink), 0x1p-10) * format_of(dtype_).roundoff());
    for (double& value : values) value = rounded(value, dtype_);
    return through(function, values, false);
  }

 private:
  Memory& m_;
  const Kernels& kernels_;
  const Dtype dtype_;
  const bool flushes_ = std::string("avx512_bf16") == kernels_.name;  // its rounding takes and gives subnormals as 0

  std::string through(Function function, const std::vector<double>& values, bool exactly) {
    Case c;
    c.op = Op::apply, c.dtype = dtype_, c.shape = {1, 1, static_cast<int64_t>(values.size())}, c.function = function;
    c.weight = c.bias = false;
    Numbers numbers(c);
    numbers.x = values;
    const Given given{{0}, {1}, {1}, {}, {}, {}};
    Execution execution(m_, kernels_, c, numbers, given);
    std::string wrong = execution.run(kWays[0].parallel, {}, 512 * 1024);
    if (!wrong.empty()) return wrong;
    const Format& format = format_of(dtype_);
    for (size_t i = 0; i < values.size(); ++i) {
      const double found = load(m_.y.data(), static_cast<int64_t>(i), dtype_), v = values[i];
      double value = exactly ? v : function.value(v);
      if (flushes_ && std::fabs(value) < 0x1p-126) value = 0;
      const double few = 8 * format.arithmetic * (std::fabs(value) + function.steepness() * std::fabs(v));
      const double error = exactly ? 0 : few + 1.01 * (format.roundoff() * std::fabs(value) + format.tiny() / 2);
      if (found == value || (std::isnan(found) && std::isnan(value)) || std::fabs(found - value) <= error) continue;
      char text[160];
      std::snprintf(text, sizeof text, "of %.17g it is %.17g, expected %.17g, allowed %.3g", v, found, value, error);
      return text;
    }
    return "";
  }
};

}  // namespace native
