// Checks every operator of every table of kernels against its definition, without torch.
//
//   driver [--isa NAME] [--dtype NAME] [--quick]
//
// One line for each instruction set and dtype. Ends with status 1 at the first case that fails, and names it; also
// where a case reads or writes outside of its arguments. Instruction sets that the machine lacks are left out, unless
// named.
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string>

#include "checks.h"
#include "dispatch.h"
#include "sweep.h"

// Of AddressSanitizer and its kind, when linked with it.
extern "C" void __sanitizer_set_death_callback(void (*)()) __attribute__((weak));

namespace {

using namespace native;

char current[600] = "no case yet";
struct sigaction former[NSIG];

void tell_current() {
  const char before[] = "\nfailed in: ";
  if (write(2, before, sizeof before - 1) < 0 || write(2, current, std::strlen(current)) < 0 || write(2, "\n", 1) < 0)
    _exit(1);
}

void fault(int signal) {
  tell_current();
  if (former[signal].sa_handler == SIG_DFL) _exit(1);
  sigaction(signal, &former[signal], nullptr);  // the sanitizer's: it reports when the instruction is run again
}

void watch() {
  struct sigaction action{};
  action.sa_handler = fault;
  for (int signal : {SIGSEGV, SIGBUS, SIGILL, SIGFPE}) sigaction(signal, &action, &former[signal]);
  if (__sanitizer_set_death_callback) __sanitizer_set_death_callback(tell_current);
}

bool takes_activation(Op op) { return op != Op::stats && op != Op::transpose; }

bool keep_going = false;
int64_t failures = 0;

void end_if(const std::string& wrong) {
  if (wrong.empty()) return;
  std::printf("%s: %s\n", current, wrong.c_str());
  if (!keep_going) std::exit(1);
  ++failures;
}

int64_t check_single_values(Memory& memory, const Kernels& kernels, Dtype dtype) {
  Sweep sweep(memory, kernels, dtype);
  const auto about = [&](const char* what, const Function& function) {
    std::snprintf(current, sizeof current, "%s %s %s of single values, %s(%g, %g)", kernels.name, what,
                  format_of(dtype).name, name_of(function.which), function.a, function.b);
  };
  about("apply", {Activation::none});
  end_if(sweep.identity());
  int64_t runs = 1;
  for (int64_t i = 0; i < keelnorm::kActivations; ++i)
    for (const Function& function : variants_of(static_cast<Activation>(i))) {
      about("apply", function);
      end_if(sweep.activation(function));
      ++runs;
    }
  return runs;
}

// Returns the number of runs.
int64_t check_table(const Kernels& kernels, Dtype dtype, bool quick) {
  Memory memory;
  int64_t runs = check_single_values(memory, kernels, dtype);
  uint64_t seed = 0;
  int64_t turn = 0;
  for (Shape shape : shapes_of(quick))
    for (Op op : kOps)
      for (int64_t activation = 0; activation < (takes_activation(op) ? keelnorm::kActivations : 1); ++activation) {
        if (op == Op::invert && !keelnorm::kHasInverse[activation]) continue;
        const bool large = shape.samples * shape.channels * shape.positions >= keelnorm::kSerialBelow;
        // Quickly, an activation meets every second shape, and of the large ones every eighth.
        const int64_t rarely = quick && takes_activation(op) ? (large ? 8 : 2) : 1;
        if (++turn % rarely != 0) continue;
        const int64_t rounds = takes_activation(op) ? (quick ? 1 : large ? 2 : 6) : (quick ? 4 : 24);
        for (int64_t round = 0; round < rounds; ++round) {
          const Case c = draw_case(++seed, op, dtype, shape, static_cast<Activation>(activation));
          std::snprintf(current, sizeof current, "%s %s", kernels.name, c.describe().c_str());
          end_if(Check(memory, kernels, c).run(large || seed % 8 == 0, runs));
        }
      }
  return runs;
}

int usage() {
  std::fprintf(stderr, "usage: driver [--isa NAME] [--dtype NAME] [--quick] [--keep-going]\n");
  return 2;
}

}  // namespace

int main(int count, char** words) {
  std::string isa, dtype;
  bool quick = false;
  for (int i = 1; i < count; ++i) {
    const std::string word = words[i];
    if (word == "--quick")
      quick = true;
    else if (word == "--keep-going")
      keep_going = true;
    else if (word == "--isa" && i + 1 < count)
      isa = words[++i];
    else if (word == "--dtype" && i + 1 < count)
      dtype = words[++i];
    else
      return usage();
  }
  std::setvbuf(stdout, nullptr, _IOLBF, BUFSIZ);  // a fault ends the program without more words
  watch();
  int tables = 0;
  for (int i = 0; i < keelnorm_kernels_count(); ++i) {
    const std::string name = keelnorm_kernels_name(i);
    if (!isa.empty() ? isa != name : !keelnorm_kernels_supported(i)) continue;
    if (!keelnorm_kernels_supported(i)) {
      std::fprintf(stderr, "this machine lacks %s\n", name.c_str());
      return 1;
    }
    keelnorm_kernels_force(i);
    for (int j = 0; j < keelnorm::kDtypes; ++j) {
      const Dtype which = static_cast<Dtype>(j);
      if (!dtype.empty() && dtype != format_of(which).name) continue;
      if (!keelnorm::has_kernels(i, which)) continue;
      const Kernels& kernels = keelnorm::active_kernels(which);
      if (name != kernels.name) {
        std::printf("%s was forced, but %s is active\n", name.c_str(), kernels.name);
        return 1;
      }
      const int64_t runs = check_table(kernels, which, quick);
      std::printf("%-12s%-5s%8lld checks %s\n", name.c_str(), format_of(which).name, (long long)runs,
                  failures ? "failed" : "ok");
      ++tables;
    }
  }
  if (tables == 0) std::fprintf(stderr, "there are no kernels called %s %s\n", isa.c_str(), dtype.c_str());
  return tables == 0 || failures > 0;
}
