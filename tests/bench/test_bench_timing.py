"""Order, repetition and statistics of samples; no time is asserted."""

import gc
import itertools

import pytest
import torch

from keelnorm.measure import disturbance, timing


def test_turns_rotate():
    assert list(timing.turns("abc", 4)) == [tuple("abc"), tuple("bca"), tuple("cab"), tuple("abc")]
    assert list(timing.turns((), 2)) == [(), ()]


def test_samples_are_taken_by_turns_and_the_first_rounds_are_not_kept():
    log = []

    def sampler(name):
        def take():
            log.append(name)
            return len(log)

        return take

    taken = timing.by_turns({name: sampler(name) for name in "ab"}, 2, discarded=1)
    assert "".join(log) == "abbaab"
    assert taken == {"a": [4, 5], "b": [3, 6]}


def test_turns_end_with_the_budget_after_whole_cycles():
    taken = timing.by_turns({"a": int, "b": int}, 9, at_least=3, budget=0.0)
    assert [len(samples) for samples in taken.values()] == [4, 4]
    assert timing.by_turns({}, 2) == {}


def recorder(log, name, seconds=1.0):
    def run(repeats):
        log.append((name, repeats))
        return {"inference": seconds}

    return run


@pytest.fixture
def quiet(monkeypatch):
    monkeypatch.setattr(timing, "run_delay", lambda: 0.0)


@pytest.mark.usefixtures("quiet")
def test_peers_alternate_in_rounds():
    log: list[tuple[str, float]] = []
    measured = timing.measure({name: recorder(log, name) for name in "ab"}, rounds=3, min_seconds=0.5)
    assert [name for name, _ in log[-6:]] == ["a", "b", "b", "a", "a", "b"]
    assert {name: len(samples) for name, samples in measured.samples.items()} == {"a": 3, "b": 3}
    assert measured.disturbed == 0


@pytest.mark.usefixtures("quiet")
def test_short_calls_are_repeated():
    log: list[tuple[str, float]] = []
    timing.measure({"a": recorder(log, "a", seconds=1e-5)}, rounds=1, min_seconds=2e-3)
    assert 200 <= log[-1][1] <= 250


def test_an_interruption_is_no_long_call():
    times = itertools.chain([1e-5, 1.0], itertools.repeat(1e-5))
    assert timing.calibrate(lambda _: {"inference": next(times)}, 2e-3) >= 200


def test_disturbed_rounds_are_repeated(monkeypatch):
    # Round 0 loses everything, the others nothing.
    delays = itertools.chain([0.0, 1e9], itertools.repeat(1e9))
    monkeypatch.setattr(timing, "run_delay", lambda: next(delays))
    seconds = itertools.count(1.0)
    measured = timing.measure({"a": lambda _: {"inference": next(seconds)}}, rounds=2, min_seconds=0.0)
    first = 1.0 + 1 + 3  # one call to warm up, three to calibrate
    assert [s["inference"] for s in measured.samples["a"]] == [first + 1, first + 2]
    assert measured.disturbed == 0


def test_a_busy_machine_ends_and_says_so(monkeypatch):
    delays = itertools.count(0.0, 1e9)
    monkeypatch.setattr(timing, "run_delay", lambda: next(delays))
    measured = timing.measure({"a": lambda _: {"inference": 1.0}}, rounds=2, min_seconds=0.0)
    assert len(measured.samples["a"]) == 2
    assert measured.disturbed == 1


@pytest.mark.usefixtures("quiet")
def test_page_faults_are_counted_per_call(monkeypatch):
    pages = itertools.count(0, 400)
    monkeypatch.setattr(timing, "page_faults", lambda: next(pages))
    measured = timing.measure({"a": lambda _: {"inference": 1.0}}, rounds=2, min_seconds=2.0)
    repeats = timing.calibrate(lambda _: {"inference": 1.0}, 2.0)
    assert measured.faults == {"a": [400 / repeats] * 2}


def test_run_delay_grows_or_is_unknown(monkeypatch, tmp_path):
    first = disturbance.run_delay()
    assert first is None or disturbance.run_delay() >= first
    monkeypatch.setattr(disturbance, "TASKS", tmp_path / "absent")
    assert disturbance.run_delay() is None
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "schedstat").write_text("5 3000000000 7\n")
    monkeypatch.setattr(disturbance, "TASKS", tmp_path)
    assert disturbance.run_delay() == 3.0


def test_page_faults_grow():
    first = disturbance.page_faults()
    held = torch.ones(1 << 22)
    assert disturbance.page_faults() >= first
    del held


def test_a_peak_grows_and_begins_again():
    disturbance.reset_peak()
    before = disturbance.peak_bytes()
    held = torch.ones(64 << 20)
    after = disturbance.peak_bytes()
    assert before is None or after - before > 200 << 20
    del held
    if before is not None and disturbance.reset_peak():
        assert disturbance.peak_bytes() < after - (200 << 20)


def test_the_peak_of_another_process_is_known_while_it_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(disturbance, "PROCESSES", tmp_path)
    (tmp_path / "12").mkdir()
    (tmp_path / "12" / "status").write_text("Name:\tpython\nVmHWM:\t  2048 kB\n")
    assert disturbance.peak_bytes(12) == 2 << 20
    (tmp_path / "12" / "status").write_text("Name:\tpython\nState:\tZ (zombie)\n")
    assert disturbance.peak_bytes(12) is None
    assert disturbance.peak_bytes(13) is None
    assert not disturbance.reset_peak()


def test_collector_rests_and_returns():
    seen = []

    def run(_):
        seen.append(gc.isenabled())
        if len(seen) > 2:
            raise RuntimeError
        return {"inference": 1.0}

    assert gc.isenabled()
    with pytest.raises(RuntimeError):
        timing.measure({"a": run}, rounds=1, min_seconds=0.0)
    assert gc.isenabled()
    assert not any(seen)


def test_training_parts_add_up():
    x = torch.ones(3, requires_grad=True)
    sample = timing.training_sampler(lambda: x * 2, [x], torch.ones(3))(4)
    assert sample["both"] == pytest.approx(sample["forward"] + sample["backward"])
    assert timing.training_sampler(lambda: x * 2, [x], None)(4).keys() == {"forward"}
    assert x.grad is None


def test_inference_runs_without_gradients():
    modes = []
    timing.inference_sampler(lambda: modes.append(torch.is_grad_enabled()))(3)
    assert modes == [False] * 3


def test_statistics():
    assert timing.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2 / 3)
    assert timing.spread([1.0]) == 0
    # The machine slows down tenfold in the second round: the ratio does not notice.
    assert timing.median_ratio([1.0, 10.0, 1.1], [2.0, 20.0, 2.2]) == pytest.approx(0.5)
