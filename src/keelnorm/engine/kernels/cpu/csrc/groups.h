// Groups of samples that are normalized separately.
#pragma once

#include "tensors.h"

namespace {

// Consecutive groups of `size` samples; the last one takes all the remaining samples. One group is the whole batch.
struct Groups {
  int64_t count = 1, size = 0;

  int64_t first(int64_t g) const { return g * size; }
  int64_t size_of(const Problem& p, int64_t g) const { return g + 1 == count ? p.samples - first(g) : size; }

  // The problem p for group g alone. The groups' rows of mean, var and rstd lie one group after the other.
  Problem part(const Problem& p, int64_t g) const {
    Problem part = p;
    part.samples = size_of(p, g);
    part.count = static_cast<double>(part.per_channel());
    const int64_t bytes = first(g) * p.channels * p.positions * bytes_of(p.dtype);
    const auto skip = [bytes](auto*& t) {
      using Pointer = std::remove_reference_t<decltype(t)>;
      if (t) t = static_cast<Pointer>(const_cast<char*>(static_cast<const char*>(t)) + bytes);
    };
    skip(part.x), skip(part.residual), skip(part.y), skip(part.dy), skip(part.dx), skip(part.dresidual);
    for (double** row : {&part.mean, &part.var, &part.rstd}) *row += g * 3 * p.channels;
    return part;
  }
};

Groups groups_of(const Problem& p, int64_t count, int64_t size) {
  REQUIRE(count > 0 && size > 0 && (count - 1) * size < p.samples, "groups");
  return {count, size};
}

// Mean and var of all groups together.
void merge(const Groups& groups, const Problem& p, double* mean, double* var) {
  const double share = 1.0 / static_cast<double>(p.samples);
  for (int64_t c = 0; c < p.channels; ++c) mean[c] = var[c] = 0;
  for (int64_t g = 0; g < groups.count; ++g) {
    const double weight = share * static_cast<double>(groups.size_of(p, g));
    const double* const means = p.mean + g * 3 * p.channels;
    for (int64_t c = 0; c < p.channels; ++c) mean[c] += weight * means[c];
  }
  for (int64_t g = 0; g < groups.count; ++g) {
    const double weight = share * static_cast<double>(groups.size_of(p, g));
    const double *const means = p.mean + g * 3 * p.channels, *const vars = means + p.channels;
    for (int64_t c = 0; c < p.channels; ++c) {
      const double between = means[c] - mean[c];
      var[c] += weight * (vars[c] + between * between);
    }
  }
}

}  // namespace
