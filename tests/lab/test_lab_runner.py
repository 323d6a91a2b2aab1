import os

import pytest
import torch

from evenkeel.lab.cell import Cell, Results
from evenkeel.lab.runner import run
from evenkeel.lab.store import Store


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
def test_a_worker_that_dies_leaves_a_report_and_what_was_done(tmp_path):
    outcome = run(cells(dies_on_two), Store(None), jobs=2)
    assert outcome.failures
    assert all("worker process died" in failure.reason for failure in outcome.failures)
    assert {2} <= {failure.cell.axes["seed"] for failure in outcome.failures}
    assert len(outcome.results) + len(outcome.failures) == 5


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


def test_results_are_read_in_the_order_of_the_cells_without_the_missing():
    first, second, third = cells(square, 3)
    results = Results({third.key: {"value": 3}, first.key: {"value": 1}})
    assert list(results.of([first, second, third])) == [
        ({"seed": 0}, {"value": 1}),
        ({"seed": 2}, {"value": 3}),
    ]
