// The checked access to a tensor's memory. There is no other: after this file, the names for unchecked access do not
// compile.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

namespace {

using torch::stable::Tensor;

[[noreturn]] void refuse_storage(const char* name, int64_t needed, int64_t held) {
  throw std::runtime_error(std::string("keelnorm: the memory of ") + name + " is gone: its values take " +
                           std::to_string(needed) + " bytes of a storage that holds " + std::to_string(held) +
                           ". It was freed or cut short, as sharded training does with parameters between their uses: "
                           "gather them first, or leave the storage of tensors that are still in use as it is");
}

// The address of the first value. Raises an error that names the tensor where its storage is smaller than its sizes and
// strides need.
void* memory_of(const Tensor& t, const char* name) {
  void* const first = t.data_ptr();
  int64_t span = t.numel(), held;
  if (span == 0) return first;
  if (!t.is_contiguous()) {
    const auto sizes = t.sizes(), strides = t.strides();
    span = 1;
    for (size_t i = 0; i < sizes.size(); ++i) span += (sizes[i] - 1) * strides[i];
  }
  const int64_t needed = (t.storage_offset() + span) * static_cast<int64_t>(t.element_size());
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &held));
  if (!first || needed > held) refuse_storage(name, needed, held);
  return first;
}

void copy(const Tensor& to, const Tensor& from, const char* name) {
  memory_of(to, name), memory_of(from, name);
  Tensor destination = to;
  torch::stable::copy_(destination, from);
}

}  // namespace

#pragma GCC poison data_ptr mutable_data_ptr const_data_ptr aoti_torch_get_data_ptr copy_ clone
