// The four inner loops over one run of consecutive values of one channel: a plane of a contiguous tensor, or part of
// one.
#pragma once

#include "simd.h"

namespace {

enum class Gate { open, from_x, from_y };  // where the backward of the activation finds out what was positive

// Floats are added per lane for about this many values, then in double: every addition rounds, and on values of a grid
// (pixels, say) all roundings may go the same way.
constexpr int64_t kValuesPerLane = 16;

// Values that are summed at once, in four vectors of sums.
constexpr int64_t kSegment = 4 * kValuesPerLane * kLanes;

// Planes below this stay in the first cache until the next sample's are wanted.
constexpr int64_t kNearPlane = 1024;

struct Sums {
  double first = 0, second = 0;
};

struct LaneSums {
  Vec first{}, second{};

  void flush_to(Sums& sums) {
    sums.first += sum(first);
    sums.second += sum(second);
    first = second = Vec{};
  }
};

// An array on the stack without the cost of filling all of it.
template <class T, int64_t n>
struct Uninitialized {
  alignas(T) char bytes[n * sizeof(T)];
  T& operator[](int64_t i) { return reinterpret_cast<T*>(bytes)[i]; }
};

// The coefficients of one channel, in every lane; see coefficients.h.
struct Normalization {
  Vec center, scale, shift;

  Vec operator()(Vec x) const { return (x - center) * scale + shift; }
};

template <bool relu_after, bool with_residual>
inline Vec transform(Normalization normalize, Vec x, Vec residual) {
  Vec v = normalize(x);
  if constexpr (with_residual) v += residual;
  if constexpr (relu_after) v = relu(v);
  return v;
}

// The gradient in front of the activation.
template <Gate gate>
inline Vec gated(Normalization normalize, Vec g, Vec x, Vec y) {
  if constexpr (gate == Gate::from_x) return relu_gate(normalize(x), g);
  if constexpr (gate == Gate::from_y) return relu_gate(y, g);
  return g;
}

// Calls body(i, lanes) over a run, lanes being Whole or Partial.
template <class Body>
inline void for_vectors(int64_t length, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= length; i += kLanes) body(i, Whole{});
  if (i < length) body(i, Partial{length - i});
}

// sum(x - k) and sum((x - k)^2). `ahead` floats further on lies what will be read after this run: the processor's own
// prefetching does not see from one plane of a channel to the next.
template <bool near>
inline void add_moments(const float* x, int64_t length, int64_t ahead, Vec k, LaneSums& sums) {
  Vec a0 = sums.first, a1{}, a2{}, a3{}, b0 = sums.second, b1{}, b2{}, b3{};
  int64_t i = 0;
  for (; i + 4 * kLanes <= length; i += 4 * kLanes) {
    prefetch<near>(x + i + ahead);
    const Vec d0 = load(x + i) - k, d1 = load(x + i + kLanes) - k;
    const Vec d2 = load(x + i + 2 * kLanes) - k, d3 = load(x + i + 3 * kLanes) - k;
    a0 += d0, a1 += d1, a2 += d2, a3 += d3;
    b0 += d0 * d0, b1 += d1 * d1, b2 += d2 * d2, b3 += d3 * d3;
  }
  if (i < length) prefetch<near>(x + i + ahead);
  for_vectors(length - i, [&](int64_t j, auto lanes) {
    const Vec d = lanes.keep(lanes.load(x + i + j) - k);
    a1 += d;
    b1 += d * d;
  });
  sums.first = (a0 + a1) + (a2 + a3);
  sums.second = (b0 + b1) + (b2 + b3);
}

// sum(g) and sum(g * (x - center)); writes g where it is also the residual's gradient.
template <Gate gate, bool write_g, bool near>
inline void add_grad_sums(const float* dy, const float* x, const float* y, float* g_out, int64_t length, int64_t ahead,
                          Normalization normalize, LaneSums& sums) {
  Vec a[4] = {sums.first}, b[4] = {sums.second};
  const auto step = [=](int64_t i, auto lanes, Vec& first, Vec& second) {
    const Vec xx = lanes.load(x + i), yy = gate == Gate::from_y ? lanes.load(y + i) : Vec{};
    const Vec g = gated<gate>(normalize, lanes.load(dy + i), xx, yy);  // 0 in lanes without a value
    if constexpr (write_g) lanes.store(g_out + i, g);
    first += g;
    second += lanes.keep(g * (xx - normalize.center));
  };
  int64_t i = 0;
  for (; i + 4 * kLanes <= length; i += 4 * kLanes) {
    prefetch<near>(x + i + ahead);
    prefetch<near>(dy + i + ahead);
    for (int j = 0; j < 4; ++j) step(i + j * kLanes, Whole{}, a[j], b[j]);
  }
  if (i < length) prefetch<near>(x + i + ahead), prefetch<near>(dy + i + ahead);
  for_vectors(length - i, [&](int64_t j, auto lanes) { step(i + j, lanes, a[1], b[1]); });
  sums.first = (a[0] + a[1]) + (a[2] + a[3]);
  sums.second = (b[0] + b[1]) + (b[2] + b[3]);
}

// y = act((x - center) * scale + shift + residual), by index.
template <bool relu_after, bool with_residual>
struct Output {
  const float *x, *residual;
  Normalization normalize;

  template <class Lanes>
  Vec operator()(int64_t i, Lanes lanes) const {
    const Vec r = with_residual ? lanes.load(residual + i) : Vec{};
    return transform<relu_after, with_residual>(normalize, lanes.load(x + i), r);
  }
};

// dx = g * scale + (x - center) * slope + offset, by index. With fixed statistics it is g * scale alone, and a NaN in x
// stays out of it.
template <Gate gate, bool fixed>
struct InputGradient {
  const float *dy, *x, *y;
  Normalization normalize;
  Vec slope, offset;

  template <class Lanes>
  Vec operator()(int64_t i, Lanes lanes) const {
    const Vec xx = lanes.load(x + i), yy = gate == Gate::from_y ? lanes.load(y + i) : Vec{};
    const Vec g = gated<gate>(normalize, lanes.load(dy + i), xx, yy);
    if constexpr (fixed) return g * normalize.scale;
    return g * normalize.scale + ((xx - normalize.center) * slope + offset);
  }
};

// Writes planes that follow one another in memory: indices begin .. end of `out`, cut at begin + plane, and so on, the
// values of the k-th given by value_of(k). All whole vectors are aligned in `out`; one that covers the end of a plane
// and the start of the next is put together from both. Planes are at least a vector long, unless there is just one.
template <class Store, class ValueOf>
inline void write_planes(float* out, int64_t begin, int64_t end, int64_t plane, const ValueOf& value_of) {
  int64_t i = begin, k = 0;
  auto value = value_of(0);
  const int64_t head = to_alignment(out + begin);
  if (head > 0 && head < end - begin) {
    Partial lanes{head};
    lanes.store(out + i, value(i, lanes));
    i += head;
  }
  for (int64_t stop = begin + plane; stop <= end; stop += plane) {
    for (; i + kLanes <= stop; i += kLanes) Store::store(out + i, value(i, Whole{}));
    const int64_t rest = stop - i;
    if (stop < end) {
      const auto next = value_of(++k);
      if (rest > 0) {
        Store::store(out + i, first_then(rest, value(i, Whole{}), next(i, Whole{})));
        i += kLanes;
      }
      value = next;
    } else if (rest > 0) {
      Partial lanes{rest};
      lanes.store(out + i, value(i, lanes));
    }
  }
}

}  // namespace
