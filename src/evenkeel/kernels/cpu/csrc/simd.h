// A vector of floats as wide as the instruction set this file is compiled for.
//
// GCC's and Clang's vector extensions give arithmetic and comparisons; only loads and stores of part of a vector
// need intrinsics. Everything has internal linkage: the same names are compiled once per instruction set, and the
// linker must never pick one set's copy for another.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
#elif defined(__AVX2__)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef float UnalignedVec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef float HalfVec __attribute__((vector_size(kLanes * 2)));
typedef double DoubleVec __attribute__((vector_size(kLanes * 4)));  // half as many lanes
typedef double UnalignedDoubleVec __attribute__((vector_size(kLanes * 4), aligned(8), may_alias));

inline Vec splat(float value) { return Vec{} + value; }
inline Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }

// All bits set in the first `count` lanes, none in the others.
inline IntVec first_lanes(int64_t count) {
  IntVec lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane < (IntVec{} + (int32_t)count);
}

// The first `count` lanes (0 < count < kLanes); the others are zero, and their memory is not touched.
inline Vec load_partial(const float* p, int64_t count) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), p);
#elif defined(__AVX2__)
  return (Vec)_mm256_maskload_ps(p, (__m256i)first_lanes(count));
#else
  Vec v{};
  for (int64_t i = 0; i < count; ++i) v[i] = p[i];
  return v;
#endif
}

inline void store_partial(float* p, Vec v, int64_t count) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << count) - 1), (__m512)v);
#elif defined(__AVX2__)
  _mm256_maskstore_ps(p, (__m256i)first_lanes(count), (__m256)v);
#else
  for (int64_t i = 0; i < count; ++i) p[i] = v[i];
#endif
}

// Stores past the caches, for results too large to stay in them: a plain store would first read the line it is about
// to overwrite. p is aligned to a whole vector. end_streaming() makes such stores visible to other threads.
inline void store_streaming(float* p, Vec v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, (__m256)v);
#elif defined(__x86_64__)
  _mm_stream_ps(p, (__m128)v);
#else
  store(p, v);
#endif
}

inline void end_streaming() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Floats from p up to the next whole vector.
inline int64_t to_alignment(const float* p) { return (int64_t)((-(uintptr_t)p % (kLanes * 4)) / 4); }

// Asks for the cache lines of the next 4 * kLanes floats. `near` brings them to the first cache, else to the second.
template <bool near>
inline void prefetch(const float* p) {
  constexpr int64_t kLine = 16;
  for (int64_t i = 0; i < 4 * kLanes; i += kLine) __builtin_prefetch(p + i, 0, near ? 3 : 2);
}

// Keeps the first `count` lanes and clears the rest.
inline Vec keep_first(Vec v, int64_t count) { return first_lanes(count) ? v : Vec{}; }

// The first `count` lanes of a, the others of b.
inline Vec first_then(int64_t count, Vec a, Vec b) { return first_lanes(count) ? a : b; }

inline DoubleVec low_half(Vec v) {
  HalfVec half;
  __builtin_memcpy(&half, &v, sizeof half);
  return __builtin_convertvector(half, DoubleVec);
}

inline DoubleVec high_half(Vec v) {
  HalfVec half;
  __builtin_memcpy(&half, reinterpret_cast<const char*>(&v) + sizeof half, sizeof half);
  return __builtin_convertvector(half, DoubleVec);
}

// Sum of all lanes, in double and always in the same order.
inline double sum(Vec v) {
  DoubleVec d = low_half(v) + high_half(v);
  double total = 0;
  for (int i = 0; i < kLanes / 2; ++i) total += d[i];
  return total;
}

// to[0 .. kLanes) += v, in double.
inline void add_to(double* to, Vec v) {
  *reinterpret_cast<UnalignedDoubleVec*>(to) += low_half(v);
  *reinterpret_cast<UnalignedDoubleVec*>(to + kLanes / 2) += high_half(v);
}

// max(v, 0) that lets NaN through, as torch's ReLU does.
inline Vec relu(Vec v) { return (v < Vec{}) ? Vec{} : v; }

// The gradient through ReLU: 0 where its output is <= 0. g is loaded before the comparison by the caller, so that the
// compiler does not turn this into a load that waits for the mask.
inline Vec relu_gate(Vec output, Vec g) { return (output <= Vec{}) ? Vec{} : g; }

// How many lanes a step of a loop covers, and how it stores them.
struct Whole {
  static Vec load(const float* p) { return ::load(p); }
  static void store(float* p, Vec v) { ::store(p, v); }
  static Vec keep(Vec v) { return v; }
  static void add_to(double* to, Vec v) { ::add_to(to, v); }
};

struct Streamed : Whole {
  static void store(float* p, Vec v) { store_streaming(p, v); }
};

struct Partial {
  int64_t count;
  Vec load(const float* p) const { return load_partial(p, count); }
  void store(float* p, Vec v) const { store_partial(p, v, count); }
  Vec keep(Vec v) const { return keep_first(v, count); }
  void add_to(double* to, Vec v) const {
    for (int64_t i = 0; i < count; ++i) to[i] += v[i];
  }
};

}  // namespace
