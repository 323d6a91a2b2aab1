// A vector of values as wide as the instruction set this file is compiled for, and how tensor elements get into it.
//
// KEELNORM_DTYPE is the elements' dtype: f32, f64, bf16 or f16. Arithmetic is in `Value`: float, or double for f64.
// GCC's and Clang's vector extensions give arithmetic and comparisons; only loads and stores of part of a vector
// need intrinsics. Everything has internal linkage: the same names are compiled once per instruction set and dtype, and
// the linker must never pick one unit's copy for another.
#pragma once

#include <cstdint>
#include <cstring>

#include "element.h"

namespace {

typedef Value UnalignedVec __attribute__((vector_size(kVectorBytes), aligned(sizeof(Value)), may_alias));
typedef double DoubleVec __attribute__((vector_size(kVectorBytes)));
typedef double UnalignedDoubleVec __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));

inline Vec splat(Value value) { return Vec{} + value; }

// a * b + c, with one rounding where the instruction set has that. Written out, because a compiler fuses some copies of
// a loop and not others, and the bits would depend on which copy runs.
inline Vec multiply_add(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__) && defined(KEELNORM_DOUBLE)
  return (Vec)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__AVX512F__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__) && defined(KEELNORM_DOUBLE)
  return (Vec)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__FMA__)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__) && defined(KEELNORM_DOUBLE)
  return (Vec)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#elif defined(__aarch64__)
  return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

// ---- per-channel values, which are kept as Value

inline Vec load(const Value* p) { return *reinterpret_cast<const UnalignedVec*>(p); }

inline Vec load_partial(const Value* p, int64_t count) {
  Vec v{};
  std::memcpy(&v, p, count * sizeof(Value));
  return v;
}

// ---- tensor elements

#if defined(KEELNORM_HALF)

typedef uint16_t UnalignedHalves __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));

inline Vec load(const Element* p) { return widen(*reinterpret_cast<const UnalignedHalves*>(p)); }
inline void store(Element* p, Vec v) { *reinterpret_cast<UnalignedHalves*>(p) = narrow(v); }
typedef Halves Stored;
inline Stored as_stored(Vec v) { return narrow(v); }

#else

inline void store(Element* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }
typedef Vec Stored;
inline Stored as_stored(Vec v) { return v; }

#endif

// ---- the first `count` lanes (0 < count < kLanes)

#if defined(__AVX512F__)

#if defined(KEELNORM_DOUBLE)
typedef __mmask8 Mask;
#else
typedef __mmask16 Mask;
#endif
inline Mask mask_of(int64_t count) { return (Mask)((1u << count) - 1); }

#if defined(KEELNORM_DOUBLE)
inline Vec select(Mask mask, Vec yes, Vec no) { return (Vec)_mm512_mask_mov_pd((__m512d)no, mask, (__m512d)yes); }
#else
inline Vec select(Mask mask, Vec yes, Vec no) { return (Vec)_mm512_mask_mov_ps((__m512)no, mask, (__m512)yes); }
#endif

#else

typedef IntVec Mask;
inline Mask mask_of(int64_t count) {
  IntVec lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane < (IntVec{} + (Integer)count);
}
inline Vec select(Mask mask, Vec yes, Vec no) { return mask ? yes : no; }

#endif

// Elements at p; the other lanes are zero, and their memory is not touched.
inline Vec load_elements(const Element* p, [[maybe_unused]] int64_t count, [[maybe_unused]] Mask mask) {
#if defined(__AVX512F__) && defined(KEELNORM_HALF)
  return widen((Halves)_mm256_maskz_loadu_epi16(mask, p));
#elif defined(__AVX512F__) && defined(KEELNORM_DOUBLE)
  return (Vec)_mm512_maskz_loadu_pd(mask, p);
#elif defined(__AVX512F__)
  return (Vec)_mm512_maskz_loadu_ps(mask, p);
#elif defined(__AVX2__) && defined(KEELNORM_DOUBLE)
  return (Vec)_mm256_maskload_pd(p, (__m256i)mask);
#elif defined(__AVX2__) && !defined(KEELNORM_HALF)
  return (Vec)_mm256_maskload_ps(p, (__m256i)mask);
#else
  Stored elements{};
  std::memcpy(&elements, p, count * sizeof(Element));
#if defined(KEELNORM_HALF)
  return widen(elements);
#else
  return elements;
#endif
#endif
}

inline void store_elements(Element* p, Vec v, [[maybe_unused]] int64_t count, [[maybe_unused]] Mask mask) {
#if defined(__AVX512F__) && defined(KEELNORM_HALF)
  _mm256_mask_storeu_epi16(p, mask, (__m256i)narrow(v));
#elif defined(__AVX512F__) && defined(KEELNORM_DOUBLE)
  _mm512_mask_storeu_pd(p, mask, (__m512d)v);
#elif defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, mask, (__m512)v);
#elif defined(__AVX2__) && defined(KEELNORM_DOUBLE)
  _mm256_maskstore_pd(p, (__m256i)mask, (__m256d)v);
#elif defined(__AVX2__) && !defined(KEELNORM_HALF)
  _mm256_maskstore_ps(p, (__m256i)mask, (__m256)v);
#else
  const Stored elements = as_stored(v);
  std::memcpy(p, &elements, count * sizeof(Element));
#endif
}

#if defined(__x86_64__)
template <class T>
inline void stream(void* p, T v) {
  if constexpr (sizeof v == 8) {
    long long word;
    std::memcpy(&word, &v, 8);
    _mm_stream_si64(static_cast<long long*>(p), word);
  } else if constexpr (sizeof v == 16) {
    _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)v);
#if defined(__AVX2__)
  } else if constexpr (sizeof v == 32) {
    _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)v);
#endif
#if defined(__AVX512F__)
  } else {
    _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)v);
#endif
  }
}
#endif

// Stores past the caches, for results too large to stay in them: a plain store would first read the line that it
// overwrites. p is aligned to a whole vector. end_streaming() makes such stores visible to other threads.
inline void store_streaming(Element* p, Vec v) {
#if defined(__x86_64__)
  stream(p, as_stored(v));
#else
  store(p, v);
#endif
}

inline void end_streaming() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Elements from p up to the next whole vector.
inline int64_t to_alignment(const Element* p) {
  constexpr uintptr_t bytes = kLanes * sizeof(Element);
  return (int64_t)((-(uintptr_t)p % bytes) / sizeof(Element));
}

// Asks for the cache lines of the next `count` elements. `near` brings them to the first cache, else to the second.
template <bool near, int64_t count>
inline void prefetch(const Element* p) {
  constexpr int64_t kLine = 64 / sizeof(Element);
  for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(p + i, 0, near ? 3 : 2);
}

// ---- sums of lanes, in double and always in the same order

#if defined(KEELNORM_DOUBLE)

inline DoubleVec folded(Vec v) { return v; }
inline void add_to(double* to, Vec v) { *reinterpret_cast<UnalignedDoubleVec*>(to) += v; }

#else

// By intrinsics: halves taken through memory would keep the whole vector there.
#if defined(__AVX512F__)
inline DoubleVec low_half(Vec v) { return (DoubleVec)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v)); }
inline DoubleVec high_half(Vec v) { return (DoubleVec)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)v, 1)); }
#elif defined(__AVX2__)
inline DoubleVec low_half(Vec v) { return (DoubleVec)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v)); }
inline DoubleVec high_half(Vec v) { return (DoubleVec)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, 1)); }
#elif defined(__x86_64__)
inline DoubleVec low_half(Vec v) { return (DoubleVec)_mm_cvtps_pd((__m128)v); }
inline DoubleVec high_half(Vec v) { return (DoubleVec)_mm_cvtps_pd(_mm_movehl_ps((__m128)v, (__m128)v)); }
#elif defined(__aarch64__)
inline DoubleVec low_half(Vec v) { return (DoubleVec)vcvt_f64_f32(vget_low_f32((float32x4_t)v)); }
inline DoubleVec high_half(Vec v) { return (DoubleVec)vcvt_high_f64_f32((float32x4_t)v); }
#else
inline DoubleVec low_half(Vec v) { return DoubleVec{v[0], v[1]}; }
inline DoubleVec high_half(Vec v) { return DoubleVec{v[2], v[3]}; }
#endif

// Half as many lanes of double, each the sum of two.
inline DoubleVec folded(Vec v) { return low_half(v) + high_half(v); }

inline void add_to(double* to, Vec v) {
  *reinterpret_cast<UnalignedDoubleVec*>(to) += low_half(v);
  *reinterpret_cast<UnalignedDoubleVec*>(to + kLanes / 2) += high_half(v);
}

#endif

inline double sum(DoubleVec v) {
  double total = 0;
  for (uint64_t i = 0; i < sizeof v / sizeof total; ++i) total += v[i];
  return total;
}

// ---- how many lanes a step of a loop covers, and how it stores them

struct Whole {
  static Vec load(const Element* p) { return ::load(p); }
  static Vec values(const Value* p) { return ::load(p); }
  static void store(Element* p, Vec v) { ::store(p, v); }
  static Vec keep(Vec v) { return v; }
  static void add_to(double* to, Vec v) { ::add_to(to, v); }
};

struct Streamed : Whole {
  static void store(Element* p, Vec v) { store_streaming(p, v); }
};

struct Partial {
  int64_t count;
  Mask mask;

  explicit Partial(int64_t count) : count(count), mask(mask_of(count)) {}

  Vec load(const Element* p) const { return load_elements(p, count, mask); }
  Vec values(const Value* p) const { return load_partial(p, count); }
  void store(Element* p, Vec v) const { store_elements(p, v, count, mask); }
  Vec keep(Vec v) const { return select(mask, v, Vec{}); }
  void add_to(double* to, Vec v) const {
    for (int64_t i = 0; i < count; ++i) to[i] += v[i];
  }
};

}  // namespace
