// Activations: value, derivative and, where there is one, inverse, each as a function of u, the value before the
// activation.
//
// ReLU is compiled into the loops. The others are called through a pointer, once per vector: the call costs little next
// to the vector's memory traffic, and the loops are not compiled for each activation.
#pragma once

#include "math.h"
#include "problem.h"

namespace {

struct Parameters {
  Value a, b;
};

// max(u, 0) that lets NaN through, as torch's ReLU does.
inline Vec relu(Vec u) { return (u < Vec{}) ? Vec{} : u; }

// v, forced into a register. Otherwise the compiler turns a choice between 0 and a value in memory into a masked load,
// which waits for the mask.
inline Vec loaded(Vec v) {
#if defined(__AVX512F__)
  __asm__("" : "+v"(v));
#elif defined(__x86_64__)
  __asm__("" : "+x"(v));
#elif defined(__aarch64__)
  __asm__("" : "+w"(v));
#endif
  return v;
}

// The gradient through ReLU: 0 where its output is <= 0.
inline Vec relu_gate(Vec output, Vec g) { return (output <= Vec{}) ? Vec{} : loaded(g); }

inline Vec choose(IntVec where, Value yes, Value no) { return where ? splat(yes) : splat(no); }
inline Vec clamp(Vec u, Value low, Value high) { return minimum(maximum(u, splat(low)), splat(high)); }

struct Identity {
  static Vec value(Vec u, Parameters) { return u; }
  static Vec derivative(Vec, Parameters) { return splat(1); }
  static Vec inverse(Vec y, Parameters) { return y; }
};

struct Relu {
  static Vec value(Vec u, Parameters) { return relu(u); }
  static Vec derivative(Vec u, Parameters) { return choose(u <= Vec{}, 0, 1); }
};

struct Relu6 {
  static Vec value(Vec u, Parameters) { return clamp(u, 0, 6); }
  static Vec derivative(Vec u, Parameters) { return choose((u <= Vec{}) | (u >= splat(6)), 0, 1); }
};

struct LeakyRelu {
  static Vec value(Vec u, Parameters p) { return (u > Vec{}) ? u : u * p.a; }
  static Vec derivative(Vec u, Parameters p) { return choose(u > Vec{}, 1, p.a); }
  static Vec inverse(Vec y, Parameters p) { return (y > Vec{}) ? y : y / p.a; }
};

struct Elu {
  static Vec value(Vec u, Parameters p) { return (u > Vec{}) ? u : p.a * exponential_minus_1(u); }
  static Vec derivative(Vec u, Parameters p) { return (u > Vec{}) ? splat(1) : p.a * exponential(u); }
  static Vec inverse(Vec y, Parameters p) { return (y > Vec{}) ? y : log_of_1_plus(y / p.a); }
};

struct Silu {
  static Vec value(Vec u, Parameters) { return u * logistic(u); }
  static Vec derivative(Vec u, Parameters) {
    const Vec s = logistic(u);
    return s * ((Value)1 + u * ((Value)1 - s));
  }
};

struct Gelu {
  static Vec value(Vec u, Parameters) { return u * normal(u).cumulative; }
  static Vec derivative(Vec u, Parameters) {
    const Normal n = normal(u);
    return n.cumulative + u * n.density;
  }
};

// u·(1 + tanh(z))/2 with z = √(2/π)·(u + 0.044715·u³); (1 + tanh(z))/2 is the logistic function of 2z.
struct GeluTanh {
  static constexpr Value kTwiceRoot = (Value)(2 * 0.79788456080286535588), kCube = (Value)0.044715;

  static Vec value(Vec u, Parameters) { return u * logistic(kTwiceRoot * (u + kCube * u * u * u)); }
  static Vec derivative(Vec u, Parameters) {
    const Vec v = clamp(u, -10, 10), vv = v * v;  // beyond, the derivative is 0 or 1, and powers would overflow
    const Vec s = logistic(kTwiceRoot * (v + kCube * vv * v));
    return s + v * s * ((Value)1 - s) * (kTwiceRoot * ((Value)1 + 3 * kCube * vv));
  }
};

struct HardSigmoid {
  static Vec value(Vec u, Parameters) { return clamp(u + (Value)3, 0, 6) * (Value)(1.0 / 6); }
  static Vec derivative(Vec u, Parameters) { return choose((u > splat(-3)) & (u < splat(3)), (Value)(1.0 / 6), 0); }
};

struct HardSwish {
  static Vec value(Vec u, Parameters) { return u * clamp(u + (Value)3, 0, 6) * (Value)(1.0 / 6); }
  static Vec derivative(Vec u, Parameters) {
    const Vec inside = u * (Value)(1.0 / 3) + (Value)0.5;
    return (u <= splat(-3)) ? Vec{} : (u < splat(3)) ? inside : splat(1);
  }
};

struct Sigmoid {
  static Vec value(Vec u, Parameters) { return logistic(u); }
  static Vec derivative(Vec u, Parameters) {
    const Vec s = logistic(u);
    return s * ((Value)1 - s);
  }
};

struct Tanh {
  static Vec value(Vec u, Parameters) { return hyperbolic_tangent(u); }
  static Vec derivative(Vec u, Parameters) {
    const Vec t = hyperbolic_tangent(u);
    return (Value)1 - t * t;
  }
};

// u·tanh(log(1 + e^u)). With z = e^-|u| the tangent is (1 + 2z)/(1 + 2z + 2z²), or (z² + 2z)/(z² + 2z + 2) where u < 0.
struct Mish {
  static Vec tangent(Vec u) {
    const Vec z = exponential(-absolute(u)), zz = z * z;
    const Vec above = (Value)1 + (Value)2 * z, below = zz + (Value)2 * z;
    return (u < Vec{}) ? below / (below + (Value)2) : above / (above + (Value)2 * zz);
  }
  static Vec value(Vec u, Parameters) { return u * tangent(u); }
  static Vec derivative(Vec u, Parameters) {
    const Vec t = tangent(u);
    return t + u * ((Value)1 - t * t) * logistic(u);
  }
};

struct Softplus {
  static Vec value(Vec u, Parameters p) {
    const Vec z = u * p.a;
    const Vec soft = (maximum(z, Vec{}) + log_of_1_plus(exponential(-absolute(z)))) / p.a;
    return (z > splat(p.b)) ? u : soft;
  }
  static Vec derivative(Vec u, Parameters p) {
    const Vec z = u * p.a;
    return (z > splat(p.b)) ? splat(1) : logistic(z);
  }
};

typedef Vec (*ActivationFunction)(Vec u, Parameters p);

struct ActivationFunctions {
  ActivationFunction value, derivative, inverse;
};

template <class Function, bool has_inverse>
constexpr ActivationFunctions entry_of() {
  if constexpr (has_inverse)
    return {Function::value, Function::derivative, Function::inverse};
  else
    return {Function::value, Function::derivative, nullptr};
}

#define KEELNORM_FUNCTIONS(name, function, inverse) entry_of<function, inverse>(),
constexpr ActivationFunctions kFunctions[] = {KEELNORM_ACTIVATIONS(KEELNORM_FUNCTIONS)};
#undef KEELNORM_FUNCTIONS

// An activation that is called, bound to its parameters.
struct Called {
  ActivationFunction function;
  Parameters parameters;

  Vec operator()(Vec u) const { return function(u, parameters); }
};

inline Parameters parameters_of(const keelnorm::Problem& p) { return {(Value)p.a, (Value)p.b}; }
inline const ActivationFunctions& functions_of(const keelnorm::Problem& p) { return kFunctions[(int)p.activation]; }
inline Called value_of(const keelnorm::Problem& p) { return {functions_of(p).value, parameters_of(p)}; }
inline Called derivative_of(const keelnorm::Problem& p) { return {functions_of(p).derivative, parameters_of(p)}; }
inline Called inverse_of(const keelnorm::Problem& p) { return {functions_of(p).inverse, parameters_of(p)}; }

}  // namespace
