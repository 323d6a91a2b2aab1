// The operators for one instruction set and dtype. Compiled once for each, KEELNORM_ISA and KEELNORM_DTYPE naming them.
#include "channels_last.h"
#include "contiguous.h"
#include "transpose.h"

#define KEELNORM_STRING_(a) #a
#define KEELNORM_STRING(a) KEELNORM_STRING_(a)

namespace {

using keelnorm::Activation;
using keelnorm::Kernels;
using keelnorm::Layout;

int64_t calls_ = 0;  // proves which table ran; atomic, because several threads may run layers at once

void count_call() { __atomic_fetch_add(&calls_, 1, __ATOMIC_RELAXED); }
int64_t calls() { return __atomic_load_n(&calls_, __ATOMIC_RELAXED); }

// Calls body with the loops of the problem's layout.
template <class Body>
void with_layout(const Problem& p, const Body& body) {
  if (p.layout == Layout::contiguous)
    body(Contiguous(p));
  else
    body(ChannelsLast(p));
}

int64_t scratch_doubles(const Problem& p) {
  return p.layout == Layout::contiguous ? Contiguous::scratch_doubles(p) : ChannelsLast::scratch_doubles(p);
}

void stats(const Problem& p, Parallel how) {
  count_call();
  with_layout(p, [&](const auto& loops) { loops.stats(how); });
}

void measure(const Problem& p, Parallel how) {
  count_call();
  with_layout(p, [&](const auto& loops) {
    if (p.training) loops.stats(how);
    finish_moments(p, 0, p.channels);
  });
}

// ---- run-time options as types, so that the loops are compiled without branches. Each Make... creates a channel's
// terms or values from its coefficients. They hold pointers by value: anything held by reference would be read again
// after every store.

template <Act act, bool with_residual>
struct MakeOutput {
  const Element *x, *residual;
  Called activation;
  explicit MakeOutput(const Problem& p) : x(elements(p.x)), residual(elements(p.residual)), activation(value_of(p)) {}
  KEELNORM_INLINE Output<act, with_residual> operator()(Normalization n, Slope) const {
    return {x, residual, n, activation};
  }
};

template <class Body>
void with_output(const Problem& p, const Body& body) {
  if (p.activation == Activation::none && p.residual) return body(MakeOutput<Act::none, true>(p));
  if (p.activation == Activation::none) return body(MakeOutput<Act::none, false>(p));
  if (p.activation == Activation::relu && p.residual) return body(MakeOutput<Act::relu, true>(p));
  if (p.activation == Activation::relu) return body(MakeOutput<Act::relu, false>(p));
  body(MakeOutput<Act::called, false>(p));
}

struct MakeInverted {
  const Element* y;
  Called inverse;
  explicit MakeInverted(const Problem& p) : y(elements((const void*)p.y)), inverse(inverse_of(p)) {}
  KEELNORM_INLINE Inverted operator()(Normalization n, Slope) const { return {y, n, inverse}; }
};

template <Gate gate>
struct MakeGated {
  const Element *dy, *x, *y, *residual;
  Called derivative;
  MakeGated(const Problem& p, const Element* dy)
      : dy(dy),
        x(elements(p.x)),
        y(elements((const void*)p.y)),
        residual(elements(p.residual)),
        derivative(derivative_of(p)) {}
  KEELNORM_INLINE Gated<gate> operator()(Normalization n) const { return {dy, x, y, residual, n, derivative}; }
};

template <Gate gate>
struct MakeTerms {
  MakeGated<gate> gated;
  Element* g_out;
  MakeTerms(const Problem& p, Element* g_out) : gated(p, elements(p.dy)), g_out(g_out) {}
  KEELNORM_INLINE GradTerms<gate> operator()(Normalization n, Slope) const { return {gated(n), g_out}; }
};

template <Gate gate, bool fixed, bool write_g>
struct MakeGradient {
  MakeGated<gate> gated;
  Element* g_out;
  MakeGradient(const Problem& p, const Element* dy) : gated(p, dy), g_out(elements(p.dresidual)) {}
  KEELNORM_INLINE InputGradient<gate, fixed, write_g> operator()(Normalization n, Slope line) const {
    return {gated(n), line, g_out};
  }
};

// dy may be a stored g instead.
template <Gate gate, class Body>
void with_gradient(const Problem& p, const Element* dy, const Body& body) {
  if constexpr (gate == Gate::relu_from_y) {
    if (p.dresidual && p.training) return body(MakeGradient<gate, false, true>(p, dy));
    if (p.dresidual) return body(MakeGradient<gate, true, true>(p, dy));
  }
  if (p.training) return body(MakeGradient<gate, false, false>(p, dy));
  body(MakeGradient<gate, true, false>(p, dy));
}

template <Gate gate>
using IsGate = std::integral_constant<Gate, gate>;

template <class Body>
void with_gate(const Problem& p, const Body& body) {
  if (p.activation == Activation::none) return body(IsGate<Gate::open>{});
  if (p.activation != Activation::relu) return body(IsGate<Gate::called>{});
  if (p.y) return body(IsGate<Gate::relu_from_y>{});
  body(IsGate<Gate::relu_from_x>{});
}

// ---- the operators

void apply(const Problem& p, Parallel how) {
  count_call();
  with_layout(p, [&](const auto& loops) {
    with_output(p, [&](const auto& make) { loops.apply(how, loops.by_channel(make)); });
  });
}

void forward(const Problem& p, Parallel how) {
  count_call();
  with_layout(p, [&](const auto& loops) {
    with_output(p, [&](const auto& make) { loops.forward(how, loops.by_channel(make)); });
  });
}

void grad_stats(const Problem& p, Parallel how) {
  count_call();
  with_layout(p, [&](const auto& loops) {
    with_gate(p, [&](auto gate) { loops.grad_stats(how, loops.by_channel(MakeTerms<gate.value>(p, nullptr))); });
  });
}

void grad_input(const Problem& p, Parallel how) {
  count_call();
  with_layout(p, [&](const auto& loops) {
    with_gate(p, [&](auto gate) {
      with_gradient<gate.value>(p, elements(p.dy),
                                [&](const auto& make) { loops.grad_input(how, loops.by_channel(make)); });
    });
  });
}

// ReLU's gate is recomputed in the second pass. Other derivatives cost more than memory traffic: the first pass stores
// g in dresidual or dx, and the second reads it. It does not where dx is x, which is read again, nor in float16, where
// g may be infinite although dx is not.
void backward(const Problem& p, Parallel how) {
  if (!p.sum_g) return grad_input(p, how);
  count_call();
  with_layout(p, [&](const auto& loops) {
    with_gate(p, [&](auto gate) {
      constexpr bool costly = gate.value == Gate::called, fits = !costly || KEELNORM_DTYPE_CODE != 4;
      Element* const place = elements(p.dresidual ? p.dresidual : p.dx == p.x || !fits ? nullptr : p.dx);
      const bool keeps = costly || !p.dx || (p.layout == Layout::channels_last && p.dresidual && p.streaming);
      Element* const kept = keeps ? place : nullptr;
      const auto terms_of = loops.by_channel(MakeTerms<gate.value>(p, kept));
      if (!p.dx) return loops.grad_stats(how, terms_of);
      const auto run = [&](const auto& make) { loops.backward(how, terms_of, loops.by_channel(make)); };
      if (kept && fits) return with_gradient<Gate::open>(p, kept, run);
      with_gradient<gate.value>(p, elements(p.dy), run);
    });
  });
}

void invert(const Problem& p, Parallel how) {
  count_call();
  Problem q = p;
  q.y = p.dx;  // apply writes y
  with_layout(q, [&](const auto& loops) { loops.apply(how, loops.by_channel(MakeInverted(p))); });
}

// layout is x's; y is in the other. A helper of the operators, not counted as one.
void transpose(const Problem& p, Parallel how) {
  const bool contiguous = p.layout == Layout::contiguous;
  const int64_t rows = contiguous ? p.channels : p.positions, columns = contiguous ? p.positions : p.channels;
  constexpr int64_t kColumns = 256;
  const int64_t strips = (columns + kColumns - 1) / kColumns;
  parallel(how, p.samples * strips, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / strips, c0 = i % strips * kColumns, at = n * rows * columns;
      const int64_t c1 = columns - c0 < kColumns ? columns : c0 + kColumns;
      ::transpose(elements(p.x) + at, elements(p.y) + at, rows, columns, c0, c1);
    }
  });
}

const Kernels table{
    KEELNORM_STRING(KEELNORM_ISA),
    scratch_doubles,
    stats,
    measure,
    apply,
    grad_stats,
    grad_input,
    forward,
    backward,
    invert,
    transpose,
    calls,
};

}  // namespace

// One function for each unit, declared by instruction_sets.h.
#define KEELNORM_TABLE_(isa, dtype) isa##_##dtype##_kernels
#define KEELNORM_TABLE(isa, dtype) KEELNORM_TABLE_(isa, dtype)
const Kernels& keelnorm::KEELNORM_TABLE(KEELNORM_ISA, KEELNORM_DTYPE)() { return table; }
