// Runs a case in several ways, compares the first with the definition and the others with the first.
#pragma once

#include <cstdio>
#include <string>
#include <vector>

#include "definition.h"
#include "execution.h"

namespace native {

// Compares results with what is expected; keeps the first difference as a text.
class Comparison {
 public:
  explicit Comparison(const Case& c) : c_(c) {}

  void per_channel(const char* what, const Guarded& found, const std::vector<Expected>& expected) {
    for (int64_t i = 0; i < c_.shape.channels; ++i) compare(what, i, 0, 0, found.as<double>()[i], expected[i]);
  }

  template <class Definition>
  void per_value(const char* what, const Guarded& found, const Definition& expected) {
    for (int64_t channel = 0; channel < c_.shape.channels; ++channel)
      native::Definition::each(c_, channel, [&](int64_t i, int64_t position) {
        const int64_t n = position / c_.shape.positions, s = position % c_.shape.positions;
        compare(what, channel, n, s, load(found.data(), c_.at(n, channel, s), c_.dtype), expected(channel, i));
      });
  }

  const std::string& difference() const { return difference_; }

 private:
  const Case& c_;
  std::string difference_;

  void compare(const char* what, int64_t c, int64_t n, int64_t s, double found, Expected expected) {
    if (std::fabs(found - expected.value) <= expected.error || !difference_.empty()) return;
    char text[250];
    std::snprintf(text, sizeof text, "%s of n=%lld c=%lld s=%lld is %.17g, expected %.17g, off by %.3g, allowed %.3g",
                  what, (long long)n, (long long)c, (long long)s, found, expected.value,
                  std::fabs(found - expected.value), expected.error);
    difference_ = text;
  }
};

class Check {
 public:
  Check(Memory& memory, const Kernels& kernels, const Case& c) : m_(memory), kernels_(kernels), c_(c), numbers_(c) {
    moments_.resize(2, std::vector<Expected>(c.shape.channels));
    for (int64_t channel = 0; channel < c.shape.channels; ++channel)
      Definition::moments(c, numbers_, channel, moments_[0][channel], moments_[1][channel]);
    set_statistics();
    set_gradients();
  }

  // What is wrong, or an empty text. `count` counts the runs.
  std::string run(bool all_ways, int64_t& count) {
    Execution execution(m_, kernels_, c_, numbers_, given_);
    std::string first;
    int64_t i = static_cast<int64_t>(c_.seed);
    for (const Way& way : kWays) {
      if (!all_ways && &way == kWays + kWaysWithoutThreads) break;
      // The first two ways find an access on either side; the others have any alignment. Nor may the bits depend on how
      // large a cache the work is cut for.
      const int64_t turn = &way - kWays, cache = turn % 2 ? 4096 : 512 * 1024;
      const Place place = turn < 2 ? Place{(i + turn) % 2 == 0, 0, false} : Place{false, ++i, true};
      std::string wrong = execution.run(way.parallel, place, cache);
      ++count;
      if (wrong.empty() && turn == 0) wrong = difference(), first = execution.bits();
      if (wrong.empty() && execution.bits() != first) wrong = "the bits differ from those of the first run";
      if (!wrong.empty()) return std::string(way.name) + ": " + wrong;
    }
    return "";
  }

 private:
  Memory& m_;
  const Kernels& kernels_;
  const Case c_;
  Numbers numbers_;
  Given given_;
  std::vector<std::vector<Expected>> moments_;

  // What is normalized with, where it is given: the batch's moments in training, others in inference.
  void set_statistics() {
    for (int64_t i = 0; i < c_.shape.channels; ++i) {
      given_.mean.push_back(c_.training ? moments_[0][i].value : numbers_.mean[i]);
      given_.var.push_back(c_.training ? moments_[1][i].value : numbers_.var[i]);
      given_.rstd.push_back(1 / std::sqrt(given_.var[i] + given_.eps));
    }
  }

  void set_gradients() {
    const Definition definition(c_, numbers_, given_.mean, given_.rstd);
    definition.quiet_kinks(numbers_);
    given_.count = static_cast<double>(c_.shape.samples * c_.shape.positions);
    given_.y.resize(c_.size());
    for (int64_t channel = 0; channel < c_.shape.channels; ++channel)
      Definition::each(c_, channel, [&](int64_t i, int64_t) {
        double y = c_.op == Op::invert && c_.function.which == Activation::elu
                       ? std::fmax(numbers_.dy[i], -0.97 * c_.function.a)
                       : definition.y(channel, i).value;
        given_.y[i] = rounded(y, c_.dtype);
      });
    if (c_.op != Op::grad_input) return;
    given_.count *= 3;  // as when sums of three ranks were added up
    Random random(c_.seed);
    for (int64_t i = 0; i < c_.shape.channels; ++i) {
      given_.sum_g.push_back(random.normal() * given_.count);
      given_.sum_gxhat.push_back(random.normal() * given_.count);
    }
  }

  std::vector<double> found(const Guarded& memory) const {
    return {memory.as<double>(), memory.as<double>() + c_.shape.channels};
  }

  std::string difference() const {
    Comparison comparison(c_);
    if (c_.op == Op::transpose) return transposed();
    if (c_.op == Op::stats || (c_.op == Op::forward && c_.training)) {
      comparison.per_channel("mean", m_.mean, moments_[0]);
      comparison.per_channel("var", m_.var, moments_[1]);
    }
    if (c_.op == Op::forward) compare_forward(comparison);
    const bool computed = c_.op == Op::forward;
    const Definition definition(c_, numbers_, computed ? found(m_.mean) : given_.mean,
                                computed ? found(m_.rstd) : given_.rstd);
    if (c_.op == Op::forward || c_.op == Op::apply)
      comparison.per_value("y", c_.in_place ? m_.x : m_.y,
                           [&](int64_t channel, int64_t i) { return definition.y(channel, i); });
    if (c_.op == Op::grad_stats || c_.op == Op::backward || c_.op == Op::grad_input)
      compare_gradients(comparison, definition);
    if (c_.op == Op::invert)
      comparison.per_value("dx", m_.dx,
                           [&](int64_t channel, int64_t i) { return definition.inverse(channel, given_.y[i]); });
    return comparison.difference();
  }

  void compare_forward(Comparison& comparison) const {
    const std::vector<double> mean = found(m_.mean), var = found(m_.var);
    const double count = static_cast<double>(c_.shape.samples * c_.shape.positions), keep = 1 - given_.momentum;
    std::vector<Expected> rstd, running_mean, running_var;
    for (int64_t i = 0; i < c_.shape.channels; ++i) {
      const double unbiased = var[i] * count / (count - 1), momentum = given_.momentum;
      const auto few = [](double value, double size) { return Expected{value, kFew * 0x1p-53 * size}; };
      const double old_mean = keep * numbers_.running_mean[i], old_var = keep * numbers_.running_var[i];
      rstd.push_back(few(1 / std::sqrt(var[i] + given_.eps), 1 / std::sqrt(var[i] + given_.eps)));
      running_mean.push_back(few(old_mean + momentum * mean[i], std::fabs(old_mean) + momentum * std::fabs(mean[i])));
      running_var.push_back(few(old_var + momentum * unbiased, old_var + momentum * unbiased));
    }
    comparison.per_channel("rstd", m_.rstd, rstd);
    if (!c_.training || !c_.running) return;
    comparison.per_channel("running_mean", m_.running_mean, running_mean);
    comparison.per_channel("running_var", m_.running_var, running_var);
  }

  void compare_gradients(Comparison& comparison, const Definition& definition) const {
    const bool sums_found = c_.op == Op::grad_stats || (c_.op == Op::backward && c_.sums);
    if (sums_found) {
      std::vector<Expected> sum_g(c_.shape.channels), sum_gxhat(c_.shape.channels);
      for (int64_t i = 0; i < c_.shape.channels; ++i) definition.sums(i, sum_g[i], sum_gxhat[i]);
      comparison.per_channel("sum_g", m_.sum_g, sum_g);
      comparison.per_channel("sum_gxhat", m_.sum_gxhat, sum_gxhat);
    }
    if (c_.op == Op::backward && c_.dresidual)
      comparison.per_value("dresidual", m_.dresidual,
                           [&](int64_t channel, int64_t i) { return definition.dresidual(channel, i); });
    if (c_.op == Op::grad_stats || (c_.op == Op::backward && !c_.dx)) return;
    comparison.per_value("dx", c_.in_place ? m_.x : m_.dx, [&](int64_t channel, int64_t i) {
      const double sum_g = c_.training ? m_.sum_g.as<double>()[channel] : 0;
      return definition.dx(channel, i, sum_g, c_.training ? m_.sum_gxhat.as<double>()[channel] : 0, given_.count);
    });
  }

  std::string transposed() const {
    Case other = c_;
    other.layout = c_.layout == Layout::contiguous ? Layout::channels_last : Layout::contiguous;
    const int64_t bytes = format_of(c_.dtype).bytes;
    for (int64_t n = 0; n < c_.shape.samples; ++n)
      for (int64_t c = 0; c < c_.shape.channels; ++c)
        for (int64_t s = 0; s < c_.shape.positions; ++s)
          if (std::memcmp(m_.x.as<char>() + c_.at(n, c, s) * bytes, m_.y.as<char>() + other.at(n, c, s) * bytes, bytes))
            return "a value is not where it belongs";
    return "";
  }
};

}  // namespace native
