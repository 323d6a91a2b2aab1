#include "dispatch.h"

#include <atomic>

namespace keelnorm {
namespace {

using Table = const Kernels& (*)();

#define KEELNORM_ROW(isa) {isa##_f32_kernels, isa##_f64_kernels, isa##_bf16_kernels, isa##_f16_kernels}

constexpr Table kTables[][kDtypes] = {
    KEELNORM_ROW(baseline),
#if defined(__x86_64__)
    KEELNORM_ROW(avx2),
    KEELNORM_ROW(avx512),
    {nullptr, nullptr, avx512_bf16_bf16_kernels, nullptr},  // other dtypes take the row above
#endif
};
constexpr int kCount = sizeof(kTables) / sizeof(kTables[0]);

// What __builtin_cpu_supports says includes whether the operating system saves the wide registers.
bool supported(int i) {
#if defined(__x86_64__)
  if (i == 1) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (i == 2)
    return supported(1) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (i == 3) return supported(2) && __builtin_cpu_supports("avx512bf16");
#endif
  return i == 0;
}

int best() {
  int i = kCount - 1;
  while (!supported(i)) --i;
  return i;
}

std::atomic<int> forced{-1};

int active() {
  static const int by_machine = best();
  const int i = forced.load(std::memory_order_relaxed);
  return i < 0 ? by_machine : i;
}

}  // namespace

bool has_kernels(int i, Dtype dtype) { return kTables[i][static_cast<int>(dtype)] != nullptr; }
const Kernels& kernels_of(int i, Dtype dtype) {
  const int column = static_cast<int>(dtype);
  while (!kTables[i][column]) --i;
  return kTables[i][column]();
}
const Kernels& active_kernels(Dtype dtype) { return kernels_of(active(), dtype); }

}  // namespace keelnorm

using namespace keelnorm;

extern "C" {

int keelnorm_kernels_count() { return kCount; }
const char* keelnorm_kernels_name(int i) { return kernels_of(i, Dtype::bf16).name; }
int keelnorm_kernels_supported(int i) { return supported(i); }
long long keelnorm_kernels_calls(int i) {
  long long total = 0;
  for (const Table& table : kTables[i])
    if (table) total += table().calls();
  return total;
}
int keelnorm_kernels_active() { return active(); }
void keelnorm_kernels_force(int i) { forced.store(i, std::memory_order_relaxed); }
}
