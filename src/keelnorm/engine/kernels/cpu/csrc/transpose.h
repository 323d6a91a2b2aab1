// A copy into the other layout: a gradient often arrives in another memory format than x.
#pragma once

#include <type_traits>

#include "loops.h"
#include "parallel.h"

namespace {

#if defined(__clang__)

constexpr int64_t kSide = 64 / sizeof(Element);

// A square of kSide x kSide elements.
inline void transpose_square(const Element* in, int64_t from_next, Element* out, int64_t to_next) {
  for (int64_t j = 0; j < kSide; ++j)
    for (int64_t i = 0; i < kSide; ++i) out[j * to_next + i] = in[i * from_next + j];
}

#else

// Elements as integers of their width: nothing is computed with them.
constexpr int64_t kSide = kVectorBytes / sizeof(Element) < 16 ? kVectorBytes / sizeof(Element) : 16;
typedef std::conditional_t<sizeof(Element) == 2, int16_t, std::conditional_t<sizeof(Element) == 4, int32_t, int64_t> >
    Bits;
typedef Bits Row __attribute__((vector_size(kSide * sizeof(Element))));
typedef Bits UnalignedRow __attribute__((vector_size(kSide * sizeof(Element)), aligned(sizeof(Element)), may_alias));

// Exchanges the off-diagonal blocks of step x step in every square of twice the side; all powers of two in turn
// transpose the whole. Source: Eklundh (1972), "A fast computer method for matrix transposing".
template <int64_t step>
inline void exchange(Row* rows) {
  Row low, high;
  for (int64_t l = 0; l < kSide; ++l) {
    low[l] = (l & step) == 0 ? l : kSide + l - step;
    high[l] = (l & step) == 0 ? l + step : kSide + l;
  }
  for (int64_t i = 0; i < kSide; ++i) {
    if (i & step) continue;
    const Row a = rows[i], b = rows[i + step];
    rows[i] = __builtin_shuffle(a, b, low);
    rows[i + step] = __builtin_shuffle(a, b, high);
  }
  if constexpr (2 * step < kSide) exchange<2 * step>(rows);
}

// A square of kSide x kSide elements.
inline void transpose_square(const Element* in, int64_t from_next, Element* out, int64_t to_next) {
  Row rows[kSide];
#pragma GCC unroll 16
  for (int64_t i = 0; i < kSide; ++i) rows[i] = *reinterpret_cast<const UnalignedRow*>(in + i * from_next);
  exchange<1>(rows);
#pragma GCC unroll 16
  for (int64_t j = 0; j < kSide; ++j) *reinterpret_cast<UnalignedRow*>(out + j * to_next) = rows[j];
}

#endif

// Transposes the columns c0 .. c1 of one sample: from (rows, columns) to (columns, rows).
KEELNORM_SHARED void transpose(const Element* from, Element* to, int64_t rows, int64_t columns, int64_t c0,
                               int64_t c1) {
  for (int64_t r = 0; r < rows; r += kSide) {
    const int64_t high = rows - r < kSide ? rows - r : kSide;
    for (int64_t c = c0; c < c1; c += kSide) {
      const int64_t wide = c1 - c < kSide ? c1 - c : kSide;
      const Element* in = from + r * columns + c;
      Element* out = to + c * rows + r;
      if (wide == kSide && high == kSide) {
        transpose_square(in, columns, out, rows);
      } else {
        for (int64_t j = 0; j < wide; ++j)
          for (int64_t i = 0; i < high; ++i) out[j * rows + i] = in[i * columns + j];
      }
    }
  }
}

}  // namespace
