// Small helpers that the layouts share.
#pragma once

#include "element.h"
#include "problem.h"

namespace {

using keelnorm::Activation;
using keelnorm::Parallel;
using keelnorm::Problem;

template <class Body>
inline void parallel(Parallel how, int64_t tasks, const Body& body) {
  how.run(
      tasks, [](void* context, int64_t begin, int64_t end) { (*static_cast<const Body*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// Pointers to the elements of the dtype that this unit is compiled for.
inline const Element* elements(const void* p) { return static_cast<const Element*>(p); }
inline Element* elements(void* p) { return static_cast<Element*>(p); }

}  // namespace
