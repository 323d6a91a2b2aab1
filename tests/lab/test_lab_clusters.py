"""Clusters: Dask and Ray run the cells, and one that can't is named in one line."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from importlib.util import find_spec

import pytest
from test_lab_runner import cells, dies_on_two, fails_on_two, square

from keelnorm.engine import optional_imports
from keelnorm.lab.core import clusters
from keelnorm.lab.core.clusters import ClusterError, cluster
from keelnorm.lab.core.runner import run
from keelnorm.lab.core.store import Store


@pytest.fixture
def _own_environment():
    """distributed sets variables of the process when it is imported, which other tests are not to see."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.usefixtures("_own_environment")
def test_a_dask_cluster_runs_the_cells(tmp_path, monkeypatch):
    distributed = pytest.importorskip("distributed", reason="the extra [dask] is not installed")
    dask = pytest.importorskip("dask")
    monkeypatch.setitem(dask.config.config["distributed"]["scheduler"], "allowed-failures", 0)
    made = distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, local_directory=str(tmp_path)
    )
    with made, cluster(made.scheduler_address):
        outcome = run(cells(fails_on_two, 8), Store(tmp_path / "results.jsonl"))
        where = run(cells(square, 8), Store(None))
        deaths = run(cells(dies_on_two), Store(None))
    assert [failure.cell.axes["seed"] for failure in outcome.failures] == [2]
    assert sorted(result["value"] for result in outcome.results.values()) == [0, 1, 3, 4, 5, 6, 7]
    assert Store(tmp_path / "results.jsonl").get(cells(fails_on_two)[1])[0] == {"value": 1}
    assert [failure.cell.axes["seed"] for failure in deaths.failures] == [2]  # those beside it in its worker have run
    assert "its worker process died" in deaths.failures[0].reason
    assert sorted(result["value"] for result in deaths.results.values()) == [0, 1, 3, 4]
    processes = {result["process"] for result in where.results.values()}
    assert len(processes) == 2
    assert os.getpid() not in processes
    assert {result["threads"] for result in where.results.values()} == {1}


@pytest.mark.parametrize("address", ["localhost:8786", "http://localhost", "dask"])
def test_an_address_of_no_kind_of_cluster_is_refused(address):
    with pytest.raises(ValueError, match=r"tcp://host:8786.*ray://host:10001.*got"):
        cluster(address)


def test_no_cluster_where_nothing_listens():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        for kind, scheme, package in (("Dask scheduler", "tcp", "distributed"), ("Ray head", "ray", "ray")):
            if find_spec(package) is None:
                continue
            address = f"{scheme}://127.0.0.1:{free.getsockname()[1]}"
            said = f"no {kind} answers at {address} .*; is it running, and reachable"
            with pytest.raises(ClusterError, match=said):
                cluster(address)


@pytest.mark.usefixtures("_own_environment")
def test_a_scheduler_without_workers_is_said_so(tmp_path, monkeypatch):
    distributed = pytest.importorskip("distributed", reason="the extra [dask] is not installed")
    monkeypatch.setattr(clusters, "SECONDS", 0.5)
    made = distributed.LocalCluster(
        n_workers=0, processes=False, dashboard_address=None, local_directory=str(tmp_path), protocol="tcp"
    )
    with made:
        with pytest.raises(ClusterError, match=r"the Dask scheduler at tcp://\S+ answers, but has no workers; start"):
            cluster(made.scheduler_address)
        made.scale(1)
        with cluster(made.scheduler_address):
            made.scale(0)
            with pytest.raises(ClusterError, match="has no workers"):
                run(cells(square, 2), Store(None))


def listens(port):
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def ray_head(folder, cores):
    """A Ray head of this machine; gives its address."""
    start = "import sys; from ray.scripts.scripts import main; sys.argv[0] = 'ray'; sys.exit(main())"
    with socket.socket() as first, socket.socket() as second:
        for each in (first, second):
            each.bind(("127.0.0.1", 0))
        port, client_port = (each.getsockname()[1] for each in (first, second))
    options = [
        f"--port={port}",
        f"--ray-client-server-port={client_port}",
        f"--num-cpus={cores}",
        f"--temp-dir={folder}",
    ]
    ports = ["--min-worker-port=0", "--max-worker-port=0", "--include-dashboard=false", "--block"]
    head = subprocess.Popen(
        [sys.executable, "-c", start, "start", "--head", *options, *ports],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "RAY_USAGE_STATS_ENABLED": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    said = []
    try:
        for line in head.stdout:
            said.append(line)
            if "Ray runtime started" in line:
                break
        else:
            pytest.fail("Ray did not start:\n" + "".join(said))
        until = time.monotonic() + 60
        while not listens(client_port):  # its server for clients comes a little later
            assert time.monotonic() < until
            time.sleep(0.1)
        yield f"ray://127.0.0.1:{client_port}"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGKILL)
        head.communicate()


@pytest.mark.usefixtures("_own_environment")
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_ray_cluster_runs_the_cells(tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="the extra [ray] is not installed")
    pytest.importorskip("grpc", reason="Ray's client needs grpcio, which the extra [ray] brings")
    with tempfile.TemporaryDirectory(dir="/tmp") as folder, ray_head(folder, 2) as address:  # sockets' names are short
        with cluster(address):
            outcome = run(cells(fails_on_two, 8), Store(tmp_path / "results.jsonl"))
            deaths = run(cells(dies_on_two), Store(None))
            where = run(cells(square, 8), Store(None), jobs=2)
        monkeypatch.setattr(clusters, "_ray_cores", lambda ray: 0)
        with pytest.raises(ClusterError, match=f"the Ray head at {address} answers, but has no workers; start some"):
            cluster(address)
        assert [failure.reason for failure in outcome.failures] == ["ZeroDivisionError: two is <b>bad</b>"]
        assert sorted(result["value"] for result in outcome.results.values()) == [0, 1, 3, 4, 5, 6, 7]
        assert Store(tmp_path / "results.jsonl").get(cells(fails_on_two)[1])[0] == {"value": 1}
        assert [failure.cell.axes["seed"] for failure in deaths.failures] == [2]
        assert "its worker process died" in deaths.failures[0].reason
        assert len(deaths.results) == 4
        assert os.getpid() not in {result["process"] for result in where.results.values()}
        assert {result["threads"] for result in where.results.values()} == {1}


@pytest.mark.parametrize(("address", "package"), [("tcp://127.0.0.1:1", "distributed"), ("ray://127.0.0.1:1", "ray")])
def test_a_cluster_without_its_package_says_what_to_install(monkeypatch, address, package):
    monkeypatch.setattr(optional_imports, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=f"needs the package {package}: .*pip install .*{package}"):
        cluster(address)
