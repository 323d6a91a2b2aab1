// Every activation's vector function against its formula, compiled for one instruction set and dtype.
#include <cstdio>

#include "activations.h"
#include "functions.h"

int main() {
  int wrong = 0;
  for (int64_t code = 0; code < keelnorm::kActivations; ++code)
    for (double v = -8; v < 8; v += 0.37) {
      const native::Function formula{static_cast<keelnorm::Activation>(code), 0.5, 3};
      const Parameters p{0.5, 3};
      const double value = kFunctions[code].value(splat(static_cast<Value>(v)), p)[0];
      const double slope = kFunctions[code].derivative(splat(static_cast<Value>(v)), p)[0];
      if (std::fabs(value - formula.value(v)) + std::fabs(slope - formula.slope(v)) < 1e-5) continue;
      std::printf("%s at %g: %g and %g\n", native::name_of(formula.which), v, value, slope);
      wrong = 1;
    }
  std::printf("%s\n", native::name_of(static_cast<keelnorm::Activation>(keelnorm::kActivations - 1)));
  return wrong;
}
