import os

import pytest
import torch

from keelnorm.lab.core.cell import Cell, Results
from keelnorm.lab.core.runner import run, stored
from keelnorm.lab.core.store import Store


def square(*, seed):
    return {"value": seed * seed, "threads": torch.get_num_threads(), "process": os.getpid()}


def fails_on_two(*, seed):
    if seed == 2:
        raise ZeroDivisionError("two is <b>bad</b>")
    return {"value": seed}


def dies_on_two(*, seed):
    if seed == 2:
        os._exit(3)
    return {"value": seed}


class Witness:
    def __init__(self):
        self.phases = []
        self.ended = []

    def begin(self, cells, *, alone):
        self.phases.append((alone, len(cells)))

    def done(self, cell, failure):
        self.ended.append((cell.axes["seed"], failure is None))


def cells(task, count=5, **how):
    return [Cell(task, {"seed": seed}, **how) for seed in range(count)]


@pytest.mark.parametrize("jobs", [1, 2])
def test_every_cell_runs_on_one_thread(jobs):
    threads = torch.get_num_threads()
    outcome = run(cells(square), Store(None), jobs=jobs)
    assert [outcome.results[cell.key]["value"] for cell in cells(square)] == [0, 1, 4, 9, 16]
    assert {result["threads"] for result in outcome.results.values()} == {1}
    in_other_processes = {result["process"] for result in outcome.results.values()} - {os.getpid()}
    assert bool(in_other_processes) == (jobs == 2)
    assert torch.get_num_threads() == threads
    assert not outcome.failures


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_cell_that_fails_is_reported_and_the_rest_goes_on(jobs):
    witness = Witness()
    outcome = run(cells(fails_on_two), Store(None), jobs=jobs, listener=witness)
    (failure,) = outcome.failures
    assert failure.cell.axes == {"seed": 2}
    assert failure.reason == "ZeroDivisionError: two is <b>bad</b>"
    assert "fails_on_two" in failure.traceback
    assert len(outcome.results) == 4
    assert sorted(witness.ended) == [(0, True), (1, True), (2, False), (3, True), (4, True)]


def test_a_cell_that_fails_is_not_stored_and_runs_again(tmp_path):
    path = tmp_path / "results.jsonl"
    run(cells(fails_on_two), Store(path), jobs=1)
    outcome = run(cells(fails_on_two), Store(path), jobs=1)
    assert outcome.reused == 4
    assert len(outcome.failures) == 1


@pytest.mark.filterwarnings("ignore::UserWarning")  # joblib's own, about the worker it has lost
def test_a_worker_that_dies_takes_its_own_cell_alone(tmp_path):
    outcome = run(cells(dies_on_two), Store(None), jobs=2)
    (failure,) = outcome.failures
    assert failure.cell.axes == {"seed": 2}
    assert "its worker process died" in failure.reason
    assert sorted(result["value"] for result in outcome.results.values()) == [0, 1, 3, 4]


def test_the_callers_own_backend_runs_the_cells():
    from joblib import parallel_config

    with parallel_config(backend="threading", n_jobs=2):
        outcome = run(cells(fails_on_two, 8), Store(None))
        where = run(cells(square), Store(None), jobs=2)
    assert len(outcome.results) == 7
    assert len(outcome.failures) == 1
    assert {result["process"] for result in where.results.values()} == {os.getpid()}


def test_what_is_stored_is_reported_without_running(tmp_path):
    store = Store(tmp_path / "results.jsonl")
    run(cells(square, 2), store, jobs=1)
    known = stored(cells(square, 3), store)
    assert [result["value"] for result in known.results.values()] == [0, 1]
    assert known.seconds.keys() == known.results.keys()


def test_exclusive_cells_run_afterwards_in_this_process():
    witness = Witness()
    work = [*cells(square, exclusive=True), *cells(fails_on_two)]
    outcome = run(work, Store(None), jobs=1, listener=witness)
    assert witness.phases == [(False, 5), (True, 5)]
    assert outcome.results[work[0].key]["process"] == os.getpid()


def test_a_cell_asked_for_twice_runs_once():
    witness = Witness()
    run([*cells(square), *cells(square)], Store(None), jobs=1, listener=witness)
    assert len(witness.ended) == 5


def test_the_longest_cells_start_first():
    witness = Witness()
    work = [Cell(square, {"seed": seed}, cost=seed) for seed in range(4)]
    run(work, Store(None), jobs=1, listener=witness)
    assert [seed for seed, _ in witness.ended] == [3, 2, 1, 0]


def stops_on_two(*, seed):
    if seed == 2:
        raise KeyboardInterrupt
    return {"value": seed}


def test_after_a_run_that_was_cut_short_the_shortest_start_first_and_exclusive_ones_before(tmp_path):
    """A long cell that never ends before the next kill must not keep the others from ending."""
    path = tmp_path / "results.jsonl"
    work = [Cell(stops_on_two, {"seed": seed}, cost=seed, exclusive=seed == 3) for seed in range(4)]
    for expected in ([2], [3, 0, 1, 2], [2]):
        witness = Witness()
        store = Store(path)
        with pytest.raises(KeyboardInterrupt):
            run(work, store, jobs=1, listener=witness)
        assert [seed for seed, _ in witness.ended] + [2] == expected
        assert Store(path).was_cut_short


def test_a_run_that_ended_by_itself_was_not_cut_short(tmp_path):
    path = tmp_path / "results.jsonl"
    for count in (2, 4):
        run(cells(fails_on_two, count), Store(path), jobs=1)
        assert not Store(path).was_cut_short
    before = path.read_bytes()
    run(cells(square, 0), Store(path), jobs=1)
    assert path.read_bytes() == before  # nothing to do, nothing to note


def test_results_are_read_in_the_order_of_the_cells_without_the_missing():
    first, second, third = cells(square, 3)
    results = Results({third.key: {"value": 3}, first.key: {"value": 1}})
    assert list(results.of([first, second, third])) == [
        ({"seed": 0}, {"value": 1}),
        ({"seed": 2}, {"value": 3}),
    ]
