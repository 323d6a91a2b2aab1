// Every activation, in the order of TABLE in keelnorm/engine/activations.py: the place in the list is the code that the
// operators take. X(name, struct of activations.h, whether that has an inverse).
#pragma once

#include <cstdint>

#define KEELNORM_ACTIVATIONS(X)      \
  X(none, Identity, true)            \
  X(relu, Relu, false)               \
  X(relu6, Relu6, false)             \
  X(leaky_relu, LeakyRelu, true)     \
  X(elu, Elu, true)                  \
  X(silu, Silu, false)               \
  X(gelu, Gelu, false)               \
  X(gelu_tanh, GeluTanh, false)      \
  X(hardswish, HardSwish, false)     \
  X(hardsigmoid, HardSigmoid, false) \
  X(sigmoid, Sigmoid, false)         \
  X(tanh, Tanh, false)               \
  X(mish, Mish, false)               \
  X(softplus, Softplus, false)

namespace keelnorm {

#define KEELNORM_NAME(name, function, inverse) name,
enum class Activation : int64_t { KEELNORM_ACTIVATIONS(KEELNORM_NAME) };
#undef KEELNORM_NAME

#define KEELNORM_INVERSE(name, function, inverse) inverse,
constexpr bool kHasInverse[] = {KEELNORM_ACTIVATIONS(KEELNORM_INVERSE)};
#undef KEELNORM_INVERSE

constexpr int64_t kActivations = sizeof kHasInverse / sizeof kHasInverse[0];

}  // namespace keelnorm
