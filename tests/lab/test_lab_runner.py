import os

import pytest
import torch

from evenkeel.lab.cell import Cell, Results
from evenkeel.lab.parallel import cluster
from evenkeel.lab.runner import run, stored
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
def test_a_worker_that_dies_takes_its_own_cell_alone(tmp_path):
    outcome = run(cells(dies_on_two), Store(None), jobs=2)
    (failure,) = outcome.failures
    assert failure.cell.axes == {"seed": 2}
    assert "its worker process died" in failure.reason
    assert sorted(result["value"] for result in outcome.results.values()) == [0, 1, 3, 4]


@pytest.fixture
def _own_environment():
    """distributed sets variables of the process when it is imported, which other tests are not to see."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.usefixtures("_own_environment")
def test_a_dask_cluster_runs_the_cells(tmp_path):
    distributed = pytest.importorskip("distributed")
    made = distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, local_directory=str(tmp_path)
    )
    with made, cluster(made.scheduler_address):
        outcome = run(cells(fails_on_two, 8), Store(tmp_path / "results.jsonl"))
        where = run(cells(square, 8), Store(None))
    assert [failure.cell.axes["seed"] for failure in outcome.failures] == [2]
    assert sorted(result["value"] for result in outcome.results.values()) == [0, 1, 3, 4, 5, 6, 7]
    assert Store(tmp_path / "results.jsonl").get(cells(fails_on_two)[1])[0] == {"value": 1}
    processes = {result["process"] for result in where.results.values()}
    assert len(processes) == 2
    assert os.getpid() not in processes
    assert {result["threads"] for result in where.results.values()} == {1}


@pytest.mark.parametrize("address", ["localhost:8786", "http://localhost", "dask"])
def test_an_address_of_no_kind_of_cluster_is_refused(address):
    with pytest.raises(ValueError, match=r"tcp://host:8786.*ray://host:10001.*got"):
        cluster(address)


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


def test_results_are_read_in_the_order_of_the_cells_without_the_missing():
    first, second, third = cells(square, 3)
    results = Results({third.key: {"value": 3}, first.key: {"value": 1}})
    assert list(results.of([first, second, third])) == [
        ({"seed": 0}, {"value": 1}),
        ({"seed": 2}, {"value": 3}),
    ]


@pytest.mark.parametrize(("address", "package"), [("tcp://127.0.0.1:1", "distributed"), ("ray://127.0.0.1:1", "ray")])
def test_a_cluster_without_its_package_says_what_to_install(monkeypatch, address, package):
    from evenkeel.lab import parallel

    monkeypatch.setattr(parallel, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=f"needs the package {package}: pip install"):
        cluster(address)
