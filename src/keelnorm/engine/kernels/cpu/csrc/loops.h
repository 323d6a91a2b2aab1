// The terms that are summed and the values that are written, as functions of an index into the tensors, which both
// layouts use; and the inner loops over one run of consecutive values of a channel.
#pragma once

#include "activations.h"

namespace {

// Never inlined: a loop that several callers share is compiled once.
#define KEELNORM_SHARED __attribute__((noinline))

// Always inlined: a call would pass vectors through memory.
#define KEELNORM_INLINE inline __attribute__((always_inline))

enum class Act { none, relu, called };
enum class Gate { open, relu_from_x, relu_from_y, called };  // where the backward finds the activation's derivative

// How many values a lane adds in Value before the sum goes on in double. Every addition rounds, and for values on a
// grid (pixels, say) all roundings may have the same sign.
constexpr int64_t kValuesPerLane = 16;

// How a run of values of one channel is summed: in several independent chains of additions. Four chains hide an
// addition's latency, which suits long runs. The chains are added up after each run, so short runs take two chains
// where vectors of 512 bits keep the units busy for two cycles. Short runs are prefetched to the first cache, long ones
// to the second.
template <int64_t chains_, bool near_>
struct Runs {
  static constexpr int64_t chains = chains_, step = chains * kLanes;
  static constexpr bool near = near_;
  static constexpr int64_t segment = step * kValuesPerLane;  // values that are summed before sums go to double
};
typedef Runs<kVectorBytes == 64 ? 2 : 4, true> ShortRuns;
typedef Runs<4, false> LongRuns;

struct Sums {
  double first = 0, second = 0;
};

// Sums in lanes of double, to which the lanes of Value are added.
struct WideSums {
  DoubleVec first{}, second{};

  Sums total() const { return {sum(first), sum(second)}; }
};

struct LaneSums {
  Vec first{}, second{};

  void flush_to(WideSums& sums) {
    sums.first += folded(first);
    sums.second += folded(second);
    first = second = Vec{};
  }
};

// An array on the stack that is not initialized.
template <class T, int64_t n>
struct Uninitialized {
  alignas(T) char bytes[n * sizeof(T)];
  T& operator[](int64_t i) { return reinterpret_cast<T*>(bytes)[i]; }
};

// The coefficients of one channel in all lanes, or of one channel per lane; see coefficients.h.
struct Normalization {
  Vec center, scale, shift;

  KEELNORM_INLINE Vec operator()(Vec x) const { return multiply_add(x - center, scale, shift); }
};

// Coefficients of the backward.
struct Slope {
  Vec slope, offset;
};

// ---- terms of sums: operator() adds the terms of a vector of values from index i on to a and b

// x - k and its square.
struct Deviation {
  const Element* x;
  Vec k;
  static constexpr bool kWrites = false;

  template <class Lanes>
  KEELNORM_INLINE void operator()(int64_t i, Lanes lanes, Vec& a, Vec& b) const {
    const Vec d = lanes.keep(lanes.load(x + i) - k);
    a += d;
    b = multiply_add(d, d, b);
  }

  template <bool near, int64_t count>
  KEELNORM_INLINE void prefetch(int64_t i) const {
    ::prefetch<near, count>(x + i);
  }
};

// g, the gradient before the activation.
template <Gate gate>
struct Gated {
  const Element *dy, *x, *y, *residual;
  Normalization normalize;
  Called derivative;

  template <class Lanes>
  KEELNORM_INLINE Vec operator()(int64_t i, Lanes lanes, Vec xx) const {
    const Vec g = lanes.load(dy + i);
    if constexpr (gate == Gate::relu_from_x) return relu_gate(normalize(xx), g);
    if constexpr (gate == Gate::relu_from_y) return relu_gate(lanes.load(y + i), g);
    if constexpr (gate == Gate::called) {
      Vec u = normalize(xx);
      if (residual) u += lanes.load(residual + i);
      return g * derivative(u);
    }
    return g;
  }
};

// g and g * (x - center). g is stored where the derivative is too costly to compute again in the second pass, or where
// only g is wanted.
template <Gate gate>
struct GradTerms {
  Gated<gate> gated;
  Element* g_out;

  template <class Lanes>
  KEELNORM_INLINE void operator()(int64_t i, Lanes lanes, Vec& a, Vec& b) const {
    const Vec xx = lanes.load(gated.x + i);
    const Vec g = gated(i, lanes, xx);  // 0 in lanes without a value
    if constexpr (kWrites)
      if (g_out) lanes.store(g_out + i, g);
    a += g;
    b = multiply_add(g, xx - gated.normalize.center, b);
  }

  static constexpr bool kWrites = gate == Gate::called || gate == Gate::relu_from_y;

  template <bool near, int64_t count>
  KEELNORM_INLINE void prefetch(int64_t i) const {
    ::prefetch<near, count>(gated.x + i);
    ::prefetch<near, count>(gated.dy + i);
    if constexpr (gate == Gate::relu_from_y) ::prefetch<near, count>(gated.y + i);
  }
};

// ---- values that are written: operator() gives those from index i on

// y = act((x - center) * scale + shift + residual)
template <Act act, bool with_residual>
struct Output {
  const Element *x, *residual;
  Normalization normalize;
  Called activation;

  template <class Lanes>
  KEELNORM_INLINE Vec operator()(int64_t i, Lanes lanes) const {
    Vec u = normalize(lanes.load(x + i));
    if constexpr (act == Act::called) {
      if (residual) u += lanes.load(residual + i);
      return activation(u);
    }
    if constexpr (with_residual) u += lanes.load(residual + i);
    return act == Act::relu ? relu(u) : u;
  }
};

// dx = g * scale + (x - center) * slope + offset. With fixed statistics it is g * scale, so a NaN in x does not reach
// it. g is written too where it is the residual's gradient.
template <Gate gate, bool fixed, bool write_g>
struct InputGradient {
  Gated<gate> gated;
  Slope line;
  Element* g_out;

  template <class Lanes>
  KEELNORM_INLINE Vec operator()(int64_t i, Lanes lanes) const {
    const Vec xx = lanes.load(gated.x + i);
    const Vec g = gated(i, lanes, xx);
    if constexpr (write_g) lanes.store(g_out + i, g);
    if constexpr (fixed) return g * gated.normalize.scale;
    const Vec along = multiply_add(xx - gated.normalize.center, line.slope, line.offset);
    return multiply_add(g, gated.normalize.scale, along);
  }
};

// x rebuilt from y: center + (act^-1(y) - shift) / scale. Clamped to finite values: x was finite where y is, and y's
// rounding error must not turn the largest values into infinity.
struct Inverted {
  const Element* y;
  Normalization normalize;
  Called inverse;

  template <class Lanes>
  KEELNORM_INLINE Vec operator()(int64_t i, Lanes lanes) const {
    const Vec x = (inverse(lanes.load(y + i)) - normalize.shift) / normalize.scale + normalize.center;
    return minimum(maximum(x, splat(-kLargest)), splat(kLargest));
  }
};

// ---- loops over one run

// The length of a run, cut into steps of one vector per chain, single vectors and a rest. Computed once for all runs of
// this length.
template <class Runs>
struct Steps {
  int64_t wide, singles, rest;

  explicit Steps(int64_t length)
      : wide(length / Runs::step), singles(length / kLanes % Runs::chains), rest(length % kLanes) {}

  // How many values one lane adds.
  int64_t depth() const { return wide + (wide > 0 ? Runs::chains / 2 : 0) + singles + (rest > 0); }
};

// Adds the terms of a run of values from index i on. The run that is read next lies `ahead` elements further on and is
// prefetched: the processor's own prefetching stops at the end of a plane.
template <class Runs, class Terms>
KEELNORM_INLINE void add_run(const Terms& terms, int64_t i, Steps<Runs> steps, int64_t ahead, LaneSums& sums) {
  Vec a[Runs::chains] = {sums.first}, b[Runs::chains] = {sums.second};
  for (int64_t k = steps.wide; k > 0; --k, i += Runs::step) {
    terms.template prefetch<Runs::near, Runs::step>(i + ahead);
#pragma GCC unroll 4
    for (int64_t j = 0; j < Runs::chains; ++j) terms(i + j * kLanes, Whole{}, a[j], b[j]);
  }
  if (steps.singles + steps.rest > 0) terms.template prefetch<Runs::near, Runs::step>(i + ahead);
  for (int64_t k = steps.singles; k > 0; --k, i += kLanes) terms(i, Whole{}, a[0], b[0]);
  if (steps.rest > 0) terms(i, Partial(steps.rest), a[1], b[1]);
  if constexpr (Runs::chains == 2)
    sums = {a[0] + a[1], b[0] + b[1]};
  else
    sums = {(a[0] + a[1]) + (a[2] + a[3]), (b[0] + b[1]) + (b[2] + b[3])};
}

// Writes the indices i .. end of `out`. The last vector may overlap the one before it. It is computed first, because
// `out` may be the input.
template <class Value>
KEELNORM_INLINE void write_run(Element* out, int64_t i, int64_t end, const Value& value) {
  if (end - i < kLanes) {
    const Partial lanes(end - i);
    return lanes.store(out + i, value(i, lanes));
  }
  const Vec last = value(end - kLanes, Whole{});
  for (; i < end - kLanes; i += kLanes) store(out + i, value(i, Whole{}));
  store(out + end - kLanes, last);
}

// The first index from i on whose byte is set (not 0) or, with set == false, not set; `end` where there is none.
inline int64_t next(bool set, const unsigned char* flags, int64_t i, int64_t end) {
  if (!set) {
    const void* const found = std::memchr(flags + i, 0, end - i);
    return found ? static_cast<const unsigned char*>(found) - flags : end;
  }
  for (uint64_t eight; end - i >= 8; i += 8) {
    std::memcpy(&eight, flags + i, 8);
    if (eight) break;
  }
  while (i < end && !flags[i]) ++i;
  return i;
}

// Calls body(begin, end) for each run of flags that are set, or not set, in flags[begin .. end]. Padding lies at the
// ends of sequences and rows, so runs are few and long.
template <class Body>
inline void for_runs_of(bool set, const unsigned char* flags, int64_t begin, int64_t end, const Body& body) {
  while ((begin = next(set, flags, begin, end)) < end) {
    const int64_t stop = next(!set, flags, begin, end);
    body(begin, stop);
    begin = stop;
  }
}

// Writes consecutive planes past the caches: the indices begin .. end of `out`, in planes of length `plane`;
// value_of(k) gives the values of the k-th plane. All whole vectors are aligned in `out`; a vector across the border of
// two planes is combined from both. Planes are at least a vector long, unless there is only one.
template <class ValueOf>
inline void stream_planes(Element* out, int64_t begin, int64_t end, int64_t plane, const ValueOf& value_of) {
  int64_t i = begin, k = 0;
  auto value = value_of(0);
  const int64_t head = to_alignment(out + begin);
  if (head > 0 && head < end - begin) {
    const Partial lanes(head);
    lanes.store(out + i, value(i, lanes));
    i += head;
  }
  for (int64_t stop = begin + plane; stop <= end; stop += plane) {
    for (; i + kLanes <= stop; i += kLanes) store_streaming(out + i, value(i, Streamed{}));
    const int64_t rest = stop - i;
    if (stop < end) {
      const auto next = value_of(++k);
      if (rest > 0) {
        const Vec first = value(i, Streamed{}), second = next(i, Streamed{});
        store_streaming(out + i, select(mask_of(rest), first, second));
        i += kLanes;
      }
      value = next;
    } else if (rest > 0) {
      const Partial lanes(rest);
      lanes.store(out + i, value(i, lanes));
    }
  }
}

}  // namespace
