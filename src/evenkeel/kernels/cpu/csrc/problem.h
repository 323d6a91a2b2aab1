// What the operators are asked to do, free of torch: plain pointers, sizes and a way to run in parallel.
//
// Names as everywhere in the project: N samples, C channels, S positions, M = N*S values per channel.
#pragma once

#include <cstdint>

namespace evenkeel {

enum class Activation : int64_t { none = 0, relu = 1 };

// Where x, y, dy, dx and the residual lie in memory; all of them in the same way.
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
  Activation activation = Activation::none;
  bool training = true;  // normalize with the batch's moments (and differentiate through them)
  double eps = 0, momentum = 0;

  const float* x = nullptr;
  const float* residual = nullptr;
  const float* weight = nullptr;  // nullptr: ones
  const float* bias = nullptr;    // nullptr: zeros
  float* y = nullptr;             // written by the forward, read by the backward where a residual hides the gate
  float* running_mean = nullptr;  // updated when training and not nullptr
  float* running_var = nullptr;

  double* mean = nullptr;  // C values each: the moments that normalize
  double* var = nullptr;   // biased
  double* rstd = nullptr;  // 1 / sqrt(var + eps)

  const float* dy = nullptr;
  float* dx = nullptr;
  float* dresidual = nullptr;
  double* sum_g = nullptr;      // C values each: sum of g, the gradient before the activation,
  double* sum_gxhat = nullptr;  // and of g times the normalized x; they are the gradients of bias and weight
  double count = 0;             // what grad_input divides the sums by: values per channel, over all that were summed

  bool streaming = false;     // results are too large to stay in cache: store past it
  double* scratch = nullptr;  // scratch_doubles() values

  int64_t per_channel() const { return samples * positions; }
  bool is_small() const { return channels * per_channel() < kSerialBelow; }
};

// The operators, one table per instruction set.
struct Kernels {
  const char* name;
  int64_t (*scratch_doubles)(const Problem&);
  void (*stats)(const Problem&, Parallel);       // x -> mean, var
  void (*apply)(const Problem&, Parallel);       // x, mean, rstd -> y
  void (*grad_stats)(const Problem&, Parallel);  // dy, x, mean, rstd -> sum_g, sum_gxhat (and dresidual)
  void (*grad_input)(const Problem&, Parallel);  // dy, x, mean, rstd, sums -> dx
  void (*forward)(const Problem&, Parallel);     // stats, running moments and apply in one
  void (*backward)(const Problem&, Parallel);    // grad_stats and grad_input in one
  int64_t (*calls)();                            // how many operators this table has run
};

const Kernels& baseline_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
#endif

}  // namespace evenkeel
