// x as M rows of C consecutive values, M = N * S (channels-last, and fully connected layers with S = 1).
//
// Rows are cut into chunks by shape alone. Each chunk has its own sums, which are added in the order of the chunks, so
// the result has the same bits for any number of threads. The sums of a group of columns stay in registers while the
// rows of a tile are read one after another, so memory is read in sequential streams.
//
// Short rows are folded: several rows are treated as one wide row, with the channels' coefficients repeated, so that
// vectors are full. The remaining rows at the end are rows of C.
#pragma once

#include "coefficients.h"

namespace {

class ChannelsLast {
 public:
  explicit ChannelsLast(const Problem& problem)
      : p(problem),
        channels(p.channels),
        fold(fold_of(p)),
        width(fold * channels),
        rows(p.per_channel() / fold),
        left_over(p.per_channel() % fold),
        chunk_rows(chunk_rows_of(p)),
        chunks(chunks_of(p)),
        coefficients(p.scratch, width),
        partial(p.scratch + Coefficients::doubles(width)) {}

  static int64_t scratch_doubles(const Problem& p) {
    const int64_t width = fold_of(p) * p.channels;
    return Coefficients::doubles(width) + chunks_of(p) * 2 * width;
  }

  void stats(Parallel how) const {
    const int64_t count = counted(p);
    const double share = 1.0 / (double)(count > 0 ? count : 1);
    set_near_means();
    const auto deviation = [x = elements(p.x), near = coefficients.center](int64_t c, auto lanes)
                               __attribute__((always_inline)) { return Deviation{x, lanes.values(near + c)}; };
    const auto done = [&](int64_t c, const Sums& sums) {
      if (set_moments(p, share, c, coefficients.center[c], sums.first, sums.second)) return;
      set_moments_slowly(
          p, share, c, [&](int64_t i) { return to_double(elements(p.x)[i * channels + c]); },
          [&](int64_t i) { return !p.mask || p.mask[i]; });
    };
    if (p.mask)
      sum_chunks<true>(how, deviation, done);
    else
      sum_chunks<false>(how, deviation, done);
  }

  template <class OutputOf>
  void apply(Parallel how, const OutputOf& output_of) const {
    set_forward();
    write_chunks(how, elements(p.y), output_of);
  }

  template <class OutputOf>
  void forward(Parallel how, const OutputOf& output_of) const {
    if (p.training) stats(how);
    finish_moments(p, 0, channels);
    apply(how, output_of);
  }

  template <class TermsOf>
  void grad_stats(Parallel how, const TermsOf& terms_of) const {
    set_forward();
    const auto done = [&](int64_t c, const Sums& sums) {
      p.sum_g[c] = sums.first;
      p.sum_gxhat[c] = sums.second;
      center_grad_sums(p, c, c + 1);
    };
    if (p.mask)
      sum_chunks<true>(how, terms_of, done);
    else
      sum_chunks<false>(how, terms_of, done);
  }

  template <class GradientOf>
  void grad_input(Parallel how, const GradientOf& gradient_of) const {
    set_forward();
    coefficients.set_backward(p, 0, channels);
    repeat(coefficients.slope);
    repeat(coefficients.offset);
    write_chunks(how, elements(p.dx), gradient_of);
  }

  template <class TermsOf, class GradientOf>
  void backward(Parallel how, const TermsOf& terms_of, const GradientOf& gradient_of) const {
    grad_stats(how, terms_of);
    grad_input(how, gradient_of);
  }

  // The functions TermsOf and ValueOf: make(coefficients of the columns from c on).
  template <class Make>
  struct Bound {
    Coefficients coefficients;
    Make make;
    template <class Lanes>
    KEELNORM_INLINE auto operator()(int64_t c, Lanes lanes) const {
      return make(coefficients.from(c, lanes),
                  Slope{lanes.values(coefficients.slope + c), lanes.values(coefficients.offset + c)});
    }
  };
  template <class Make>
  Bound<Make> by_channel(const Make& make) const {
    return {coefficients, make};
  }

 private:
  const Problem& p;
  const int64_t channels, fold, width;  // fold rows of C are one of width
  const int64_t rows, left_over;        // wide ones, and the remaining rows of C
  const int64_t chunk_rows, chunks;     // in wide rows; the last chunk takes the remaining rows
  const Coefficients coefficients;      // width each
  double* const partial;                // per chunk: two sums for each column

  static constexpr int64_t kGroup = 4;              // vectors of columns that are summed at once
  static constexpr int64_t kTile = kValuesPerLane;  // rows that are summed before sums go to double
  static constexpr int64_t kRowsToWrite = 4, kLongRow = 1024;
  static constexpr int64_t kFoldedWidth = 64, kMostChunks = 128, kLeastChunk = 64 * 1024;

  static int64_t fold_of(const Problem& p) {
    if (p.channels >= kFoldedWidth || p.per_channel() < 8 * kFoldedWidth) return 1;
    int64_t fold = (kFoldedWidth + p.channels - 1) / p.channels;
    while (fold * p.channels % 16 != 0 && fold < 16) ++fold;
    return fold;
  }

  static int64_t chunk_rows_of(const Problem& p) {
    const int64_t fold = fold_of(p), rows = p.per_channel() / fold, width = fold * p.channels;
    const int64_t even = (rows + kMostChunks - 1) / kMostChunks, least = kLeastChunk / width;
    const int64_t rows_of_chunk = even > least ? even : least;
    return (rows_of_chunk / kTile + 1) * kTile;
  }

  static int64_t chunks_of(const Problem& p) {
    const int64_t rows = p.per_channel() / fold_of(p), chunk_rows = chunk_rows_of(p);
    return rows > chunk_rows ? (rows + chunk_rows - 1) / chunk_rows : 1;
  }

  void repeat(Value* values) const {
    for (int64_t c = channels; c < width; ++c) values[c] = values[c - channels];
  }

  void set_forward() const {
    coefficients.set_forward(p, 0, channels);
    repeat(coefficients.center);
    repeat(coefficients.scale);
    repeat(coefficients.shift);
  }

  void set_near_means() const {
    const Spread spread(p, 16);
    double* const totals = partial;
    for (int64_t c = 0; c < channels; ++c) totals[c] = 0;
    for (int64_t i = 0; i < spread.count; ++i) {
      const Element* row = elements(p.x) + spread.at[i] * channels;
      for (int64_t c = 0; c < channels; ++c) totals[c] += to_double(row[c]);
    }
    const double share = 1.0 / (double)(spread.count > 0 ? spread.count : 1);
    for (int64_t c = 0; c < channels; ++c) coefficients.center[c] = (Value)(totals[c] * share);  // not used yet
    repeat(coefficients.center);
  }

  bool streams_to(const void* out) const {
    return streams(p) && width % kLanes == 0 && to_alignment(elements(out)) == 0;
  }

  // ---- sums

  // Sums two terms over all rows, or those that the mask lets through. terms_of(c, lanes) gives the terms of the vector
  // at column c; done(c, sums) ends a channel.
  template <bool masked, class TermsOf, class Done>
  void sum_chunks(Parallel how, const TermsOf& terms_of, const Done& done) const {
    constexpr bool writes = decltype(terms_of(0, Whole{}))::kWrites;
    const bool streaming = writes && streams_to(p.dresidual ? p.dresidual : p.dx);
    parallel(how, chunks, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        double* const sums = partial + chunk * 2 * width;
        for (int64_t c = 0; c < 2 * width; ++c) sums[c] = 0;
        const bool last = chunk + 1 == chunks;
        const int64_t r0 = chunk * chunk_rows, r1 = last ? rows : r0 + chunk_rows;
        if constexpr (masked) {
          add_counted_rows(r0 * fold, r1 * fold + (last ? left_over : 0), sums, terms_of);
        } else {
          if (streaming)
            add_rows<std::conditional_t<writes, Streamed, Whole>>(r0 * width, r1 - r0, width, sums, terms_of);
          else
            add_rows<Whole>(r0 * width, r1 - r0, width, sums, terms_of);
          if (last && left_over) add_rows<Whole>(rows * width, left_over, channels, sums, terms_of);
        }
      }
      if (streaming) end_streaming();
    });
    for (int64_t chunk = 1; chunk < chunks; ++chunk)  // into the first chunk's
      for (int64_t c = 0; c < 2 * width; ++c) partial[c] += partial[chunk * 2 * width + c];
    for (int64_t c = 0; c < channels; ++c) {
      Sums sums;
      for (int64_t k = c; k < width; k += channels) sums.first += partial[k], sums.second += partial[width + k];
      done(c, sums);
    }
  }

  // Where the rows of a tile begin: consecutive ones, of a number that the compiler knows or not, or listed ones.
  template <int64_t n>
  struct Rows {
    int64_t start, stride;
    static constexpr int64_t count = n;
    int64_t operator[](int64_t i) const { return start + i * stride; }
  };
  struct SomeRows {
    int64_t start, stride, count;
    int64_t operator[](int64_t i) const { return start + i * stride; }
  };
  struct ListedRows {
    int64_t starts[kTile], count = 0;
    int64_t operator[](int64_t i) const { return starts[i]; }
  };

  // Rows of so many columns, the first of which begins at index `at`.
  template <class Store, class TermsOf>
  KEELNORM_SHARED void add_rows(int64_t at, int64_t rows, int64_t columns, double* sums, const TermsOf terms_of) const {
    for (; rows >= kTile; rows -= kTile, at += kTile * columns)
      add_tile<Store>(Rows<kTile>{at, columns}, columns, sums, terms_of);
    if (rows > 0) add_tile<Store>(SomeRows{at, columns, rows}, columns, sums, terms_of);
  }

  template <class TermsOf>
  KEELNORM_SHARED void add_counted_rows(int64_t r0, int64_t r1, double* sums, const TermsOf terms_of) const {
    ListedRows listed;
    for (int64_t r = r0; r < r1; ++r) {
      if (p.mask[r]) listed.starts[listed.count++] = r * channels;
      if (listed.count == kTile || (r + 1 == r1 && listed.count > 0)) {
        add_tile<Whole>(listed, channels, sums, terms_of);
        listed.count = 0;
      }
    }
  }

  template <class Store, class TileRows, class TermsOf>
  KEELNORM_INLINE void add_tile(const TileRows& tile, int64_t columns, double* sums, const TermsOf& terms_of) const {
    int64_t c = 0;
    for (; c + kGroup * kLanes <= columns; c += kGroup * kLanes) add_columns(tile, c, Store{}, sums, terms_of);
    for (; c + kLanes <= columns; c += kLanes) add_column(tile, c, Store{}, sums, terms_of);
    if (c < columns) add_column(tile, c, Partial(columns - c), sums, terms_of);
  }

  // The sums of a vector of columns.
  template <class Terms>
  struct Column {
    const Terms terms;
    Vec a{}, b{};
    explicit Column(const Terms& terms) : terms(terms) {}

    template <class Lanes>
    KEELNORM_INLINE void add(int64_t at, int64_t ahead, Lanes lanes) {
      terms.template prefetch<false, kLanes>(at + ahead);
      terms(at, lanes, a, b);
    }

    template <class Lanes>
    KEELNORM_INLINE void flush_to(double* sums, int64_t width, Lanes lanes) const {
      lanes.add_to(sums, a);
      lanes.add_to(sums + width, b);
    }
  };

  template <class TileRows, class Lanes, class TermsOf>
  KEELNORM_INLINE void add_column(const TileRows& tile, int64_t c, Lanes lanes, double* sums,
                                  const TermsOf& terms_of) const {
    Column column(terms_of(c, lanes));
    const int64_t ahead = kTile * width;
    for (int64_t i = 0; i < tile.count; ++i) column.add(tile[i] + c, ahead, lanes);
    column.flush_to(sums + c, width, lanes);
  }

  // kGroup of them at once.
  template <class TileRows, class Lanes, class TermsOf>
  KEELNORM_INLINE void add_columns(const TileRows& tile, int64_t c, Lanes lanes, double* sums,
                                   const TermsOf& terms_of) const {
    Column c0(terms_of(c, lanes)), c1(terms_of(c + kLanes, lanes));
    Column c2(terms_of(c + 2 * kLanes, lanes)), c3(terms_of(c + 3 * kLanes, lanes));
    const int64_t ahead = kTile * width;
    for (int64_t i = 0; i < tile.count; ++i) {
      const int64_t at = tile[i] + c;
      c0.add(at, ahead, lanes);
      c1.add(at + kLanes, ahead, lanes);
      c2.add(at + 2 * kLanes, ahead, lanes);
      c3.add(at + 3 * kLanes, ahead, lanes);
    }
    c0.flush_to(sums + c, width, lanes);
    c1.flush_to(sums + c + kLanes, width, lanes);
    c2.flush_to(sums + c + 2 * kLanes, width, lanes);
    c3.flush_to(sums + c + 3 * kLanes, width, lanes);
  }

  // ---- writing

  // Writes all rows of `out`. value_of(c, lanes) gives the function that computes the vector at column c of a row.
  template <class ValueOf>
  void write_chunks(Parallel how, Element* out, const ValueOf& value_of) const {
    const bool streaming = streams_to(out);
    parallel(how, chunks, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        // Tensors that exceed the last cache are walked backwards, from the rows that the last pass left in it.
        const int64_t chunk = p.large ? end - 1 - (i - begin) : i;
        const bool last = chunk + 1 == chunks;
        const int64_t r0 = chunk * chunk_rows, r1 = last ? rows : r0 + chunk_rows;
        // One row at a time is one stream through memory; but the coefficients of long rows fall out of the first
        // cache. In cache, loading coefficients once for several rows is what counts.
        if (streaming && width <= kLongRow)
          write_rows<1, Streamed>(r0 * width, r1 - r0, width, out, value_of);
        else if (streaming)
          write_rows<kRowsToWrite, Streamed>(r0 * width, r1 - r0, width, out, value_of);
        else
          write_rows<kRowsToWrite, Whole>(r0 * width, r1 - r0, width, out, value_of);
        if (last && left_over) write_rows<kRowsToWrite, Whole>(rows * width, left_over, channels, out, value_of);
        if (p.mask) pad(out, r0 * fold, r1 * fold + (last ? left_over : 0));
      }
      if (streaming) end_streaming();
    });
  }

  // Overwrites the masked values in the rows r0 .. r1 of C.
  void pad(Element* out, int64_t r0, int64_t r1) const {
    for (int64_t r = r0; r < r1; ++r) {
      if (p.mask[r]) continue;
      if (p.padding)
        __builtin_memcpy(out + r * channels, elements(p.padding) + r * channels, channels * sizeof(Element));
      else
        __builtin_memset(out + r * channels, 0, channels * sizeof(Element));
    }
  }

  // Rows of so many columns, the first of which begins at index `at`.
  template <int64_t abreast, class Store, class ValueOf>
  KEELNORM_SHARED static void write_rows(int64_t at, int64_t rows, int64_t columns, Element* out,
                                         const ValueOf value_of) {
    for (; rows >= abreast; rows -= abreast, at += abreast * columns)
      write_columns<abreast, Store>(at, columns, out, value_of);
    if constexpr (abreast > 1)
      for (; rows > 0; --rows, at += columns) write_columns<1, Store>(at, columns, out, value_of);
  }

  template <int64_t abreast, class Store, class ValueOf>
  KEELNORM_INLINE static void write_columns(int64_t at, int64_t columns, Element* out, const ValueOf& value_of) {
    const auto column = [at, columns, out, value_of](int64_t c, auto lanes) {
      const auto value = value_of(c, lanes);
      Vec v[abreast];  // all loads before the first store: rows may lie a multiple of a page apart
#pragma GCC unroll 4
      for (int64_t i = 0; i < abreast; ++i) v[i] = value(at + i * columns + c, lanes);
#pragma GCC unroll 4
      for (int64_t i = 0; i < abreast; ++i) lanes.store(out + at + i * columns + c, v[i]);
    };
    int64_t c = 0;
    for (; c + kLanes <= columns; c += kLanes) column(c, Store{});
    if (c < columns) column(c, Partial(columns - c));
  }
};

}  // namespace
