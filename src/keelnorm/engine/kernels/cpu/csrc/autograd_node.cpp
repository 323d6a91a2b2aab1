// A batch normalization's node in autograd's graph, in C++: the same operators and the same conditions as
// keelnorm/engine/dispatch.py, without the interpreter's cost, which is most of a small tensor's.
//
// A Python module for one torch and one Python, and optional: what it does not take, and what needs more than one
// operator, it leaves to Python. It takes plain tensors on the CPU outside of every mode and transform.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/utils/object_ptr.h>

#include <cmath>

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using torch::jit::Stack;

constexpr int64_t kNone = 0, kRelu = 1;  // codes of keelnorm/engine/activations.py

// What Python runs in the place of an operator in the backward: keelnorm/engine/node_calls.py, _gradients_of_node.
PyObject* python_backward = nullptr;

struct Declined {};  // an operator raised, which it does before it writes anything

c10::OperatorHandle find(const char* name) { return c10::Dispatcher::singleton().findSchemaOrThrow(name, ""); }

void run_operator(const c10::OperatorHandle& op, Stack& stack) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  try {
    op.callBoxed(stack);
  } catch (const std::exception&) {
    throw Declined();
  }
}

c10::IValue value(const Tensor& tensor) { return tensor.defined() ? c10::IValue(tensor) : c10::IValue(); }

// Nothing but memory on the CPU that autograd may know: no subclass, transform, negation, or other layout.
bool is_plain(const Tensor& t) {
  using c10::DispatchKey;
  constexpr c10::DispatchKeySet known(
      {DispatchKey::CPU, DispatchKey::AutogradCPU, DispatchKey::ADInplaceOrView, DispatchKey::AutocastCPU});
  return known.has_all(t.key_set()) && t.layout() == at::kStrided && !t._fw_grad(0).defined();
}

bool outside_of_modes() {
  using c10::DispatchKey;
  constexpr c10::DispatchKeySet usual({DispatchKey::BackendSelect, DispatchKey::ADInplaceOrView});
  return usual.has_all(c10::impl::tls_local_dispatch_key_set().included_);
}

struct Call {
  Tensor running_mean, running_var, batches, counts;
  bool training, update;
  std::optional<double> momentum;
  double eps, a, b;
  int64_t activation;
};

std::tuple<Tensor, Tensor> run_forward(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                       const Tensor& bias, const Call& call) {
  static const auto op = find("keelnorm::forward_");
  Stack stack;
  stack.reserve(17);
  for (const Tensor* t : {&x, &residual, &weight, &bias, &call.running_mean, &call.running_var, &call.batches}) {
    stack.push_back(value(*t));
  }
  stack.emplace_back(call.training);
  stack.emplace_back(call.update);
  stack.emplace_back(call.momentum);
  stack.emplace_back(call.eps);
  stack.emplace_back(call.activation);
  stack.emplace_back(call.a);
  stack.emplace_back(call.b);
  stack.push_back(value(call.counts));
  stack.emplace_back();       // mask
  stack.emplace_back(false);  // keep
  run_operator(op, stack);
  if (call.update) {  // autograd is told of it: the operator's schema is not known to the keys that it did not pass
    for (const Tensor* t : {&call.running_mean, &call.running_var, &call.batches, &call.counts}) {
      if (t->defined() && !t->is_inference()) t->unsafeGetTensorImpl()->bump_version();
    }
  }
  return {stack[0].toTensor(), stack[1].toTensor()};
}

Tensor if_defined(const c10::IValue& value) { return value.isNone() ? Tensor() : value.toTensor(); }

PyObject* wrapped(const Tensor& tensor) {
  if (!tensor.defined()) Py_RETURN_NONE;
  return THPVariable_Wrap(tensor);
}

// The four gradients by Python, where they have to be differentiable, or the operator declined.
std::array<Tensor, 4> gradients_by_python(const std::array<Tensor, 7>& tensors, bool training, double eps,
                                          int64_t activation, double a, double b, const std::array<bool, 4>& need) {
  pybind11::gil_scoped_acquire gil;
  THPObjectPtr kept(PyTuple_New(static_cast<Py_ssize_t>(tensors.size())));
  if (!kept) throw python_error();
  for (size_t i = 0; i < tensors.size(); i++) {
    PyTuple_SET_ITEM(kept.get(), static_cast<Py_ssize_t>(i), wrapped(tensors[i]));
  }
  THPObjectPtr found(PyObject_CallFunction(python_backward, "OOdLddOOOO", kept.get(), training ? Py_True : Py_False,
                                           eps, static_cast<long long>(activation), a, b, need[0] ? Py_True : Py_False,
                                           need[1] ? Py_True : Py_False, need[2] ? Py_True : Py_False,
                                           need[3] ? Py_True : Py_False));
  if (!found) {
    python_error error;
    error.persist();
    throw error;
  }
  std::array<Tensor, 4> gradients;
  for (size_t i = 0; i < gradients.size(); i++) {
    PyObject* item = PyTuple_GET_ITEM(found.get(), static_cast<Py_ssize_t>(i));
    if (item != Py_None) gradients[i] = THPVariable_Unpack(item);
  }
  return gradients;
}

}  // namespace

namespace keelnorm {  // the name of the node, as grad_fn.name() says it

struct BatchNorm : torch::autograd::Function<BatchNorm> {
  // Compiled autograd may trace the backward, which then runs in Python.
  static constexpr bool is_traceable = true;

  // Which tensors there are stands in bits of one number, beside the activation's code.
  enum : int64_t { kTraining = 1 << 8, kResidual = 1 << 9, kWeight = 1 << 10, kBias = 1 << 11 };

  static Tensor forward(AutogradContext* ctx, const Tensor& x, const std::optional<Tensor>& residual,
                        const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, const Call& call) {
    const Tensor r = residual.value_or(Tensor()), w = weight.value_or(Tensor()), b = bias.value_or(Tensor());
    auto [y, saved] = run_forward(x, r, w, b, call);
    // As gate_needs in keelnorm/engine/ops.py, and in Python's order: activation checkpointing counts what is saved,
    // and Python's node runs when it computes a forward again.
    const bool gate = call.activation != kNone, from_y = gate && r.defined() && call.activation == kRelu;
    ctx->save_for_backward(
        {x, w, saved, gate && !from_y ? b : Tensor(), from_y ? y : Tensor(), gate && !from_y ? r : Tensor()});
    ctx->saved_data["what"] = call.activation | (call.training ? kTraining : 0) | (r.defined() ? kResidual : 0) |
                              (w.defined() ? kWeight : 0) | (b.defined() ? kBias : 0);
    ctx->saved_data["eps"] = call.eps;
    if (call.a != 0 || call.b != 0) {
      ctx->saved_data["a"] = call.a;
      ctx->saved_data["b"] = call.b;
    }
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& output) {
    const Tensor& dy = output[0];
    const variable_list kept = ctx->get_saved_variables();
    const int64_t what = ctx->saved_data["what"].toInt(), activation = what & 0xff;
    const bool training = what & kTraining;
    const auto number = [&](const char* name) {
      const auto found = ctx->saved_data.find(name);
      return found == ctx->saved_data.end() ? 0.0 : found->second.toDouble();
    };
    const double a = number("a"), b = number("b");
    std::array<bool, 4> need{true, false, false, false};  // of x, residual, weight, bias: edges of those that there are
    size_t edge = 0;
    need[0] = ctx->needs_input_grad(edge++);
    const std::array<int64_t, 3> bits{kResidual, kWeight, kBias};
    for (size_t i = 0; i < 3; i++) {
      if (what & bits[i]) need[i + 1] = ctx->needs_input_grad(edge++);
    }
    const bool written = need[1] && activation != kNone;  // else the residual's gradient is dy
    std::array<Tensor, 4> gradients;
    bool done = false;
    if (!at::GradMode::is_enabled() && outside_of_modes() && is_plain(dy)) {
      try {
        gradients = run_backward(dy, kept, training, activation, a, b, {need[0], written, need[2], need[3]});
        if (need[1] && !written) gradients[1] = dy;
        done = true;
      } catch (const Declined&) {
      }
    }
    if (!done) {
      gradients = gradients_by_python({dy, kept[0], kept[2], kept[1], kept[3], kept[4], kept[5]}, training,
                                      number("eps"), activation, a, b, need);
    }
    for (size_t i = 0; i < need.size(); i++) {
      if (!need[i]) gradients[i] = Tensor();
    }
    return {gradients[0], gradients[1], gradients[2], gradients[3], Tensor()};
  }

 private:
  static std::array<Tensor, 4> run_backward(const Tensor& dy, const variable_list& kept, bool training,
                                            int64_t activation, double a, double b, const std::array<bool, 4>& need) {
    static const auto op = find("keelnorm::backward");
    Stack stack;
    stack.reserve(17);
    stack.emplace_back(dy);
    for (const size_t i : {0, 2, 1, 3, 4, 5}) stack.push_back(value(kept[i]));  // x, saved, weight, bias, y, residual
    stack.emplace_back(training);
    stack.emplace_back(activation);
    stack.emplace_back(a);
    stack.emplace_back(b);
    for (const bool each : need) stack.emplace_back(each);
    stack.emplace_back();       // mask
    stack.emplace_back(false);  // keep
    run_operator(op, stack);
    return {if_defined(stack[0]), if_defined(stack[1]), if_defined(stack[2]), if_defined(stack[3])};
  }
};

}  // namespace keelnorm

namespace {

// ---- the call from Python

// A plain tensor, or an undefined one for None; false for anything else.
bool take(PyObject* object, Tensor& tensor) {
  if (object == Py_None) return true;
  if (!THPVariable_CheckExact(object) && Py_TYPE(object) != reinterpret_cast<PyTypeObject*>(ParameterClass))
    return false;
  tensor = THPVariable_Unpack(object);
  return is_plain(tensor);
}

bool requires_grad(const Tensor& t) { return t.defined() && t.requires_grad(); }

bool of_inference(const Tensor& t) { return t.defined() && t.is_inference(); }

bool has_rank(PyObject* ranks, int64_t rank) {
  if (ranks == Py_None) return rank >= 2;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(ranks); i++) {
    if (PyLong_AsLongLong(PyTuple_GET_ITEM(ranks, i)) == rank) return true;
  }
  return false;
}

bool has_kernels(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf;
}

bool is_dense(const Tensor& x) {
  return x.is_contiguous() || (x.dim() == 4 && x.is_contiguous(at::MemoryFormat::ChannelsLast)) ||
         (x.dim() == 5 && x.is_contiguous(at::MemoryFormat::ChannelsLast3d));
}

// run(x, residual, weight, bias, running_mean, running_var, batches, counts, ranks, training, update, momentum, eps,
//     activation): y, or NotImplemented where Python has to look at the call. Nothing has been written then.
PyObject* run(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 14) {
    PyErr_Format(PyExc_TypeError, "run takes 14 arguments; got %zd", count);
    return nullptr;
  }
  Tensor x, residual, weight, bias;
  Call call;
  Tensor* const tensors[] = {
      &x, &residual, &weight, &bias, &call.running_mean, &call.running_var, &call.batches, &call.counts};
  for (size_t i = 0; i < 8; i++) {
    if (!take(args[i], *tensors[i])) Py_RETURN_NOTIMPLEMENTED;
  }
  PyObject *const momentum = args[11], *const eps = args[12], *const activation = args[13];
  if (!PyFloat_CheckExact(eps) || !(momentum == Py_None || PyFloat_CheckExact(momentum))) Py_RETURN_NOTIMPLEMENTED;
  call.training = PyObject_IsTrue(args[9]) == 1;  // someone may have set 1 for True
  call.update = PyObject_IsTrue(args[10]) == 1;
  if (momentum != Py_None) call.momentum = PyFloat_AS_DOUBLE(momentum);
  call.eps = PyFloat_AS_DOUBLE(eps);
  call.activation = PyLong_AsLongLong(PyTuple_GET_ITEM(activation, 1));
  call.a = PyFloat_AsDouble(PyTuple_GET_ITEM(activation, 2));
  call.b = PyFloat_AsDouble(PyTuple_GET_ITEM(activation, 3));
  if (PyErr_Occurred()) return nullptr;
  if (!x.defined() || !has_kernels(x.scalar_type()) || !has_rank(args[8], x.dim()) || !is_dense(x) || x.numel() == 0 ||
      (call.training && x.numel() == x.size(1)) || !(call.eps > 0) ||
      (call.momentum ? !std::isfinite(*call.momentum) : !call.batches.defined()) ||
      call.running_mean.defined() != call.running_var.defined() || !(call.training || call.running_mean.defined()) ||
      (residual.defined() && (residual.scalar_type() != x.scalar_type() || residual.sizes() != x.sizes())) ||
      requires_grad(call.running_mean) || requires_grad(call.running_var) || !outside_of_modes() ||
      at::impl::torch_function_mode_enabled() || torch::autograd::get_current_graph_task_id() != -1 ||
      torch::jit::tracer::isTracing()) {
    Py_RETURN_NOTIMPLEMENTED;
  }
  const bool record = at::GradMode::is_enabled() &&
                      (x.requires_grad() || requires_grad(residual) || requires_grad(weight) || requires_grad(bias));
  if (record && (of_inference(x) || of_inference(residual) || of_inference(weight) || of_inference(bias))) {
    Py_RETURN_NOTIMPLEMENTED;
  }
  Tensor y;
  try {
    pybind11::gil_scoped_release no_gil;
    if (record) {
      const auto optional = [](const Tensor& t) { return t.defined() ? std::optional<Tensor>(t) : std::nullopt; };
      y = keelnorm::BatchNorm::apply(x, optional(residual), optional(weight), optional(bias), call);
    } else {
      y = std::get<0>(run_forward(x, residual, weight, bias, call));
    }
  } catch (const Declined&) {
    Py_RETURN_NOTIMPLEMENTED;
  }
  return THPVariable_Wrap(y);
  END_HANDLE_TH_ERRORS
}

// connect(function): the function that computes gradients in Python.
PyObject* connect(PyObject*, PyObject* function) {
  Py_INCREF(function);
  Py_XSETREF(python_backward, function);
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"run", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(run)), METH_FASTCALL, nullptr},
    {"connect", connect, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "native_node", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit_native_node() { return PyModule_Create(&definition); }
