// Small helpers that the layouts share.
#pragma once

#include "problem.h"

namespace {

using evenkeel::Activation;
using evenkeel::Parallel;
using evenkeel::Problem;

template <class Body>
inline void parallel(Parallel how, int64_t tasks, const Body& body) {
  how.run(
      tasks, [](void* context, int64_t begin, int64_t end) { (*static_cast<const Body*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// An optional array from element `at` on.
template <class T>
inline T* shifted(T* p, int64_t at) {
  return p ? p + at : p;
}

}  // namespace
