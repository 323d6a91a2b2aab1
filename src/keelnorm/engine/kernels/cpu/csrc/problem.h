// The problem that an operator is given, without torch: plain pointers, sizes and a way to run in parallel.
//
// Names as everywhere in the project: N samples, C channels, S positions, M = N*S values per channel.
#pragma once

#include <cmath>
#include <cstdint>

#include "activation_list.h"
#include "instruction_sets.h"

namespace keelnorm {

enum class Dtype { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };
constexpr int kDtypes = 4;

// The memory layout of x, y, dy, dx and the residual: the same for all.
enum class Layout { contiguous /* N, C, S */, channels_last /* N, S, C */ };

// Tensors of fewer values run in one thread: waking a second one costs more than it saves.
constexpr int64_t kSerialBelow = 32768;

// Runs body(context, begin, end) over disjoint ranges that cover 0 .. tasks-1.
struct Parallel {
  void (*run)(int64_t tasks, void (*body)(void* context, int64_t begin, int64_t end), void* context);
};

struct Problem {
  int64_t samples = 0, channels = 0, positions = 0;
  Layout layout = Layout::contiguous;
  Dtype dtype = Dtype::f32;  // of x, y, dy, dx and the residual
  Activation activation = Activation::none;
  double a = 0, b = 0;   // the activation's parameters, see keelnorm/engine/activations.py
  bool training = true;  // normalize with the batch's moments (and differentiate through them)
  double eps = 0, momentum = 0;

  const void* x = nullptr;
  const void* residual = nullptr;  // the backward needs it, but for none; for relu it needs y in its place
  // N, S: the values that count, in sums and results, are those whose byte is not 0; nullptr: all
  const unsigned char* mask = nullptr;
  const void* padding = nullptr;   // where masked values of a result are copied from; nullptr: they are 0
  const double* weight = nullptr;  // nullptr: ones
  const double* bias = nullptr;    // nullptr: zeros
  void* y = nullptr;               // written by the forward (may be x); with relu and a residual, read by the backward
  double* running_mean = nullptr;  // updated when training and not nullptr
  double* running_var = nullptr;
  double mean_below = HUGE_VAL, var_below = HUGE_VAL;  // first values that their dtypes store as infinity
  const int64_t* batches = nullptr;                    // so far, where the running statistics average over all batches
  int64_t* counts = nullptr;                           // 3, C: see keelnorm/engine/update_counts.py

  double* mean = nullptr;  // C values each: the moments that normalize
  double* var = nullptr;   // biased
  double* rstd = nullptr;  // 1 / sqrt(var + eps)

  const void* dy = nullptr;
  void* dx = nullptr;           // may be x
  void* dresidual = nullptr;    // with sums, unless the activation is relu and dx is wanted
  double* sum_g = nullptr;      // C values each: sum of g, the gradient before the activation,
  double* sum_gxhat = nullptr;  // and of g times the normalized x; they are the gradients of bias and weight
  double count = 0;  // values per channel that the sums are over: with a mask, and where grad_input divides by it

  int64_t core_cache = 512 * 1024;  // bytes of the cache that a core has for itself
  bool large = false;               // the tensors exceed half of the last cache
  bool streaming = false;           // store past the caches
  double* scratch = nullptr;        // scratch_doubles() values

  int64_t per_channel() const { return samples * positions; }
  bool is_small() const { return channels * per_channel() < kSerialBelow; }
};

// The operators, one table per instruction set and dtype.
struct Kernels {
  const char* name;  // of the instruction set
  int64_t (*scratch_doubles)(const Problem&);
  void (*stats)(const Problem&, Parallel);       // x, mask -> mean, var
  void (*measure)(const Problem&, Parallel);     // stats, rstd and the running statistics: forward without y
  void (*apply)(const Problem&, Parallel);       // x, mean, rstd -> y
  void (*grad_stats)(const Problem&, Parallel);  // dy, x, mean, rstd -> sum_g, sum_gxhat
  void (*grad_input)(const Problem&, Parallel);  // dy, x, mean, rstd, sums -> dx
  void (*forward)(const Problem&, Parallel);     // stats, running statistics and apply in one
  void (*backward)(const Problem&, Parallel);    // grad_stats and grad_input in one, and dresidual
  void (*invert)(const Problem&, Parallel);      // y, mean, rstd -> dx: the x of which apply made y; see kHasInverse
  // x, in `layout`, -> y in the other layout.
  void (*transpose)(const Problem&, Parallel);
  int64_t (*calls)();  // how many operators this table has run
};

}  // namespace keelnorm
