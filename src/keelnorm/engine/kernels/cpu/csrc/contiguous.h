// x as N, C, S in memory: a channel is N planes of S consecutive values.
//
// Work is cut into tasks by shape and cache size, never by the number of threads, and a channel's sums are added in an
// order that the shape alone decides: the result has the same bits for any number of threads. Usually a task is a block
// of channels small enough to stay in cache between its two passes. Few channels leave cores idle; then a task is a
// segment of one plane.
#pragma once

#include "coefficients.h"

namespace {

class Contiguous {
 public:
  explicit Contiguous(const Problem& problem)
      : p(problem),
        plane(p.positions),
        stride(p.channels * p.positions),
        by_segment(takes_segments(p)),
        streaming(streams(p)),
        segments(segments_of(p)),
        coefficients(p.scratch, p.channels),
        partial(p.scratch + Coefficients::doubles(p.channels)) {}

  static int64_t scratch_doubles(const Problem& p) {
    const int64_t items = takes_segments(p) ? p.channels * p.samples * segments_of(p) : 0;
    return Coefficients::doubles(p.channels) + 2 * items;
  }

  void stats(Parallel how) const {
    const Spread spread = spread_values();
    const double share = share_of_one();
    if (by_segment) return stats_by_segment(how, spread, share);
    for_blocks(how, [&](int64_t c0, int64_t c1) { stats(c0, c1, spread, share); });
  }

  template <class OutputOf>
  void apply(Parallel how, const OutputOf& output_of) const {
    coefficients.set_forward(p, 0, p.channels);
    write(how, elements(p.y), output_of);
  }

  template <class OutputOf>
  void forward(Parallel how, const OutputOf& output_of) const {
    if (by_segment || !p.training) {
      if (p.training) stats(how);
      finish_moments(p, 0, p.channels);
      return apply(how, output_of);
    }
    const Spread spread = spread_values();
    const double share = share_of_one();
    for_blocks(how, [&](int64_t c0, int64_t c1) {
      stats(c0, c1, spread, share);
      finish_moments(p, c0, c1);
      coefficients.set_forward(p, c0, c1);
      write_block(elements(p.y), c0, c1, output_of);
    });
  }

  template <class TermsOf>
  void grad_stats(Parallel how, const TermsOf& terms_of) const {
    coefficients.set_forward(p, 0, p.channels);
    if (by_segment) return grad_stats_by_segment(how, terms_of);
    for_blocks(how, [&](int64_t c0, int64_t c1) { grad_stats(c0, c1, terms_of); });
  }

  template <class GradientOf>
  void grad_input(Parallel how, const GradientOf& gradient_of) const {
    coefficients.set_forward(p, 0, p.channels);
    coefficients.set_backward(p, 0, p.channels);
    write(how, elements(p.dx), gradient_of);
  }

  template <class TermsOf, class GradientOf>
  void backward(Parallel how, const TermsOf& terms_of, const GradientOf& gradient_of) const {
    if (by_segment) {
      grad_stats(how, terms_of);
      return grad_input(how, gradient_of);
    }
    for_blocks(how, [&](int64_t c0, int64_t c1) {
      coefficients.set_forward(p, c0, c1);
      grad_stats(c0, c1, terms_of);
      coefficients.set_backward(p, c0, c1);
      write_block(elements(p.dx), c0, c1, gradient_of);
    });
  }

  // The functions TermsOf and ValueOf: make(coefficients of a channel).
  template <class Make>
  struct Bound {
    Coefficients coefficients;
    Make make;
    KEELNORM_INLINE auto operator()(int64_t c) const {
      return make(coefficients.of(c), Slope{splat(coefficients.slope[c]), splat(coefficients.offset[c])});
    }
  };
  template <class Make>
  Bound<Make> by_channel(const Make& make) const {
    return {coefficients, make};
  }

 private:
  const Problem& p;
  const int64_t plane, stride;  // values in a plane, and from a channel's plane to the next sample's
  const bool by_segment, streaming;
  const int64_t segments;  // per plane
  const Coefficients coefficients;
  double* const partial;  // by_segment: two sums for each item

  static constexpr int64_t kSegmentOfPlane = 16384;
  static constexpr int64_t kFewChannels = 16, kManyValues = 64 * 1024;
  static constexpr int64_t kShortPlane = 1024;  // planes below this stay in the first cache until they are wanted

  bool is_short() const { return plane < kShortPlane; }

  double share_of_one() const {
    const int64_t count = counted(p);
    return 1.0 / (double)(count > 0 ? count : 1);
  }

  static bool takes_segments(const Problem& p) {
    return p.channels < kFewChannels && p.channels * p.per_channel() >= kManyValues;
  }

  static int64_t segments_of(const Problem& p) { return (p.positions + kSegmentOfPlane - 1) / kSegmentOfPlane; }

  // Channels per task: as many as take half of a core's cache, but work for every core.
  int64_t block_of() const {
    const int64_t fits = p.core_cache / 2 / (int64_t)sizeof(Element) / p.per_channel();
    const int64_t spread = p.is_small() ? p.channels : p.channels / kFewChannels;
    const int64_t block = fits < spread ? fits : spread;
    return block > 1 ? block : 1;
  }

  template <class Body>
  void for_blocks(Parallel how, const Body& body) const {
    const int64_t block = block_of();
    parallel(how, (p.channels + block - 1) / block, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        body(i * block, p.channels - i * block < block ? p.channels : (i + 1) * block);
    });
  }

  // ---- over the channels c0 .. c1, in one thread

  // Adds the terms of sample n's planes of the channels c0 .. c1.
  template <class Runs, class TermsOf>
  KEELNORM_SHARED void add_planes(const TermsOf terms_of, int64_t n, int64_t c0, int64_t c1, LaneSums* lanes,
                                  WideSums* sums, bool flush) const {
    const int64_t length = plane, ahead = n + 1 < p.samples ? stride : 0;
    int64_t at = n * stride + c0 * length;
    const Steps<Runs> whole(length), segment(Runs::segment), last(length % Runs::segment);
    for (int64_t c = c0; c < c1; ++c, ++lanes, ++sums, at += length) {
      const auto terms = terms_of(c);
      if (length <= Runs::segment) {
        add_run(terms, at, whole, ahead, *lanes);
        if (flush) lanes->flush_to(*sums);
        continue;
      }
      int64_t s = 0;
      for (; s + Runs::segment <= length; s += Runs::segment) {
        add_run(terms, at + s, segment, ahead, *lanes);
        lanes->flush_to(*sums);
      }
      add_run(terms, at + s, last, ahead, *lanes);
      lanes->flush_to(*sums);
    }
  }

  // The same for the values that the mask lets count.
  template <class TermsOf>
  KEELNORM_SHARED void add_counted(const TermsOf terms_of, int64_t n, int64_t c0, int64_t c1, WideSums* sums) const {
    const int64_t ahead = n + 1 < p.samples ? stride : 0;
    for_runs_of(true, p.mask + n * plane, 0, plane, [&](int64_t begin, int64_t end) {
      for (int64_t c = c0; c < c1; ++c)
        add_long_run(terms_of(c), n * stride + c * plane + begin, end - begin, ahead, sums[c - c0]);
    });
  }

  template <class Terms>
  KEELNORM_SHARED static void add_long_run(const Terms terms, int64_t at, int64_t length, int64_t ahead,
                                           WideSums& sums) {
    LaneSums lanes;
    for (int64_t s = 0; s < length; s += LongRuns::segment) {
      const int64_t part = length - s < LongRuns::segment ? length - s : LongRuns::segment;
      add_run(terms, at + s, Steps<LongRuns>(part), ahead, lanes);
      lanes.flush_to(sums);
    }
  }

  // Sums over whole channels. Reads the planes of several channels as one stream, sample by sample, because short
  // planes far apart are slow to read. done(c, sums) ends a channel.
  template <class TermsOf, class Done>
  void sum_channels(int64_t c0, int64_t c1, const TermsOf& terms_of, const Done& done) const {
    constexpr int64_t kAbreast = 64;
    const int64_t depth = is_short() ? Steps<ShortRuns>(plane).depth() : Steps<LongRuns>(plane).depth();
    const int64_t samples_per_flush = depth < kValuesPerLane ? kValuesPerLane / depth : 1;
    for (int64_t b0 = c0; b0 < c1; b0 += kAbreast) {
      const int64_t b1 = c1 - b0 < kAbreast ? c1 : b0 + kAbreast;
      Uninitialized<LaneSums, kAbreast> lanes;
      Uninitialized<WideSums, kAbreast> sums;
      for (int64_t c = b0; c < b1; ++c) lanes[c - b0] = {}, sums[c - b0] = {};
      for (int64_t n = 0; n < p.samples; ++n) {
        const bool flush = (n + 1) % samples_per_flush == 0 || n + 1 == p.samples;
        if (p.mask)
          add_counted(terms_of, n, b0, b1, &sums[0]);
        else if (is_short())
          add_planes<ShortRuns>(terms_of, n, b0, b1, &lanes[0], &sums[0], flush);
        else
          add_planes<LongRuns>(terms_of, n, b0, b1, &lanes[0], &sums[0], flush);
      }
      for (int64_t c = b0; c < b1; ++c) done(c, sums[c - b0].total());
    }
  }

  // Offsets of values from the first value of a channel.
  Spread spread_values() const {
    Spread spread(p, 8);
    for (int64_t i = 0; i < spread.count; ++i) spread.at[i] = offset_of(spread.at[i]);
    return spread;
  }

  int64_t offset_of(int64_t i) const { return i / plane * stride + i % plane; }  // of a channel's i-th value

  void set_near_means(int64_t c0, int64_t c1, const Spread& spread) const {
    for (int64_t c = c0; c < c1; ++c) {
      double total = 0;
      for (int64_t i = 0; i < spread.count; ++i) total += to_double(elements(p.x)[c * plane + spread.at[i]]);
      coefficients.center[c] = spread.count > 0 ? (Value)(total / (double)spread.count) : 0;  // not used yet
    }
  }

  void set_moments_from(int64_t c, double share, const Sums& sums) const {
    if (set_moments(p, share, c, coefficients.center[c], sums.first, sums.second)) return;
    set_moments_slowly(
        p, share, c, [&](int64_t i) { return to_double(elements(p.x)[c * plane + offset_of(i)]); },
        [&](int64_t i) { return !p.mask || p.mask[i]; });
  }

  // The terms of x - k, k being each channel's near mean.
  struct Deviations {
    const Element* x;
    const Value* near;
    KEELNORM_INLINE Deviation operator()(int64_t c) const { return {x, splat(near[c])}; }
  };

  Deviations deviations() const { return {elements(p.x), coefficients.center}; }

  void stats(int64_t c0, int64_t c1, const Spread& spread, double share) const {
    set_near_means(c0, c1, spread);
    sum_channels(c0, c1, deviations(), [&](int64_t c, const Sums& sums) { set_moments_from(c, share, sums); });
  }

  void set_grad_sums(int64_t c, const Sums& sums) const {
    p.sum_g[c] = sums.first;
    p.sum_gxhat[c] = sums.second;
    center_grad_sums(p, c, c + 1);
  }

  template <class TermsOf>
  void grad_stats(int64_t c0, int64_t c1, const TermsOf& terms_of) const {
    sum_channels(c0, c1, terms_of, [&](int64_t c, const Sums& sums) { set_grad_sums(c, sums); });
  }

  // Overwrites the masked values of sample n at the positions s0 .. s1 of the channels c0 .. c1 with `padding`, or 0.
  void pad(Element* out, int64_t n, int64_t c0, int64_t c1, int64_t s0, int64_t s1) const {
    const Element* const padding = elements(p.padding);
    for_runs_of(false, p.mask + n * plane, s0, s1, [&](int64_t begin, int64_t end) {
      const int64_t bytes = (end - begin) * (int64_t)sizeof(Element);
      for (int64_t c = c0; c < c1; ++c) {
        const int64_t at = n * stride + c * plane + begin;
        if (padding)
          std::memcpy(out + at, padding + at, bytes);
        else
          std::memset(out + at, 0, bytes);
      }
    });
  }

  // Writes the indices begin .. end of `out`, in planes of `length` from channel c on. value_of(c) gives the values of
  // a channel.
  template <class ValueOf>
  KEELNORM_SHARED void write(Element* out, int64_t c, int64_t begin, int64_t end, int64_t length,
                             const ValueOf value_of) const {
    if (streaming && (length >= kLanes || length == end - begin))
      return stream_planes(out, begin, end, length, [value_of, c](int64_t k) { return value_of(c + k); });
    for (; begin < end; begin += length) write_run(out, begin, begin + length, value_of(c++));
  }

  // The planes of the channels c0 .. c1 in sample n.
  template <class ValueOf>
  void write_planes(Element* out, int64_t n, int64_t c0, int64_t c1, const ValueOf& value_of) const {
    const int64_t begin = n * stride + c0 * plane, end = n * stride + c1 * plane;
    write(out, c0, begin, end, plane, value_of);
    if (p.mask) pad(out, n, c0, c1, 0, plane);
  }

  template <class ValueOf>
  void write_block(Element* out, int64_t c0, int64_t c1, const ValueOf& value_of) const {
    for (int64_t n = 0; n < p.samples; ++n) write_planes(out, n, c0, c1, value_of);
    if (streaming) end_streaming();
  }

  template <class ValueOf>
  void write(Parallel how, Element* out, const ValueOf& value_of) const {
    if (!by_segment) {
      // Nothing is read twice, so walk in the order of memory, which is the longest stream.
      const int64_t fits = kSegmentOfPlane / plane, run = fits < 1 ? 1 : fits < p.channels ? fits : p.channels;
      const int64_t runs = (p.channels + run - 1) / run;
      return parallel(how, p.samples * runs, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t n = i / runs, c0 = i % runs * run, c1 = p.channels - c0 < run ? p.channels : c0 + run;
          write_planes(out, n, c0, c1, value_of);
        }
        if (streaming) end_streaming();
      });
    }
    for_items(how, [&](int64_t, int64_t c, int64_t n, int64_t s0, int64_t s1) {
      const int64_t start = n * stride + c * plane;
      write(out, c, start + s0, start + s1, s1 - s0, value_of);
      if (p.mask) pad(out, n, c, c + 1, s0, s1);
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
      if (streaming) end_streaming();
    });
  }

  // Adds the terms of every item, then calls done(c, sums) for every channel.
  template <class TermsOf, class Done>
  void sum_items(Parallel how, const TermsOf& terms_of, const Done& done) const {
    for_items(how, [&](int64_t item, int64_t c, int64_t n, int64_t s0, int64_t s1) {
      const auto terms = terms_of(c);
      const int64_t start = n * stride + c * plane;
      WideSums sums;
      const auto add = [&](int64_t begin, int64_t end) { add_long_run(terms, start + begin, end - begin, 0, sums); };
      if (p.mask)
        for_runs_of(true, p.mask + n * plane, s0, s1, add);
      else
        add(s0, s1);
      const Sums total = sums.total();
      partial[2 * item] = total.first;
      partial[2 * item + 1] = total.second;
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

  void stats_by_segment(Parallel how, const Spread& spread, double share) const {
    set_near_means(0, p.channels, spread);
    sum_items(how, deviations(), [&](int64_t c, const Sums& sums) { set_moments_from(c, share, sums); });
  }

  template <class TermsOf>
  void grad_stats_by_segment(Parallel how, const TermsOf& terms_of) const {
    sum_items(how, terms_of, [&](int64_t c, const Sums& sums) { set_grad_sums(c, sums); });
  }
};

}  // namespace
