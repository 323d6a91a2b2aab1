// x as N, C, S in memory: a channel is N planes of S consecutive values.
//
// Work is cut into tasks by shape alone, never by the number of threads, and sums are added in a fixed order: the
// result has the same bits for any number of threads. Usually a task is a block of channels small enough to stay in
// cache between its two passes. Few channels leave cores idle; then a task is a segment of one plane.
#pragma once

#include "coefficients.h"
#include "loops.h"
#include "parallel.h"

namespace {

class Contiguous {
 public:
  explicit Contiguous(const Problem& problem)
      : p(problem),
        plane(p.positions),
        stride(p.channels * p.positions),
        share(1.0 / (double)p.per_channel()),
        block(channels_per_block(p)),
        by_segment(takes_segments(p)),
        segments(segments_of(p)),
        sample(p),
        coefficients(p.scratch, p.channels),
        partial(p.scratch + Coefficients::doubles(p.channels)) {}

  static int64_t scratch_doubles(const Problem& p) {
    const int64_t items = takes_segments(p) ? p.channels * p.samples * segments_of(p) : 0;
    return Coefficients::doubles(p.channels) + 2 * items;
  }

  void run_stats(Parallel how) const {
    if (by_segment) return stats_by_segment(how);
    for_blocks(how, [&](int64_t c0, int64_t c1) { stats(c0, c1); });
  }

  template <bool relu_after, bool with_residual>
  void run_apply(Parallel how) const {
    coefficients.set_forward(p, 0, p.channels);
    const auto output = output_of<relu_after, with_residual>();
    if (by_segment) return write_items(how, p.y, output);
    for_blocks(how, [&](int64_t c0, int64_t c1) { write_block(p.y, c0, c1, output); });
  }

  template <bool relu_after, bool with_residual>
  void run_forward(Parallel how) const {
    if (by_segment || !p.training) {
      if (p.training) run_stats(how);
      finish_moments(p, 0, p.channels);
      return run_apply<relu_after, with_residual>(how);
    }
    for_blocks(how, [&](int64_t c0, int64_t c1) {
      stats(c0, c1);
      finish_moments(p, c0, c1);
      coefficients.set_forward(p, c0, c1);
      write_block(p.y, c0, c1, output_of<relu_after, with_residual>());
    });
  }

  template <Gate gate, bool write_g>
  void run_grad_stats(Parallel how) const {
    coefficients.set_forward(p, 0, p.channels);
    if (by_segment)
      grad_stats_by_segment<gate, write_g>(how);
    else
      for_blocks(how, [&](int64_t c0, int64_t c1) { grad_stats<gate, write_g>(c0, c1); });
  }

  template <Gate gate, bool fixed>
  void run_grad_input(Parallel how, const float* dy) const {
    coefficients.set_forward(p, 0, p.channels);
    coefficients.set_backward(p, 0, p.channels);
    const auto gradient = input_gradient_of<gate, fixed>(dy);
    if (by_segment) return write_items(how, p.dx, gradient);
    for_blocks(how, [&](int64_t c0, int64_t c1) { write_block(p.dx, c0, c1, gradient); });
  }

  // With write_g the second pass reads g where the first one wrote it, and needs no gate.
  template <Gate gate, bool write_g, bool fixed>
  void run_backward(Parallel how) const {
    constexpr Gate second = write_g ? Gate::open : gate;
    const float* g = write_g ? p.dresidual : p.dy;
    const bool needs_stats = write_g || p.sum_g, needs_input = p.dx;
    if (by_segment || !needs_stats || !needs_input) {
      if (needs_stats) run_grad_stats<gate, write_g>(how);
      if (needs_input) run_grad_input<second, fixed>(how, g);
      return;
    }
    for_blocks(how, [&](int64_t c0, int64_t c1) {
      coefficients.set_forward(p, c0, c1);
      grad_stats<gate, write_g>(c0, c1);
      coefficients.set_backward(p, c0, c1);
      write_block(p.dx, c0, c1, input_gradient_of<second, fixed>(g));
    });
  }

 private:
  // Values spread over the batch whose average lies near a channel's mean.
  struct Sample {
    int64_t count, at[8];  // as seen from the channel's first value

    explicit Sample(const Problem& p) : count(p.per_channel() < 8 ? p.per_channel() : 8) {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t index = i * p.per_channel() / count;
        at[i] = index / p.positions * p.channels * p.positions + index % p.positions;
      }
    }

    float mean(const float* channel) const {
      double total = 0;
      for (int64_t i = 0; i < count; ++i) total += channel[at[i]];
      return (float)(total / (double)count);
    }
  };

  const Problem& p;
  const int64_t plane, stride;  // values in a plane, and from a channel's plane to the next sample's
  const double share;           // 1 / M
  const int64_t block;          // channels per task
  const bool by_segment;
  const int64_t segments;  // per plane
  const Sample sample;
  const Coefficients coefficients;
  double* const partial;  // by_segment: two sums for each item

  static constexpr int64_t kSegmentOfPlane = 16384;
  static constexpr int64_t kCachedFloats = 128 * 1024;  // what a block of channels may take of a core's second cache
  static constexpr int64_t kFewChannels = 16;

  static int64_t channels_per_block(const Problem& p) {
    const int64_t fits = kCachedFloats / p.per_channel();
    const int64_t spread = p.is_small() ? p.channels : p.channels / kFewChannels;  // work for every core
    const int64_t block = fits < spread ? fits : spread;
    return block > 1 ? block : 1;
  }

  static bool takes_segments(const Problem& p) {
    return p.channels < kFewChannels && p.channels * p.per_channel() >= kCachedFloats / 2;
  }

  static int64_t segments_of(const Problem& p) { return (p.positions + kSegmentOfPlane - 1) / kSegmentOfPlane; }

  // ---- over the channels c0 .. c1, in one thread

  // Two passes in double: for the rare channel whose sums lost digits.
  void set_moments_slowly(int64_t c) const {
    double total = 0, m2 = 0;
    for (int64_t n = 0; n < p.samples; ++n)
      for (int64_t s = 0; s < plane; ++s) total += p.x[n * stride + c * plane + s];
    const double mean = total / (double)p.per_channel();
    for (int64_t n = 0; n < p.samples; ++n)
      for (int64_t s = 0; s < plane; ++s) {
        const double d = p.x[n * stride + c * plane + s] - mean;
        m2 += d * d;
      }
    p.mean[c] = mean;
    p.var[c] = m2 / (double)p.per_channel();
  }

  void set_moments_from(int64_t c, float k, const Sums& sums) const {
    if (!set_moments(p, share, c, k, sums.first, sums.second)) set_moments_slowly(c);
  }

  // Sums over whole channels. Reads the planes of several channels as one stream, sample by sample, because short
  // planes far apart are slow to read. add(c, at, length, ahead, lane sums) adds a run; done(c, sums) ends a channel.
  template <class Begin, class Add, class Done>
  void sum_channels(int64_t c0, int64_t c1, const Begin& begin, const Add& add, const Done& done) const {
    constexpr int64_t kAbreast = 64;
    const int64_t samples_per_flush = plane >= kSegment ? 1 : plane >= kLanes ? kSegment / plane : kValuesPerLane;
    for (int64_t b0 = c0; b0 < c1; b0 += kAbreast) {
      const int64_t b1 = c1 - b0 < kAbreast ? c1 : b0 + kAbreast;
      Uninitialized<LaneSums, kAbreast> lanes;
      Uninitialized<Sums, kAbreast> sums;
      for (int64_t c = b0; c < b1; ++c) begin(c), lanes[c - b0] = {}, sums[c - b0] = {};
      for (int64_t n = 0; n < p.samples; ++n) {
        const int64_t ahead = n + 1 < p.samples ? stride : 0;
        const bool flush = (n + 1) % samples_per_flush == 0 || n + 1 == p.samples;
        for (int64_t c = b0; c < b1; ++c)
          for (int64_t s = 0; s < plane; s += kSegment) {
            add(c, n * stride + c * plane + s, plane - s < kSegment ? plane - s : kSegment, ahead, lanes[c - b0]);
            if (flush) lanes[c - b0].flush_to(sums[c - b0]);
          }
      }
      for (int64_t c = b0; c < b1; ++c) done(c, sums[c - b0]);
    }
  }

  void stats(int64_t c0, int64_t c1) const {
    float* const k = coefficients.center;  // not in use yet
    sum_channels(
        c0, c1, [&](int64_t c) { k[c] = sample.mean(p.x + c * plane); },
        [&](int64_t c, int64_t at, int64_t length, int64_t ahead, LaneSums& lanes) {
          if (plane < kNearPlane)
            add_moments<true>(p.x + at, length, ahead, splat(k[c]), lanes);
          else
            add_moments<false>(p.x + at, length, ahead, splat(k[c]), lanes);
        },
        [&](int64_t c, const Sums& sums) { set_moments_from(c, k[c], sums); });
  }

  template <Gate gate, bool write_g>
  void add_grad(int64_t c, int64_t at, int64_t length, int64_t ahead, LaneSums& lanes) const {
    const float* y = shifted(p.y, at);
    float* g = shifted(p.dresidual, at);
    const Normalization normalize = coefficients.of(c);
    if (plane < kNearPlane)
      add_grad_sums<gate, write_g, true>(p.dy + at, p.x + at, y, g, length, ahead, normalize, lanes);
    else
      add_grad_sums<gate, write_g, false>(p.dy + at, p.x + at, y, g, length, ahead, normalize, lanes);
  }

  void set_grad_sums(int64_t c, const Sums& sums) const {
    p.sum_g[c] = sums.first;
    p.sum_gxhat[c] = sums.second;
    center_grad_sums(p, c, c + 1);
  }

  template <Gate gate, bool write_g>
  void grad_stats(int64_t c0, int64_t c1) const {
    sum_channels(
        c0, c1, [](int64_t) {},
        [&](int64_t c, int64_t at, int64_t length, int64_t ahead, LaneSums& lanes) {
          add_grad<gate, write_g>(c, at, length, ahead, lanes);
        },
        [&](int64_t c, const Sums& sums) { set_grad_sums(c, sums); });
  }

  // Writes the indices begin .. end of sample n, in planes of `length` from channel c on. value_of(c) gives the values
  // of a channel.
  template <class ValueOf>
  void write(float* out, int64_t c, int64_t begin, int64_t end, int64_t length, const ValueOf& value_of) const {
    const auto value = [&](int64_t k) { return value_of(c + k); };
    if (p.streaming)
      write_planes<Streamed>(out, begin, end, length, value);
    else
      write_planes<Whole>(out, begin, end, length, value);
  }

  template <class ValueOf>
  void write_block(float* out, int64_t c0, int64_t c1, const ValueOf& value_of) const {
    const int64_t abreast = plane < kLanes ? 1 : c1 - c0;  // planes that are written as one run
    for (int64_t n = 0; n < p.samples; ++n)
      for (int64_t c = c0; c < c1; c += abreast) {
        const int64_t begin = n * stride + c * plane;
        write(out, c, begin, begin + abreast * plane, plane, value_of);
      }
    if (p.streaming) end_streaming();
  }

  template <class ValueOf>
  void write_items(Parallel how, float* out, const ValueOf& value_of) const {
    for_items(how, [&](int64_t, int64_t c, int64_t n, int64_t s0, int64_t s1) {
      const int64_t start = n * stride + c * plane;
      write(out, c, start + s0, start + s1, s1 - s0, value_of);
    });
  }

  template <bool relu_after, bool with_residual>
  auto output_of() const {
    return [this](int64_t c) { return Output<relu_after, with_residual>{p.x, p.residual, coefficients.of(c)}; };
  }

  template <Gate gate, bool fixed>
  auto input_gradient_of(const float* dy) const {
    return [this, dy](int64_t c) {
      return InputGradient<gate, fixed>{
          dy, p.x, p.y, coefficients.of(c), splat(coefficients.slope[c]), splat(coefficients.offset[c])};
    };
  }

  template <class Body>
  void for_blocks(Parallel how, const Body& body) const {
    parallel(how, (p.channels + block - 1) / block, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        body(i * block, p.channels - i * block < block ? p.channels : (i + 1) * block);
    });
  }

  // ---- over segments of planes: item = (channel, sample, segment)

  template <class Body>
  void for_items(Parallel how, const Body& body) const {
    parallel(how, p.channels * p.samples * segments, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t segment = item % segments, n = item / segments % p.samples, c = item / segments / p.samples;
        const int64_t s0 = segment * kSegmentOfPlane;
        body(item, c, n, s0, plane - s0 < kSegmentOfPlane ? plane : s0 + kSegmentOfPlane);
      }
      if (p.streaming) end_streaming();
    });
  }

  // Calls add(c, at, length, lane sums) for runs of every item, then done(c, sums) for every channel.
  template <class Add, class Done>
  void sum_items(Parallel how, const Add& add, const Done& done) const {
    for_items(how, [&](int64_t item, int64_t c, int64_t n, int64_t s0, int64_t s1) {
      LaneSums lanes;
      Sums sums;
      for (int64_t s = s0; s < s1; s += kSegment) {
        add(c, n * stride + c * plane + s, s1 - s < kSegment ? s1 - s : kSegment, lanes);
        lanes.flush_to(sums);
      }
      partial[2 * item] = sums.first;
      partial[2 * item + 1] = sums.second;
    });
    const int64_t items = p.samples * segments;
    for (int64_t c = 0; c < p.channels; ++c) {
      Sums total;
      for (int64_t item = c * items; item < (c + 1) * items; ++item) {
        total.first += partial[2 * item];
        total.second += partial[2 * item + 1];
      }
      done(c, total);
    }
  }

  void stats_by_segment(Parallel how) const {
    float* const k = coefficients.center;
    for (int64_t c = 0; c < p.channels; ++c) k[c] = sample.mean(p.x + c * plane);
    sum_items(
        how,
        [&](int64_t c, int64_t at, int64_t length, LaneSums& lanes) {
          add_moments<false>(p.x + at, length, 0, splat(k[c]), lanes);
        },
        [&](int64_t c, const Sums& sums) { set_moments_from(c, k[c], sums); });
  }

  template <Gate gate, bool write_g>
  void grad_stats_by_segment(Parallel how) const {
    sum_items(
        how,
        [&](int64_t c, int64_t at, int64_t length, LaneSums& lanes) {
          add_grad<gate, write_g>(c, at, length, 0, lanes);
        },
        [&](int64_t c, const Sums& sums) { set_grad_sums(c, sums); });
  }
};

}  // namespace
