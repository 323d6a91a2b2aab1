"""Tile sizes by timing: the fastest is used and kept in a file, and a broken file is ignored."""

from __future__ import annotations

import json
import logging

import pytest
import torch

import keelnorm as kn
from keelnorm.engine.kernels import triton
from keelnorm.engine.kernels.triton.availability import by_rule
from keelnorm.engine.kernels.triton.tiling import View

pytestmark = pytest.mark.triton


@pytest.fixture
def tuning():
    if triton.missing() is not None:
        pytest.skip(f"{triton.missing()}, so that its kernels can't be timed")
    from keelnorm.engine.kernels.triton import tuning

    before = tuning._enabled
    yield tuning
    tuning.autotune(before)


@pytest.mark.parametrize("fastest", [0, 2])
@pytest.mark.parametrize("shape", [(4, 3, 5, 5), (130, 2, 9, 8)], ids=str)
def test_the_fastest_choice_is_taken_and_every_one_computes_the_same(device, tuning, shape, fastest):
    x = torch.randn(shape).to(device)
    view = View.of(shape, False)
    among = tuning.options(view, x)[:4]
    times: list[float] = []
    results: list[torch.Tensor] = []

    def timer(run):
        run()
        results.append(kn.functional.batch_norm(x, None, None, training=True).cpu())
        times.append(1.0 if len(times) == fastest else 2.0)
        return times[-1]

    assert tuning.fastest(view, x, among, timer) == among[fastest]
    assert len(times) == len(among)
    for result in results:
        assert torch.allclose(result, results[0], atol=1e-5)


def test_a_choice_that_does_not_compile_is_not_taken(device, tuning):
    x = torch.randn(4, 3, 5, 5).to(device)
    view = View.of(x.shape, False)
    among = tuning.options(view, x)[:2]
    calls = []

    def timer(run):
        calls.append(run)
        if len(calls) == 1:
            raise RuntimeError("out of resource: registers")
        run()
        return 5.0

    assert tuning.fastest(view, x, among, timer) == among[1]
    kn.functional.moments(x)
    assert tuning._trial is None


def test_choices_come_back_from_their_file(tuning, tmp_path):
    choices = {"a": by_rule(View(8, 64, 49, True), 2, 132), "b": by_rule(View(256, 64, 3136, False), 4, 132)}
    path = tmp_path / "new" / "tiles.json"
    tuning.write(path, choices)
    assert tuning.read(path) == choices
    assert list(path.parent.iterdir()) == [path]
    assert tuning.read(tmp_path / "none.json") == {}


@pytest.mark.parametrize(
    "text", ["", "{", '{"format": 1}', '{"format": 1, "choices": {"a": {"b": 1}}}', "[1]", "[" * 100_000]
)
def test_a_broken_file_is_said_and_passed_over(tuning, tmp_path, caplog, text):
    path = tmp_path / "tiles.json"
    path.write_text(text)
    with caplog.at_level(logging.WARNING, logger="keelnorm"):
        assert tuning.read(path) == {}
    assert "is not read, and tile sizes are timed anew" in caplog.text


@pytest.mark.parametrize("wrong", ["1", 0, -4, True, 1.5, None])
def test_a_cut_of_wrong_types_never_gets_to_a_kernel(tuning, tmp_path, caplog, wrong):
    path, choices = tmp_path / "tiles.json", {"a": by_rule(View.of((4, 3, 5, 5), False), 4, 132)}
    tuning.write(path, choices)
    assert tuning.read(path) == choices
    found = json.loads(path.read_text())
    found["choices"]["a"]["reduction"]["a"] = wrong
    path.write_text(json.dumps(found))
    with caplog.at_level(logging.WARNING, logger="keelnorm"):
        assert tuning.read(path) == {}
    assert "is not read, and tile sizes are timed anew" in caplog.text


def test_the_cache_is_where_the_environment_says(tuning, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning.cache_folder() == tmp_path / "keelnorm"
    monkeypatch.setenv("KEELNORM_CACHE", str(tmp_path / "own"))
    assert tuning.cache_folder() == tmp_path / "own"


def test_without_a_gpu_the_rule_holds_also_when_timing_is_asked_for(device, tuning):
    if device == "cuda":
        pytest.skip("there is a GPU, where timing is what was asked for")
    kn.kernels.autotune()
    x = torch.randn(4, 3, 5, 5)
    assert tuning.choose(View.of(x.shape, False), x) == by_rule(View.of(x.shape, False), 4, 4)
    kn.functional.batch_norm(x, None, None, training=True)
