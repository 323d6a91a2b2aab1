// x as M rows of C consecutive values, M = N * S (channels-last, and fully connected layers with S = 1).
//
// Rows are cut into chunks by shape alone; each chunk has its own sums, added in order of the chunks, so that the
// result has the same bits for any number of threads. A few rows are walked abreast, column by column, with the sums of
// a column in registers; so memory still sees sequential streams.
#pragma once

#include "coefficients.h"
#include "loops.h"
#include "parallel.h"

namespace {

class ChannelsLast {
 public:
  explicit ChannelsLast(const Problem& problem)
      : p(problem),
        rows(p.per_channel()),
        channels(p.channels),
        chunk_rows(chunk_rows_of(p)),
        chunks((rows + chunk_rows - 1) / chunk_rows),
        coefficients(p.scratch, p.channels),
        partial(p.scratch + Coefficients::doubles(p.channels)) {}

  static int64_t scratch_doubles(const Problem& p) {
    const int64_t chunk_rows = chunk_rows_of(p);
    return Coefficients::doubles(p.channels) + (p.per_channel() + chunk_rows - 1) / chunk_rows * 2 * p.channels;
  }

  void run_stats(Parallel how) const {
    float* const k = coefficients.center;  // not in use yet
    const double share = 1.0 / (double)rows;
    set_near_mean(k);
    sum_chunks(
        how,
        [&](int64_t c, auto lanes) {
          return [lanes, ahead = kRowsToSum * channels, x = p.x, near = lanes.load(k + c)](int64_t at, Vec& a, Vec& b) {
            __builtin_prefetch(x + at + ahead, 0, 2);
            const Vec d = lanes.load(x + at) - near;  // lanes without a value: 0 - 0
            a += d;
            b += d * d;
          };
        },
        [&](int64_t c, const Sums& sums) {
          if (!set_moments(p, share, c, k[c], sums.first, sums.second)) set_moments_slowly(c);
        });
  }

  template <bool relu_after, bool with_residual>
  void run_apply(Parallel how) const {
    coefficients.set_forward(p, 0, channels);
    write_chunks(how, p.y, [&](int64_t c, auto lanes) {
      return Output<relu_after, with_residual>{p.x, p.residual, coefficients.from(c, lanes)};
    });
  }

  template <bool relu_after, bool with_residual>
  void run_forward(Parallel how) const {
    if (p.training) run_stats(how);
    finish_moments(p, 0, channels);
    run_apply<relu_after, with_residual>(how);
  }

  template <Gate gate, bool write_g>
  void run_grad_stats(Parallel how) const {
    coefficients.set_forward(p, 0, channels);
    sum_chunks(
        how,
        [&](int64_t c, auto lanes) {
          return [lanes, ahead = kRowsToSum * channels, x = p.x, y = p.y, dy = p.dy, dresidual = p.dresidual,
                  normalize = coefficients.from(c, lanes)](int64_t at, Vec& a, Vec& b) {
            __builtin_prefetch(x + at + ahead, 0, 2);
            __builtin_prefetch(dy + at + ahead, 0, 2);
            const Vec xx = lanes.load(x + at), yy = gate == Gate::from_y ? lanes.load(y + at) : Vec{};
            const Vec g = gated<gate>(normalize, lanes.load(dy + at), xx, yy);
            if constexpr (write_g) lanes.store(dresidual + at, g);
            a += g;
            b += g * (xx - normalize.center);
          };
        },
        [&](int64_t c, const Sums& sums) {
          p.sum_g[c] = sums.first;
          p.sum_gxhat[c] = sums.second;
          center_grad_sums(p, c, c + 1);
        });
  }

  template <Gate gate, bool fixed>
  void run_grad_input(Parallel how, const float* dy) const {
    coefficients.set_forward(p, 0, channels);
    coefficients.set_backward(p, 0, channels);
    write_chunks(how, p.dx, [&](int64_t c, auto lanes) {
      return InputGradient<gate, fixed>{dy,
                                        p.x,
                                        p.y,
                                        coefficients.from(c, lanes),
                                        lanes.load(coefficients.slope + c),
                                        lanes.load(coefficients.offset + c)};
    });
  }

  template <Gate gate, bool write_g, bool fixed>
  void run_backward(Parallel how) const {
    constexpr Gate second = write_g ? Gate::open : gate;
    if (write_g || p.sum_g) run_grad_stats<gate, write_g>(how);
    if (p.dx) run_grad_input<second, fixed>(how, write_g ? p.dresidual : p.dy);
  }

 private:
  const Problem& p;
  const int64_t rows, channels, chunk_rows, chunks;
  const Coefficients coefficients;
  double* const partial;  // per chunk: two sums for each channel

  static constexpr int64_t kRowsToSum = 8, kRowsToWrite = 4;  // rows walked abreast
  static constexpr int64_t kLongRow = 1024;
  static constexpr int64_t kChunkFloats = 32 * 1024, kLeastRows = 128;

  static int64_t chunk_rows_of(const Problem& p) {
    const int64_t blocks = kChunkFloats / (kLeastRows * p.channels);
    return kLeastRows * (blocks > 1 ? blocks : 1);
  }

  void set_near_mean(float* k) const {
    const int64_t samples = rows < 16 ? rows : 16;
    double* const totals = partial;
    for (int64_t c = 0; c < channels; ++c) totals[c] = 0;
    for (int64_t i = 0; i < samples; ++i) {
      const float* row = p.x + i * rows / samples * channels;
      for (int64_t c = 0; c < channels; ++c) totals[c] += row[c];
    }
    for (int64_t c = 0; c < channels; ++c) k[c] = (float)(totals[c] / (double)samples);
  }

  // Two passes in double: for the rare channel whose sums lost digits.
  void set_moments_slowly(int64_t c) const {
    double total = 0, m2 = 0;
    for (int64_t r = 0; r < rows; ++r) total += p.x[r * channels + c];
    const double mean = total / (double)rows;
    for (int64_t r = 0; r < rows; ++r) {
      const double d = p.x[r * channels + c] - mean;
      m2 += d * d;
    }
    p.mean[c] = mean;
    p.var[c] = m2 / (double)rows;
  }

  // Sums two terms over all rows. term_at(c, lanes) gives the function that adds the terms of the vector at column c;
  // done(c, sums) ends a channel.
  template <class TermAt, class Done>
  void sum_chunks(Parallel how, const TermAt& term_at, const Done& done) const {
    parallel(how, chunks, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        double* const sums = partial + chunk * 2 * channels;
        for (int64_t c = 0; c < 2 * channels; ++c) sums[c] = 0;
        const int64_t r1 = rows - chunk * chunk_rows < chunk_rows ? rows : (chunk + 1) * chunk_rows;
        int64_t r = chunk * chunk_rows;
        for (; r + kRowsToSum <= r1; r += kRowsToSum) add_rows(r, sums, term_at, Fixed<kRowsToSum>{});
        if (r < r1) add_rows(r, sums, term_at, Counted{r1 - r});
      }
    });
    for (int64_t chunk = 1; chunk < chunks; ++chunk)  // into the first chunk's
      for (int64_t c = 0; c < 2 * channels; ++c) partial[c] += partial[chunk * 2 * channels + c];
    for (int64_t c = 0; c < channels; ++c) done(c, Sums{partial[c], partial[channels + c]});
  }

  // A number of rows that the compiler knows, or not.
  template <int64_t n>
  struct Fixed {
    static constexpr int64_t count = n;
  };
  struct Counted {
    int64_t count;
  };

  template <class TermAt, class Rows>
  void add_rows(int64_t r, double* sums, const TermAt& term_at, Rows abreast) const {
    for_vectors(channels, [&](int64_t c, auto lanes) {
      const auto term = term_at(c, lanes);
      Vec a{}, b{};
      for (int64_t i = 0; i < abreast.count; ++i) term((r + i) * channels + c, a, b);
      lanes.add_to(sums + c, a);
      lanes.add_to(sums + channels + c, b);
    });
  }

  // Writes all rows of `out`. value_at(c, lanes) gives the function that computes the vector at column c of a row.
  template <class ValueAt>
  void write_chunks(Parallel how, float* out, const ValueAt& value_at) const {
    const bool streaming = p.streaming && channels % kLanes == 0 && to_alignment(out) == 0;
    // One row at a time is one stream through memory; but the coefficients of long rows fall out of the first cache.
    const int64_t abreast = channels > kLongRow ? kRowsToWrite : 1;
    parallel(how, chunks, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        // What does not fit the last cache is walked backwards, from the rows that the last pass left there.
        const int64_t chunk = p.streaming ? end - 1 - (i - begin) : i;
        const int64_t r1 = rows - chunk * chunk_rows < chunk_rows ? rows : (chunk + 1) * chunk_rows;
        int64_t r = chunk * chunk_rows;
        for (; abreast > 1 && r + abreast <= r1; r += abreast) write_rows<kRowsToWrite>(r, out, value_at, streaming);
        for (; r < r1; ++r) write_rows<1>(r, out, value_at, streaming);
      }
      if (streaming) end_streaming();
    });
  }

  template <int64_t count, class ValueAt>
  void write_rows(int64_t r, float* out, const ValueAt& value_at, bool streaming) const {
    const auto column = [&](int64_t c, auto lanes) {
      const auto value = value_at(c, lanes);
      Vec v[count];  // all loads before the first store: rows may lie a multiple of a page apart
      for (int64_t i = 0; i < count; ++i) v[i] = value((r + i) * channels + c, lanes);
      for (int64_t i = 0; i < count; ++i) lanes.store(out + (r + i) * channels + c, v[i]);
    };
    if (!streaming) return for_vectors(channels, column);
    for (int64_t c = 0; c < channels; c += kLanes) column(c, Streamed{});
  }
};

}  // namespace
