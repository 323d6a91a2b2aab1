// One run of an operator: its arguments laid out between guard pages, its results read back.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "cases.h"
#include "memory.h"
#include "parallels.h"

namespace native {

using keelnorm::Kernels;
using keelnorm::Problem;

// The memory of all arguments, kept from one run to the next.
struct Memory {
  Guarded x, residual, mask, weight, bias, y, running_mean, running_var, mean, var, rstd, dy, dx, dresidual, sum_g,
      sum_gxhat, scratch;
};

// What the definition says that the operator is given.
struct Given {
  std::vector<double> mean, var, rstd, sum_g, sum_gxhat, y;
  double count = 1, eps = 1e-5, momentum = 0.1;
};

class Execution {
 public:
  Execution(Memory& memory, const Kernels& kernels, const Case& c, const Numbers& numbers, const Given& given)
      : m_(memory), kernels_(kernels), c_(c), numbers_(numbers), given_(given) {}

  // Runs the operator. Returns what it did wrong to memory that is not its own, or an empty text.
  std::string run(const keelnorm::Parallel& how, Place place, int64_t core_cache) {
    place_ = place, used_.clear(), inputs_.clear(), results_.clear();
    Problem p = problem();
    p.core_cache = core_cache;
    const int64_t size = kernels_.scratch_doubles(p);
    p.scratch = channels(m_.scratch, std::vector<double>(size, NAN));
    for (const Guarded* input : inputs_) copies_.emplace_back(bytes_of(*input));
    const int64_t calls = kernels_.calls();
    (kernels_.*operator_of(c_.op))(p, how);
    const int64_t counted = c_.op == Op::transpose ? 0 : 1;  // which only helps the others
    if (kernels_.calls() != calls + counted) return "did not count the call";
    for (const Guarded* used : used_)
      if (!used->neighbours_unchanged()) return "wrote beside an argument";
    for (size_t i = 0; i < inputs_.size(); ++i)
      if (bytes_of(*inputs_[i]) != copies_[i]) return "changed an input";
    copies_.clear();
    return "";
  }

  // The bits of all results.
  std::string bits() const {
    std::string all;
    for (const Guarded* result : results_) all += bytes_of(*result);
    return all;
  }

 private:
  Memory& m_;
  const Kernels& kernels_;
  const Case& c_;
  const Numbers& numbers_;
  const Given& given_;
  Place place_;
  std::vector<const Guarded*> used_, inputs_, results_;
  std::vector<std::string> copies_;

  static std::string bytes_of(const Guarded& memory) {
    return std::string(static_cast<const char*>(memory.data()), memory.bytes());
  }

  static void (*Kernels::* operator_of(Op op))(const Problem&, keelnorm::Parallel) {
    switch (op) {
      case Op::stats:
        return &Kernels::stats;
      case Op::apply:
        return &Kernels::apply;
      case Op::forward:
        return &Kernels::forward;
      case Op::grad_stats:
        return &Kernels::grad_stats;
      case Op::grad_input:
        return &Kernels::grad_input;
      case Op::backward:
        return &Kernels::backward;
      case Op::invert:
        return &Kernels::invert;
      case Op::transpose:
        return &Kernels::transpose;
    }
    return nullptr;
  }

  Problem problem() {
    Problem p;
    p.samples = c_.shape.samples, p.channels = c_.shape.channels, p.positions = c_.shape.positions;
    p.layout = c_.layout, p.dtype = c_.dtype, p.activation = c_.function.which;
    p.a = c_.function.a, p.b = c_.function.b;
    p.training = c_.training, p.large = p.streaming = c_.streaming;
    p.eps = given_.eps, p.momentum = given_.momentum, p.count = given_.count;
    if (c_.op != Op::invert) p.x = input(tensor(m_.x, numbers_.x));
    if (c_.op == Op::stats) {
      if (c_.mask) p.mask = mask(), p.count = counted();
      p.mean = result(m_.mean), p.var = result(m_.var);
      return p;
    }
    if (c_.op == Op::transpose) return p.y = result_tensor(m_.y), p;
    if (c_.weight) p.weight = input(channels(m_.weight, numbers_.weight));
    if (c_.bias) p.bias = input(channels(m_.bias, numbers_.bias));
    if (c_.residual && c_.op != Op::invert && !c_.y_kept) p.residual = input(tensor(m_.residual, numbers_.residual));
    if (c_.op == Op::forward) {
      p.rstd = result(m_.rstd);
      p.mean = c_.training ? result(m_.mean) : input(channels(m_.mean, given_.mean));
      p.var = c_.training ? result(m_.var) : input(channels(m_.var, given_.var));
      if (c_.training && c_.running) {
        p.running_mean = changed(channels(m_.running_mean, numbers_.running_mean));
        p.running_var = changed(channels(m_.running_var, numbers_.running_var));
      }
    } else {
      p.mean = input(channels(m_.mean, given_.mean));
      p.rstd = input(channels(m_.rstd, given_.rstd));
    }
    if (c_.op == Op::forward || c_.op == Op::apply) {
      p.y = c_.in_place ? changed(const_cast<void*>(p.x)) : result_tensor(m_.y);
      return p;
    }
    if (c_.op == Op::invert || c_.y_kept) {
      void* y = tensor(m_.y, given_.y);
      p.y = input(y);
    }
    if (c_.op == Op::invert) return p.dx = result_tensor(m_.dx), p;
    p.dy = input(tensor(m_.dy, numbers_.dy));
    if (c_.op == Op::grad_input) {
      if (c_.training) p.sum_g = input(channels(m_.sum_g, given_.sum_g));
      if (c_.training) p.sum_gxhat = input(channels(m_.sum_gxhat, given_.sum_gxhat));
    } else if (c_.op == Op::grad_stats || c_.sums) {
      p.sum_g = result(m_.sum_g), p.sum_gxhat = result(m_.sum_gxhat);
    }
    if (c_.op == Op::grad_stats) return p;
    if (c_.op == Op::backward && c_.dresidual) p.dresidual = result_tensor(m_.dresidual);
    if (c_.op == Op::grad_input || c_.dx) p.dx = c_.in_place ? changed(const_cast<void*>(p.x)) : result_tensor(m_.dx);
    return p;
  }

  // ---- laying out: used_ holds the memory of the latest argument last

  void* tensor(Guarded& memory, const std::vector<double>& values) {
    result_tensor(memory), results_.pop_back();
    for (int64_t n = 0, i = 0; n < c_.shape.samples; ++n)
      for (int64_t c = 0; c < c_.shape.channels; ++c)
        for (int64_t s = 0; s < c_.shape.positions; ++s) store(memory.data(), c_.at(n, c, s), c_.dtype, values[i++]);
    return memory.data();
  }

  double* channels(Guarded& memory, const std::vector<double>& values) {
    memory.allot(static_cast<int64_t>(values.size()), 8, place_.of(used_.size()));
    if (!values.empty()) std::memcpy(memory.data(), values.data(), values.size() * 8);
    used_.push_back(&memory);
    return memory.as<double>();
  }

  double counted() const {
    return std::count_if(numbers_.mask.begin(), numbers_.mask.end(), [](char counts) { return counts != 0; });
  }

  unsigned char* mask() {
    m_.mask.allot(static_cast<int64_t>(numbers_.mask.size()), 1, place_.of(used_.size()));
    std::memcpy(m_.mask.data(), numbers_.mask.data(), numbers_.mask.size());
    used_.push_back(&m_.mask);
    return input(m_.mask.as<unsigned char>());
  }

  double* result(Guarded& memory) {
    memory.allot(c_.shape.channels, 8, place_.of(used_.size()));
    used_.push_back(&memory), results_.push_back(&memory);
    return memory.as<double>();
  }

  void* result_tensor(Guarded& memory) {
    memory.allot(c_.size(), format_of(c_.dtype).bytes, place_.of(used_.size()));
    used_.push_back(&memory), results_.push_back(&memory);
    return memory.data();
  }

  // The argument laid out last may not change.
  template <class T>
  T* input(T* pointer) {
    inputs_.push_back(used_.back());
    return pointer;
  }

  // An argument that is also a result.
  template <class T>
  T* changed(T* pointer) {
    for (size_t i = 0; i < inputs_.size(); ++i)
      if (inputs_[i]->data() == pointer) inputs_.erase(inputs_.begin() + i--);
    for (const Guarded* used : used_)
      if (used->data() == pointer) results_.push_back(used);
    return pointer;
  }
};

}  // namespace native
