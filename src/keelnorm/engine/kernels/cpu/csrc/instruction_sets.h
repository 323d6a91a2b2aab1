// Every instruction set that the kernels are compiled for, from the plainest on. setup.py has the compiler's flags.
//
// X(name, dtypes, bytes of a vector, whether this processor has it, note for users). dtypes is ALL or BF16; the other
// dtypes run on the set before it. A set also requires the sets before it.
#pragma once

#define KEELNORM_INSTRUCTION_SETS(X)                                                                                 \
  X(baseline, ALL, 16, true, "native, the plainest instructions of the machine's family; floating-point on the CPU") \
  KEELNORM_WIDER_SETS(X)

#define KEELNORM_HAS(feature) __builtin_cpu_supports(feature)  // by processor and operating system

#if defined(__x86_64__)
#define KEELNORM_WIDER_SETS(X)                                                                                   \
  X(avx2, ALL, 32, KEELNORM_HAS("avx2") && KEELNORM_HAS("fma") && KEELNORM_HAS("f16c"),                          \
    "native, AVX2 and FMA; floating-point on the CPU")                                                           \
  X(avx512, ALL, 64,                                                                                             \
    KEELNORM_HAS("avx512f") && KEELNORM_HAS("avx512bw") && KEELNORM_HAS("avx512dq") && KEELNORM_HAS("avx512vl"), \
    "native, AVX-512 (F, BW, DQ, VL); floating-point on the CPU")                                                \
  X(avx512_bf16, BF16, 64, KEELNORM_HAS("avx512bf16"),                                                           \
    "native, AVX-512 and its bfloat16 conversion; bfloat16 on the CPU, the rest as avx512")
#else
#define KEELNORM_WIDER_SETS(X)
#endif

namespace keelnorm {

struct Kernels;

// One function for each compiled unit.
#define KEELNORM_DECLARE_ALL(isa)      \
  const Kernels& isa##_f32_kernels();  \
  const Kernels& isa##_f64_kernels();  \
  const Kernels& isa##_bf16_kernels(); \
  const Kernels& isa##_f16_kernels();
#define KEELNORM_DECLARE_BF16(isa) const Kernels& isa##_bf16_kernels();
#define KEELNORM_DECLARE(isa, dtypes, bytes, runs, note) \
  constexpr int isa##_vector_bytes = bytes;              \
  KEELNORM_DECLARE_##dtypes(isa)
KEELNORM_INSTRUCTION_SETS(KEELNORM_DECLARE)
#undef KEELNORM_DECLARE

}  // namespace keelnorm
