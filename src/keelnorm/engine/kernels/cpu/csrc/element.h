// The dtype this unit is compiled for: its element and arithmetic types, and for the 16-bit ones the conversions.
#pragma once

#include <cstdint>
#include <limits>

#include "instruction_sets.h"

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)  // GCC 12 warns of operands that its own header leaves undefined
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define KEELNORM_DTYPE_f32 1
#define KEELNORM_DTYPE_f64 2
#define KEELNORM_DTYPE_bf16 3
#define KEELNORM_DTYPE_f16 4
#define KEELNORM_PASTE_(a, b) a##b
#define KEELNORM_PASTE(a, b) KEELNORM_PASTE_(a, b)
#define KEELNORM_DTYPE_CODE KEELNORM_PASTE(KEELNORM_DTYPE_, KEELNORM_DTYPE)

#if KEELNORM_DTYPE_CODE == 2
#define KEELNORM_DOUBLE
#elif KEELNORM_DTYPE_CODE > 2
#define KEELNORM_HALF
#endif

namespace {

constexpr int64_t kVectorBytes = keelnorm::KEELNORM_PASTE(KEELNORM_ISA, _vector_bytes);

#if defined(KEELNORM_DOUBLE)
typedef double Value;
typedef int64_t Integer;
#else
typedef float Value;
typedef int32_t Integer;
#endif
constexpr int64_t kLanes = kVectorBytes / sizeof(Value);

typedef Value Vec __attribute__((vector_size(kVectorBytes)));
typedef Integer IntVec __attribute__((vector_size(kVectorBytes)));

#if defined(KEELNORM_HALF)

enum class Half : uint16_t {};
typedef Half Element;
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));

inline Words words(Halves h) { return __builtin_convertvector(h, Words); }
inline Halves low_halves(Words w) { return __builtin_convertvector(w, Halves); }

#if KEELNORM_DTYPE_CODE == 3  // bfloat16: the upper half of a float

inline Vec widen(Halves h) { return (Vec)(words(h) << 16); }

// To nearest, ties to even; NaN stays NaN.
#if defined(__AVX512BF16__)  // takes and gives subnormals as 0
inline Halves narrow(Vec v) { return (Halves)_mm512_cvtneps_pbh((__m512)v); }
#elif defined(__AVX512F__)
inline Halves narrow(Vec v) {
  const auto all = [](int word) { return _mm512_set1_epi32(word); };
  const __m512i w = (__m512i)v;
  __m512i rounded = _mm512_add_epi32(w, all(0x7fff));
  rounded = _mm512_mask_add_epi32(rounded, _mm512_test_epi32_mask(w, all(0x10000)), rounded, all(1));
  rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q), all(0x7fc00000));
  const __m512i upper =
      _mm512_set_epi64(0, 0, 0, 0, 0x1f001d001b0019, 0x17001500130011, 0xf000d000b0009, 0x7000500030001);
  return (Halves)_mm512_castsi512_si256(_mm512_permutexvar_epi16(upper, rounded));
}
#else
inline Halves narrow(Vec v) {
  const Words w = (Words)v, rounded = (w + 0x7fff + ((w >> 16) & 1)) >> 16;
  return low_halves((v != v) ? Words{} + 0x7fc0 : rounded);
}
#endif

#elif defined(__AVX512F__)

inline Vec widen(Halves h) { return (Vec)_mm512_cvtph_ps((__m256i)h); }
inline Halves narrow(Vec v) {
  return (Halves)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

#elif defined(__AVX2__)

inline Vec widen(Halves h) { return (Vec)_mm256_cvtph_ps((__m128i)h); }
inline Halves narrow(Vec v) { return (Halves)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT); }

#elif defined(__aarch64__)

typedef __fp16 Float16s __attribute__((vector_size(kLanes * 2)));
inline Vec widen(Halves h) { return __builtin_convertvector((Float16s)h, Vec); }
inline Halves narrow(Vec v) { return (Halves) __builtin_convertvector(v, Float16s); }

#else  // by integer arithmetic

inline Vec widen(Halves h) {
  const Words w = words(h), magnitude = (w & 0x7fff) << 13, exponent = magnitude & (0x7c00u << 13);
  const Words rebased = magnitude + ((127u - 15) << 23);
  const Words special = rebased + ((128u - 16) << 23);  // infinity, NaN
  const Words smallest_normal = Words{} + (113u << 23);
  const Words subnormal = (Words)((Vec)(rebased + (1u << 23)) - (Vec)smallest_normal);
  Words result = (exponent == (0x7c00u << 13)) ? special : rebased;
  result = (exponent == 0) ? subnormal : result;
  return (Vec)(result | ((w & 0x8000) << 16));
}

// To nearest, ties to even; NaN stays NaN.
inline Halves narrow(Vec v) {
  const Words w = (Words)v, magnitude = w & 0x7fffffff;
  const Words special = (magnitude > 0x7f800000u) ? (Words{} + 0x7e00) : (Words{} + 0x7c00);
  // Adding a power of two whose last bit is the smallest subnormal's lets the addition round.
  const Words magic = Words{} + (((127u - 15) + (23 - 10) + 1) << 23);
  const Words subnormal = (Words)((Vec)magnitude + (Vec)magic) - magic;
  const Words normal = (magnitude - ((127u - 15) << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  Words result = (magnitude < (113u << 23)) ? subnormal : normal;
  result = (magnitude >= ((127u + 16) << 23)) ? special : result;
  return low_halves(result | ((w >> 16) & 0x8000));
}

#endif

inline double to_double(Element e) {
  Halves h{};
  h[0] = (uint16_t)e;
  return widen(h)[0];
}

#else

typedef Value Element;
inline double to_double(Element e) { return e; }

#endif

// The largest finite element.
#if KEELNORM_DTYPE_CODE == 4
constexpr Value kLargest = 65504;
#elif KEELNORM_DTYPE_CODE == 3
constexpr Value kLargest = 0x1.fep127f;
#else
constexpr Value kLargest = std::numeric_limits<Value>::max();
#endif

}  // namespace
