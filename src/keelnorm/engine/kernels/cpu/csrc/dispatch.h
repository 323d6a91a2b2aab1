// The instruction set that runs: the best of this machine, unless one is forced.
#pragma once

#include "problem.h"

namespace keelnorm {

const Kernels& active_kernels(Dtype dtype);

// Instruction sets are counted from the plainest on. has_kernels: whether set i has its own kernels for a dtype;
// kernels_of falls back to the next plainer set.
bool has_kernels(int i, Dtype dtype);
const Kernels& kernels_of(int i, Dtype dtype);

}  // namespace keelnorm

// For ctypes. Index i counts the compiled instruction sets from the plainest on.
#pragma GCC visibility push(default)
extern "C" {
int keelnorm_kernels_count();
const char* keelnorm_kernels_name(int i);
const char* keelnorm_kernels_note(int i);
int keelnorm_kernels_supported(int i);
long long keelnorm_kernels_calls(int i);
int keelnorm_kernels_active();
void keelnorm_kernels_force(int i);  // -1: choose by machine
}
#pragma GCC visibility pop
