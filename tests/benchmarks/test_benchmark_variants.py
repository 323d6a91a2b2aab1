"""The variants' benchmark: checked first, compared within a round, and every row has a number or a reason."""

import json

import pytest
import torch
from support.bench_results import invoke, settings_of
from torch import nn

import keelnorm as kn
from benchmarks.variants.__main__ import main
from benchmarks.variants.variant_layers import PLAIN, VARIANTS, Made, layer
from benchmarks.variants.variant_run import run_variants
from benchmarks.variants.variant_table import print_variants
from keelnorm.bench.compare import compare
from keelnorm.bench.peers import CannotError
from keelnorm.bench.results import Report
from keelnorm.measure import timing

TINY = ("--shape", "8x16x4x4", "--rounds", "2", "--min-time", "0")


def run(variants, **given):
    return run_variants(settings_of(["keelnorm"], variants=list(variants), **given), variants=variants, progress=False)


def computing(function):
    """A factory of something that computes ``function(layer, x)``."""

    def make(x):
        module = kn.BatchNorm(x.shape[1])
        return Made(module, lambda x: function(module, x))

    return make


def refuse(x):
    raise CannotError("takes sequences only")


def fail(module, x):
    raise RuntimeError("out of luck\nand more")


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return torch.full_like(dy, torch.nan)


def test_every_variant_that_is_listed_runs():
    report = run(VARIANTS)
    assert not report.failed
    layouts = ("contiguous", "channels_last")
    assert [(row.variant, row.layout) for row in report.variants] == [(n, one) for one in layouts for n in VARIANTS]
    for row in report.variants:
        assert row.median_us > row.forward_us > 0
        assert len(row.samples_us) == 2
        assert row.ratio > 0
        assert row.skipped is None
        if row.variant == PLAIN:
            assert row.ratio == row.forward_ratio == 1
    assert not any("," in name for name in VARIANTS)  # which separates names in an option


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda module, x: module(x) / 0, "y is not finite"),
        (lambda module, x: module(x)[:1], "y should have the shape"),
        (lambda module, x: NoGradient.apply(module(x)), "a gradient is not finite"),
        (lambda module, x: module(x.detach()), "does not depend on x"),
        (fail, "RuntimeError: out of luck"),
    ],
    ids=["not finite", "shape", "gradient", "constant", "raises"],
)
def test_a_wrong_variant_is_not_timed(wrong, reason):
    report = run({PLAIN: VARIANTS[PLAIN], "wrong": computing(wrong)}, layouts=["contiguous"])
    assert report.failed
    plain, other = report.variants
    assert plain.median_us is not None
    assert plain.error is None
    assert reason in other.error
    assert "and more" not in other.error
    assert other.median_us is other.ratio is None
    assert other.samples_us == []


def test_what_a_variant_can_not_do_is_no_failure():
    report = run({PLAIN: VARIANTS[PLAIN], "sequences": refuse}, layouts=["contiguous"])
    assert not report.failed
    assert report.variants[1].skipped == "takes sequences only"


def test_plain_is_measured_though_not_asked_for():
    settings = settings_of(["keelnorm"], variants=[], layouts=["contiguous"])
    assert [row.variant for row in run_variants(settings, progress=False).variants] == [PLAIN]


def test_an_unused_parameter_is_not_asked_for_its_gradient():
    class Unused(kn.BatchNorm):
        def __init__(self, channels):
            super().__init__(channels)
            self.unused = nn.Parameter(torch.zeros(3))

    assert not run({PLAIN: layer(Unused)}, layouts=["contiguous"]).failed


def test_arguments_are_made_from_the_input():
    """And once, not in every call."""
    seen = []

    def arguments(x):
        seen.append(x.shape)
        return {"residual": x.detach()}

    assert not run({PLAIN: layer(kn.BatchNorm, arguments, eps=0.1)}, layouts=["contiguous"]).failed
    assert seen == [(8, 16, 4, 4)]


@pytest.fixture
def known_times(monkeypatch):
    """Plain takes 1 and 10 ms in two rounds, others 3 and 20 ms; half of it forward."""

    def measure(samplers, **_):
        def sample(milliseconds):
            return {"forward": milliseconds / 2000, "both": milliseconds / 1000}

        times = {name: (1, 10) if name == PLAIN else (3, 20) for name in samplers}
        return timing.Measured(
            samples={name: [sample(one) for one in given] for name, given in times.items()},
            faults={name: [0.0, 0.0] for name in samplers},
            disturbed=0.0,
        )

    monkeypatch.setattr(timing, "measure", measure)


def test_ratios_are_within_a_round(known_times):
    report = run({PLAIN: VARIANTS[PLAIN], "other": VARIANTS[PLAIN]}, layouts=["contiguous"])
    other = report.variants[1]
    assert other.ratio == other.forward_ratio == pytest.approx((3 + 2) / 2)  # and not 11.5 / 5.5
    assert other.median_us == pytest.approx(11_500)
    assert other.forward_us == pytest.approx(5_750)


def test_table(known_times, capsys):
    """Ratios, the mean over a suite's shapes, and no mean where a shape is missing."""

    def small_only(x):
        if x.dim() == 2:
            raise CannotError("needs positions")
        return VARIANTS[PLAIN](x)

    variants = {PLAIN: VARIANTS[PLAIN], "other": VARIANTS[PLAIN], "picky": small_only}
    print_variants(run(variants, shapes=["8x16x4x4", "64x128"], layouts=["contiguous"]))
    said = capsys.readouterr().out
    assert "not measured: picky, 64x128 contiguous float32: needs positions" in said
    means = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in said.splitlines()[-4:-1]}
    assert means == {PLAIN: "1.00", "other": "2.50", "picky": ""}


def test_json_there_and_back_and_compared(known_times):
    report = run(VARIANTS)
    again = Report.from_json(report.to_json())
    assert again == report
    older = json.loads(report.to_json())
    del older["variants"]
    assert Report.from_json(json.dumps(older)).variants == []
    for row in again.variants:
        row.median_us *= 2
    comparison = compare(report, again)
    assert len(comparison.changes) == len(report.variants)
    assert all(change.ratio == 2 for change in comparison.changes)


def test_command(tmp_path):
    out = tmp_path / "made" / "variants.json"
    names = [name for name in VARIANTS if name != PLAIN][:1]
    done = invoke(main, *TINY, "--variant", *names, "--json", "--out", str(out))
    assert done.exit_code == 0, done.output
    report = Report.from_json(done.stdout)
    assert {row.variant for row in report.variants} == {PLAIN, *names}
    assert Report.from_json(out.read_text()) == report


def test_command_says_what_is_wrong(monkeypatch):
    done = invoke(main, "--shape", "no such shape")
    assert done.exit_code == 2
    assert "8x16x4x4" in done.output
    done = invoke(main, "--variant", "no such variant")
    assert done.exit_code == 2
    assert PLAIN in done.output
    monkeypatch.setitem(VARIANTS, PLAIN, computing(fail))
    done = invoke(main, *TINY)
    assert done.exit_code == 1
    assert "out of luck" in done.output
