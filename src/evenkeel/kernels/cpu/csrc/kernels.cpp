// The operators for one instruction set. Compiled once for each, with EVENKEEL_ISA naming it.
#include "channels_last.h"
#include "contiguous.h"

#define EVENKEEL_JOIN_(a, b) a##b
#define EVENKEEL_JOIN(a, b) EVENKEEL_JOIN_(a, b)
#define EVENKEEL_STRING_(a) #a
#define EVENKEEL_STRING(a) EVENKEEL_STRING_(a)

namespace {

int64_t calls_ = 0;  // proves which table ran; touched atomically because threads may run layers side by side

void count_call() { __atomic_fetch_add(&calls_, 1, __ATOMIC_RELAXED); }
int64_t calls() { return __atomic_load_n(&calls_, __ATOMIC_RELAXED); }

// Calls body with the object that knows the problem's layout.
template <class Body>
void with_layout(const Problem& p, const Body& body) {
  if (p.layout == evenkeel::Layout::contiguous)
    body(Contiguous(p));
  else
    body(ChannelsLast(p));
}

int64_t scratch_doubles(const Problem& p) {
  return p.layout == evenkeel::Layout::contiguous ? Contiguous::scratch_doubles(p) : ChannelsLast::scratch_doubles(p);
}

void stats(const Problem& p, Parallel how) {
  count_call();
  with_layout(p, [&](const auto& loops) { loops.run_stats(how); });
}

// Run-time options as types, so that the loops are compiled without branches.
template <bool relu_after_, bool with_residual_>
struct ForwardOptions {
  static constexpr bool relu_after = relu_after_, with_residual = with_residual_;
};

template <class Body>
void with_forward_options(const Problem& p, const Body& body) {
  const bool relu_after = p.activation == Activation::relu;
  if (relu_after && p.residual) return body(ForwardOptions<true, true>{});
  if (relu_after) return body(ForwardOptions<true, false>{});
  if (p.residual) return body(ForwardOptions<false, true>{});
  body(ForwardOptions<false, false>{});
}

// The gate, and whether g is to be written (without an activation it is dy itself).
template <Gate gate_, bool write_g_>
struct BackwardOptions {
  static constexpr Gate gate = gate_;
  static constexpr bool write_g = write_g_;
};

template <class Body>
void with_backward_options(const Problem& p, const Body& body) {
  if (p.activation == Activation::none) return body(BackwardOptions<Gate::open, false>{});
  if (!p.y) return body(BackwardOptions<Gate::from_x, false>{});
  if (!p.dresidual) return body(BackwardOptions<Gate::from_y, false>{});
  body(BackwardOptions<Gate::from_y, true>{});
}

void apply(const Problem& p, Parallel how) {
  count_call();
  with_layout(p, [&](const auto& loops) {
    with_forward_options(
        p, [&](auto o) { loops.template run_apply<decltype(o)::relu_after, decltype(o)::with_residual>(how); });
  });
}

void forward(const Problem& p, Parallel how) {
  count_call();
  with_layout(p, [&](const auto& loops) {
    with_forward_options(
        p, [&](auto o) { loops.template run_forward<decltype(o)::relu_after, decltype(o)::with_residual>(how); });
  });
}

void grad_stats(const Problem& p, Parallel how) {
  count_call();
  with_layout(p, [&](const auto& loops) {
    with_backward_options(p,
                          [&](auto o) { loops.template run_grad_stats<decltype(o)::gate, decltype(o)::write_g>(how); });
  });
}

void grad_input(const Problem& p, Parallel how) {
  count_call();
  with_layout(p, [&](const auto& loops) {
    with_backward_options(p, [&](auto o) {
      if (p.training)
        loops.template run_grad_input<decltype(o)::gate, false>(how, p.dy);
      else
        loops.template run_grad_input<decltype(o)::gate, true>(how, p.dy);
    });
  });
}

void backward(const Problem& p, Parallel how) {
  count_call();
  with_layout(p, [&](const auto& loops) {
    with_backward_options(p, [&](auto o) {
      if (p.training)
        loops.template run_backward<decltype(o)::gate, decltype(o)::write_g, false>(how);
      else
        loops.template run_backward<decltype(o)::gate, decltype(o)::write_g, true>(how);
    });
  });
}

}  // namespace

namespace evenkeel {

const Kernels& EVENKEEL_JOIN(EVENKEEL_ISA, _kernels)() {
  static const Kernels table{
      EVENKEEL_STRING(EVENKEEL_ISA), scratch_doubles, stats, apply, grad_stats, grad_input, forward, backward, calls};
  return table;
}

}  // namespace evenkeel
