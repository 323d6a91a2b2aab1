"""The claims about optimization: convergence, learning rates, initialization, hyperparameters, weight decay."""

import dataclasses
import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from keelnorm.lab.claims import (
    _weight_decay_reading,
    _weight_decay_training,
    convergence,
    hyperparameters,
    initialization,
    learning_rate,
    weight_decay,
)
from keelnorm.lab.core.cell import Results
from keelnorm.lab.core.plan import Plan
from keelnorm.lab.data import images
from keelnorm.lab.reading.results_by_arm import shares_reaching
from keelnorm.lab.reading.verdicts import verdict
from keelnorm.lab.training.trials import trial
from keelnorm.measure.statistics import speedup

QUICK = Plan()


def made_up(claim, make, without=()):
    """The claim's reading of results that `make` gives for a cell; cells in `without` have failed."""
    cells = list(claim.cells(QUICK))
    kept = {cell.key: make(cell) for place, cell in enumerate(cells) if place not in without}
    return claim.read(QUICK, Results(kept))


def better(arm):
    """Made-up results in which this arm works for more settings, for longer and sooner."""

    def make(cell):
        axes, seed = cell.axes, cell.axes["seed"]
        good = axes["arm"] == arm
        steps = axes["evaluate_at"]
        if len(steps) == 1:  # of a trial: as many settings work as this
            count = len(axes["rates"]) if axes.get("paired") else len(axes["rates"]) * len(axes.get("scales", (1.0,)))
            works = count // 2 + seed % 2 if good else 1
            accuracies = [95.0] * works + [20.0] * (count - works)
            return {"steps": [*steps], "test": [accuracies], "validation": [accuracies], "train": accuracies}
        reached = 6 + seed if good else 30 + seed
        curve = [[95.0 if step >= reached else 20.0] * len(axes["rates"]) for step in steps]
        return {"steps": [*steps], "test": curve, "validation": curve, "test_batch": curve}

    return make


class TestBothDirections:
    CLAIMS = (convergence.CLAIM, learning_rate.CLAIM, initialization.CLAIM, hyperparameters.CLAIM)

    @pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.name)
    def test_the_verdict_follows_the_results(self, claim):
        for_it, against_it = made_up(claim, better("bn")), made_up(claim, better("none"))
        assert verdict(for_it.findings) == "holds"
        assert verdict(against_it.findings) == "does not hold"
        assert for_it.answer != against_it.answer

    @pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.name)
    def test_a_failed_cell_takes_its_seed_away_and_no_other(self, claim):
        whole, part = made_up(claim, better("bn")), made_up(claim, better("bn"), without={0})
        assert part.findings[0].effect.n == whole.findings[0].effect.n - 1
        before, after = ([each for each in reading.findings[1:] if each.decisive] for reading in (whole, part))
        assert before == after

    @pytest.mark.parametrize("claim", [*CLAIMS, weight_decay.CLAIM], ids=lambda claim: claim.name)
    def test_without_results_it_says_so(self, claim):
        with pytest.raises(ValueError, match="no seed has a result for every arm"):
            claim.read(QUICK, Results({}))

    @pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.name)
    @pytest.mark.parametrize("plan", [QUICK, Plan(quick=False)], ids=["quick", "full"])
    def test_arms_differ_in_nothing_else(self, claim, plan):
        rest: dict[str, set[tuple[tuple[str, Any], ...]]] = {}
        for cell in claim.cells(plan):
            axes = dict(cell.axes)
            if claim is convergence.CLAIM:
                del axes["evaluate_at"]  # batch norm is trained for fewer steps, which a test of its own looks at
            rest.setdefault(axes.pop("arm"), set()).add(tuple(sorted(axes.items())))
        assert len(rest) >= 2
        assert len({frozenset(each) for each in rest.values()}) == 1


HOW = {"data": "digits", "seed": 1, "rates": (0.1, 0.3), "evaluate_at": (12,), "widths": (16,)}


class TestTrials:
    def test_the_same_axes_give_the_same_numbers_and_another_seed_others(self):
        first, again = trial(arm="bn", **HOW), trial(arm="bn", **HOW)
        assert first == again
        assert trial(arm="bn", **{**HOW, "seed": 2})["loss"] != first["loss"]

    def test_each_setting_is_trained_as_if_alone(self):
        how = {**HOW, "paired": True, "scales": (0.5, 2.0), "momenta": (0.0, 0.9)}
        together = trial(arm="bn", **how)
        for place in (0, 1):
            one = {name: (how[name][place],) for name in ("rates", "scales", "momenta")}
            alone = trial(arm="bn", **{**how, **one})
            assert alone["loss"][-1][0] == pytest.approx(together["loss"][-1][place], rel=1e-3)

    def test_the_grid_runs_over_scales_and_within_a_scale_over_rates(self):
        grid = trial(arm="none", **{**HOW, "scales": (0.5, 2.0)})
        alone = trial(arm="none", **{**HOW, "rates": (0.3,), "scales": (2.0,)})
        assert alone["loss"][-1][0] == pytest.approx(grid["loss"][-1][3], rel=1e-3)


class TestConvergence:
    def test_evaluations_end_where_the_training_does(self):
        found = convergence.evaluations(100)
        assert found[0] == 0
        assert found[-1] == 100
        assert all(1 <= after - before <= max(3, 0.21 * after) for before, after in pairwise(found))

    def test_batch_norms_shorter_runs_bound_the_ratio_from_the_right_side(self):
        # Not there after its own 50 steps: it needs at least these, so the baseline's 100 are at most twice as many.
        gain = speedup([None, None], [100.0, 100.0], 400, 50)
        assert gain.bound == "at most"
        assert gain.ratio.value == pytest.approx(2.0)
        gain = speedup([20.0, 20.0], [None, None], 400, 50)
        assert gain.bound == "at least"
        assert gain.ratio.value == pytest.approx(20.0)
        assert speedup([None], [100.0], 400).ratio.value == pytest.approx(0.25)

    def test_batch_norm_stops_sooner_and_is_evaluated_at_the_same_steps(self):
        for plan in (QUICK, Plan(quick=False)):
            cells = convergence.CLAIM.cells(plan)
            for none, bn in zip(cells[::2], cells[1::2], strict=True):
                assert (none.axes["arm"], bn.axes["arm"]) == ("none", "bn")
                marks = bn.axes["evaluate_at"]
                assert marks == none.axes["evaluate_at"][: len(marks)]
                assert len(marks) < len(none.axes["evaluate_at"])


class TestLearningRate:
    RATES = (0.1, 1.0, 10.0)

    @staticmethod
    def history(*accuracies):
        return {"test": [[50.0] * len(accuracies), list(accuracies)]}

    def test_the_largest_rate_lies_where_the_accuracy_falls_through_the_target(self):
        largest, width = learning_rate.usable(self.history(95.0, 95.0, 85.0), self.RATES)
        assert largest == pytest.approx(10**0.5)  # half-way between the rates 1 and 10
        assert width == pytest.approx(2.0)

    def test_at_the_edges_of_the_grid(self):
        assert learning_rate.usable(self.history(95.0, 95.0, 95.0), self.RATES) == pytest.approx((10.0, 3.0))
        assert learning_rate.usable(self.history(89.9, 20.0, 10.0), self.RATES) is None

    def test_a_gap_takes_from_the_width_and_not_from_the_largest(self):
        largest, width = learning_rate.usable(self.history(95.0, 20.0, 90.0), self.RATES)
        assert (largest, width) == pytest.approx((10.0, 2.0))

    def test_a_network_that_learns_nowhere_is_said_to(self):
        def make(cell):
            accuracies = [95.0 if cell.axes["arm"] == "bn" else 20.0] * len(cell.axes["rates"])
            return {"test": [accuracies]}

        notes = " ".join(made_up(learning_rate.CLAIM, make).notes)
        assert "no normalization learns at no rate tried in 3 of 3 runs" in notes
        assert "with batch norm a network still learns at the largest rate of the grid" in notes


def test_what_reaches_the_target_counts():
    histories = [{"test": [[99.0] * 4, [90.0, 89.99, 95.0, 10.0]]}, {"test": [[90.0] * 4]}]
    assert shares_reaching(90.0, histories) == pytest.approx([50.0, 100.0])


def decay_results(*, left, all_gain):
    """Made-up results: the part of decay's effect that is left, and what decay of all parameters gains."""

    def make(cell):
        axes, seed = cell.axes, cell.axes["seed"]
        if "rates" in axes:
            names = _weight_decay_training.settings(axes["rates"], axes["decays"], axes["between"])
            accuracies = [80.0 + 0.01 * seed + (all_gain if kind == "all" else 0.0) for kind, _, _ in names]
            return {"validation": accuracies, "test": accuracies, "train": accuracies}
        network, _, how = axes["arm"].partition(" ")
        output = {"": 0.0, "decay": 1.0, "rate": 1.0 - (left + 1e-3 * seed if network == "bn" else 1.0)}[how]
        doubled = 1e-5 * (1 + 0.1 * seed) if network == "bn" else 3.0
        return {
            "steps": [1, 2],
            "effective": [1e-3, 1e-3 * (1.5 + 0.01 * seed if how else 1.0)],
            "test": 80.0 + 0.01 * seed,
            "train": 90.0,
            "scaled": doubled,
            "outputs": [output, 0.0],
        }

    return make


class TestWeightDecay:
    @pytest.mark.parametrize(
        ("left", "all_gain", "outcomes"),
        [
            (0.02, 0.0, ["supports", "supports", "supports"]),
            (0.5, 0.0, ["supports", "contradicts", "supports"]),
            (0.02, 3.0, ["supports", "supports", "contradicts"]),
        ],
    )
    def test_the_verdict_follows_the_results(self, left, all_gain, outcomes):
        reading = made_up(weight_decay.CLAIM, decay_results(left=left, all_gain=all_gain))
        assert [finding.outcome for finding in reading.findings if finding.decisive] == outcomes
        assert verdict(reading.findings) == ("holds" if set(outcomes) == {"supports"} else "depends")

    def test_what_is_left_is_a_share_of_what_decay_does(self):
        found = {f"bn{how}": [{"outputs": [value, 0.0]}] for how, value in (("", 0.0), (" decay", 2.0), (" rate", 1.5))}
        assert _weight_decay_reading.left_over(found, "bn").value == pytest.approx(25.0)

    def test_the_twin_is_the_network_with_decay_but_for_epsilon(self, monkeypatch):
        """In double precision and with hardly any ε nothing of decay is left; without batch norm much is."""
        made, prepared = _weight_decay_training._network, _weight_decay_training.with_wrong_labels

        def network(*args, **how):
            stack = made(*args, **how).double()
            for module in stack.modules():
                if hasattr(module, "eps"):
                    vars(module)["eps"] = 1e-12
            return stack

        def labels(*args):
            split = prepared(*args)
            parts = ("train_x", "validation_x", "test_x")
            return dataclasses.replace(split, **{name: getattr(split, name).double() for name in parts})

        monkeypatch.setattr(_weight_decay_training, "_network", network)
        monkeypatch.setattr(_weight_decay_training, "with_wrong_labels", labels)
        shares = {}
        for name in ("bn", "none"):
            without, with_decay, twin = (
                _weight_decay_training.train_at_one_setting(data="digits", arm=f"{name}{how}", seed=0, steps=60)[
                    "outputs"
                ]
                for how in ("", " decay", " rate")
            )
            shares[name] = math.dist(with_decay, twin) / math.dist(with_decay, without)
        assert shares["bn"] < 1e-4
        assert shares["none"] > 0.5

    def test_a_setting_among_many_is_trained_as_the_network_alone(self):
        alone = _weight_decay_training.train_at_one_setting(data="digits", arm="bn decay", seed=0, steps=40)
        how = {"rates": (_weight_decay_training.RATE,), "decays": (_weight_decay_training.DECAY,), "between": (0.1,)}
        many = _weight_decay_training.train_at_settings(data="digits", arm="bn", seed=0, steps=40, **how)
        place = _weight_decay_training.settings(**how).index(
            ("hidden", _weight_decay_training.RATE, _weight_decay_training.DECAY)
        )
        assert many["test"][place] == pytest.approx(alone["test"], abs=0.4)  # one of 300 samples may tip over
        assert many == _weight_decay_training.train_at_settings(data="digits", arm="bn", seed=0, steps=40, **how)

    def test_each_kind_decays_what_it_says(self, monkeypatch):
        """One step with a huge decay and no rate to speak of leaves only what does not decay."""
        kept: dict[str, Any] = {}
        monkeypatch.setattr(
            _weight_decay_training, "correct", lambda stack, x, y: kept.setdefault("stack", stack)(x)[..., 0] > 0
        )
        rate = 1e-6
        how = {"rates": (rate,), "decays": (1 / rate,), "between": ()}
        _weight_decay_training.train_at_settings(data="digits", arm="bn", seed=0, steps=1, **how)
        stack, kinds = kept["stack"], [kind for kind, _, _ in _weight_decay_training.settings(**how)]
        gammas = next(module.weight for module in stack.modules() if isinstance(module, torch.nn.BatchNorm1d))
        for name, parameter in (("hidden", stack.weights[0]), ("weights", stack.weights[-1]), ("all", gammas)):
            gone = [row.abs().max().item() < 1e-3 for row in parameter.view(len(kinds), -1)]
            reach = ["hidden", "weights", "all"].index(name)
            assert gone == [kind != "none" and ["hidden", "weights", "all"].index(kind) >= reach for kind in kinds]

    def test_labels_are_wrong_in_the_training_part_alone(self):
        clean, noisy = (
            images("digits", 3, train=_weight_decay_training.SAMPLES),
            _weight_decay_training.with_wrong_labels("digits", 3),
        )
        wrong = (clean.train_y != noisy.train_y).float().mean().item()
        assert wrong == pytest.approx(_weight_decay_training.WRONG, abs=0.06)
        assert torch.equal(clean.test_y, noisy.test_y)
        assert torch.equal(clean.validation_y, noisy.validation_y)
        assert torch.equal(noisy.train_y, _weight_decay_training.with_wrong_labels("digits", 3).train_y)
        assert torch.equal(
            clean.train_y, images("digits", 3, train=_weight_decay_training.SAMPLES).train_y
        )  # what is cached is whole
