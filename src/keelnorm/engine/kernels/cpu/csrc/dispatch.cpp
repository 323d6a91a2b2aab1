#include "dispatch.h"

#include <atomic>

namespace keelnorm {
namespace {

using Table = const Kernels& (*)();

struct InstructionSet {
  const char* name;
  const char* note;
  bool (*runs)();         // on a processor that runs the sets before it
  Table tables[kDtypes];  // nullptr: the set before it has the kernels
};

#define KEELNORM_ALL(isa) {isa##_f32_kernels, isa##_f64_kernels, isa##_bf16_kernels, isa##_f16_kernels}
#define KEELNORM_BF16(isa) {nullptr, nullptr, isa##_bf16_kernels, nullptr}
#define KEELNORM_ROW(isa, dtypes, bytes, runs, note) {#isa, note, [] { return bool(runs); }, KEELNORM_##dtypes(isa)},
constexpr InstructionSet kSets[] = {KEELNORM_INSTRUCTION_SETS(KEELNORM_ROW)};
constexpr int kCount = sizeof kSets / sizeof kSets[0];

bool supported(int i) { return kSets[i].runs() && (i == 0 || supported(i - 1)); }

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

bool has_kernels(int i, Dtype dtype) { return kSets[i].tables[static_cast<int>(dtype)] != nullptr; }
const Kernels& kernels_of(int i, Dtype dtype) {
  const int column = static_cast<int>(dtype);
  while (!kSets[i].tables[column]) --i;
  return kSets[i].tables[column]();
}
const Kernels& active_kernels(Dtype dtype) { return kernels_of(active(), dtype); }

}  // namespace keelnorm

using namespace keelnorm;

extern "C" {

int keelnorm_kernels_count() { return kCount; }
const char* keelnorm_kernels_name(int i) { return kSets[i].name; }
const char* keelnorm_kernels_note(int i) { return kSets[i].note; }
int keelnorm_kernels_supported(int i) { return supported(i); }
long long keelnorm_kernels_calls(int i) {
  long long total = 0;
  for (const Table& table : kSets[i].tables)
    if (table) total += table().calls();
  return total;
}
int keelnorm_kernels_active() { return active(); }
void keelnorm_kernels_force(int i) { forced.store(i, std::memory_order_relaxed); }
}
