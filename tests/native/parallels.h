// Ways to run tasks. Whichever runs them, the bits of the results are to be the same.
#pragma once

#include <algorithm>
#include <thread>
#include <vector>

#include "problem.h"

namespace native {

using Body = void (*)(void*, int64_t, int64_t);

inline void run_serially(int64_t tasks, Body body, void* context) { body(context, 0, tasks); }

inline void run_backwards(int64_t tasks, Body body, void* context) {
  for (int64_t i = tasks - 1; i >= 0; --i) body(context, i, i + 1);
}

template <int64_t count>
void run_in_threads(int64_t tasks, Body body, void* context) {
  const int64_t share = std::max<int64_t>((tasks + count - 1) / count, 1);
  std::vector<std::thread> threads;
  for (int64_t begin = share; begin < tasks; begin += share)
    threads.emplace_back(body, context, begin, std::min(begin + share, tasks));
  if (tasks > 0) body(context, 0, std::min(share, tasks));
  for (std::thread& thread : threads) thread.join();
}

struct Way {
  const char* name;
  keelnorm::Parallel parallel;
};

constexpr Way kWays[] = {{"serially", {run_serially}},
                         {"one task at a time from the last on", {run_backwards}},
                         {"serially, each argument somewhere else", {run_serially}},
                         {"in 2 threads", {run_in_threads<2>}},
                         {"in 3 threads", {run_in_threads<3>}},
                         {"in 7 threads", {run_in_threads<7>}}};

constexpr int kWaysWithoutThreads = 3;

}  // namespace native
