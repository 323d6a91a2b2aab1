// Numbers of the four dtypes as doubles, written out bit by bit so that they do not depend on what a compiler offers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "problem.h"

namespace native {

using keelnorm::Dtype;

struct Format {
  const char* name;
  int64_t bytes;
  int digits;         // of the significand, the leading one included
  int least;          // 2^least is the smallest number above 0
  double arithmetic;  // half a unit in the last place of what sums and coefficients are computed in
  double greatest;

  double roundoff() const { return std::ldexp(1, -digits); }
  double tiny() const { return std::ldexp(1, least); }
};

inline const Format& format_of(Dtype dtype) {
  static const Format formats[] = {
      {"f32", 4, 24, -149, 0x1p-24, 0x1.fffffep127},
      {"f64", 8, 53, -1074, 0x1p-53, 0x1.fffffffffffffp1023},
      {"bf16", 2, 8, -133, 0x1p-24, 0x1.fep127},
      {"f16", 2, 11, -24, 0x1p-24, 65504},
  };
  return formats[static_cast<int>(dtype)];
}

// The nearest number of the dtype, ties to even.
inline double rounded(double value, Dtype dtype) {
  const Format& format = format_of(dtype);
  if (dtype == Dtype::f64 || value == 0 || !std::isfinite(value)) return value;
  int exponent;
  std::frexp(value, &exponent);
  const int last = exponent - format.digits > format.least ? exponent - format.digits : format.least;
  const double result = std::ldexp(std::nearbyint(std::ldexp(value, -last)), last);
  return std::fabs(result) > format.greatest ? std::copysign(INFINITY, value) : result;
}

inline double load(const void* from, int64_t i, Dtype dtype) {
  const char* at = static_cast<const char*>(from) + i * format_of(dtype).bytes;
  if (dtype == Dtype::f64) {
    double value;
    std::memcpy(&value, at, sizeof value);
    return value;
  }
  uint32_t bits = 0;
  if (dtype == Dtype::f32) {
    std::memcpy(&bits, at, 4);
  } else {
    uint16_t half;
    std::memcpy(&half, at, 2);
    if (dtype == Dtype::f16) {
      const int exponent = half >> 10 & 31, fraction = half & 1023;
      const double magnitude = exponent == 31 ? (fraction ? NAN : INFINITY)
                               : exponent     ? std::ldexp(1024 + fraction, exponent - 25)
                                              : std::ldexp(fraction, -24);
      return half >> 15 ? -magnitude : magnitude;
    }
    bits = static_cast<uint32_t>(half) << 16;
  }
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Writes the nearest number of the dtype.
inline void store(void* to, int64_t i, Dtype dtype, double value) {
  char* at = static_cast<char*>(to) + i * format_of(dtype).bytes;
  value = rounded(value, dtype);
  if (dtype == Dtype::f64) {
    std::memcpy(at, &value, 8);
  } else if (dtype == Dtype::f16) {
    const double magnitude = std::fabs(value);
    int exponent;
    std::frexp(magnitude, &exponent);  // magnitude = 0.1... * 2^exponent
    uint16_t half = std::signbit(value) ? 0x8000 : 0;
    if (std::isnan(value))
      half |= 0x7e00;
    else if (std::isinf(value))
      half |= 0x7c00;
    else if (magnitude < 0x1p-14)
      half |= static_cast<uint16_t>(std::ldexp(magnitude, 24));
    else
      half |= static_cast<uint16_t>(((exponent + 14) << 10) + static_cast<int>(std::ldexp(magnitude, 11 - exponent)) -
                                    1024);
    std::memcpy(at, &half, 2);
  } else {
    const float single = static_cast<float>(value);
    uint32_t bits;
    std::memcpy(&bits, &single, 4);
    const uint16_t half = static_cast<uint16_t>(bits >> 16);
    if (dtype == Dtype::f32)
      std::memcpy(at, &bits, 4);
    else
      std::memcpy(at, &half, 2);
  }
}

// The same numbers on every machine (splitmix64).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t bits() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(bits() % static_cast<uint64_t>(n)); }
  bool coin() { return bits() >> 63; }
  double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }
  // Near enough to a normal deviate, with the tails cut at 4.2 deviations.
  double normal() {
    double sum = -3;
    for (int i = 0; i < 6; ++i) sum += uniform();
    return sum * 1.4142135623730951;
  }

 private:
  uint64_t state_;
};

// A sum whose rounding errors are added up beside it (Neumaier).
struct Sum {
  double total = 0, rest = 0;

  void add(double value) {
    const double next = total + value;
    rest += std::fabs(total) >= std::fabs(value) ? (total - next) + value : (value - next) + total;
    total = next;
  }
  double value() const { return total + rest; }
};

}  // namespace native
