"""Dtypes, formats of the gradient, page settings and peers that can't: right results, honest gaps."""

import pytest
import torch
from support.bench_results import settings_of

from keelnorm import memory
from keelnorm.bench import definition
from keelnorm.bench.cases import DTYPES, GRADIENTS, Case, Shape, cases, least_bytes
from keelnorm.bench.correctness import check, expect
from keelnorm.bench.layer_run import run_bench
from keelnorm.bench.peers import PEERS, CannotError
from keelnorm.bench.problem import make_problem
from keelnorm.bench.session import page_settings
from keelnorm.measure import timing
from keelnorm.measure.machine import available_bytes, caches


@pytest.mark.parametrize("peer", ["keelnorm", "eager"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_peers_are_right_for_every_dtype_and_gradient(peer, dtype, gradient):
    for case in cases([Shape("small", (4, 6, 5, 3))], gradients=(gradient,), dtypes=(dtype,)):
        problem = make_problem(case)
        assert problem.x.dtype == getattr(torch, dtype)
        built = PEERS[peer].build(problem)
        check(problem, built, "training", expect(problem, "training"))


def test_gradients_arrive_as_named():
    def dy(layout, gradient):
        return make_problem(Case(Shape("small", (4, 6, 5, 3)), layout, "bn_relu", gradient)).dy

    assert dy("contiguous", "other").is_contiguous(memory_format=torch.channels_last)
    assert dy("channels_last", "other").is_contiguous()
    assert dy("contiguous", "expanded").stride()[2:] == (0, 0)


@pytest.mark.parametrize("variant", ["bn_relu", "bn_add_relu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_expanded_gradient_meets_no_kink(variant, dtype):
    problem = make_problem(Case(Shape("small", (16, 8, 16, 16)), "contiguous", variant, "expanded", dtype))
    x, residual, state = problem.x.detach(), problem.residual, problem.state
    normalized = definition.normalize(x, *definition.moments(x), 1e-5)
    z = definition._affine(normalized, residual, state["weight"], state["bias"])
    kink = definition.KINKS.get(x.dtype, definition.KINK)
    assert z.abs().min() >= kink


def test_a_gradient_of_strides_0_is_not_counted():
    assert least_bytes(100, 4, "bn", "backward", "expanded") == 800
    assert least_bytes(100, 4, "bn", "forward", "expanded") == 800
    assert Case(Shape("small", (2, 3, 4, 4)), "contiguous", "bn", "other").modes == ("backward", "both")


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("variant", ["bn", "bn_relu", "bn_add_relu"])
def test_onednn_is_right(variant):
    problem = make_problem(Case(Shape("small", (8, 16, 4, 4)), "contiguous", variant))
    built = PEERS["onednn"].build(problem)
    for phase in ("training", "inference"):
        assert check(problem, built, phase, expect(problem, phase)) < 32


def test_a_peer_that_cannot_is_empty_and_no_failure():
    report = run_bench(settings_of(["eager", "onednn"], layouts=["channels_last"], variants=["bn"]), progress=False)
    rows = [row for row in report.rows if row.peer == "onednn"]
    assert rows
    assert all(row.skipped and row.median_us is None and row.error is None for row in rows)
    assert not report.failed
    with pytest.raises(CannotError):
        PEERS["onednn"].build(make_problem(Case(Shape("small", (7, 5)), "contiguous", "bn")))


@pytest.mark.skipif(memory.obstacle() is not None, reason=f"memory: {memory.obstacle()}")
def test_both_page_settings_are_run_fresh_first_and_undone():
    seen = []
    eager = PEERS["eager"]

    def build(problem):
        seen.append(memory.is_active())
        return eager.build(problem)

    peers = {"eager": type(eager)("eager", "", build)}
    settings = settings_of(["eager"], variants=["bn"], layouts=["contiguous"], pages=["reused", "fresh"])
    report = run_bench(settings, peers=peers, progress=False)
    assert seen == [False, True]
    assert [row.pages for row in report.rows] == ["fresh"] * 4 + ["reused"] * 4
    assert {mean.pages for mean in report.means} == {"fresh", "reused"}
    assert not memory.is_active()


def test_where_memory_cannot_be_reused_only_fresh_is_run(monkeypatch):
    monkeypatch.setattr(memory, "obstacle", lambda: "another allocator")
    assert page_settings(["fresh", "reused"]) == ["fresh"]
    with pytest.raises(RuntimeError, match="another allocator"):
        page_settings(["reused"])


def test_warming_up_ends_when_no_pages_come(monkeypatch):
    pages = iter([0, 1000, 1000, 1001, 1001])
    monkeypatch.setattr(timing, "page_faults", lambda: next(pages))
    calls: list[int] = []
    timing.warm_up(calls.append, 10)
    assert len(calls) == 2


def test_caches_are_summed_over_cores(tmp_path):
    for cpu, index, values in (
        ("cpu0", "index0", ("1", "Data", "32K", "0")),
        ("cpu0", "index1", ("1", "Instruction", "32K", "0")),
        ("cpu0", "index3", ("3", "Unified", "2M", "0-1")),
        ("cpu1", "index0", ("1", "Data", "32K", "1")),
        ("cpu1", "index3", ("3", "Unified", "2M", "0-1")),
    ):
        folder = tmp_path / cpu / "cache" / index
        folder.mkdir(parents=True)
        for name, value in zip(("level", "type", "size", "shared_cpu_list"), values, strict=True):
            (folder / name).write_text(value)
    assert caches(tmp_path) == {"L1": 64 << 10, "L3": 2 << 20}


def test_free_memory_is_the_systems_or_the_containers(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9000 kB\nMemAvailable: 2000 kB\n")
    assert available_bytes(meminfo, tmp_path) == 2000 << 10
    (tmp_path / "memory.current").write_text("1000\n")
    for most, free in (("max", 2000 << 10), ("5000", 4000), ("500", 0)):
        (tmp_path / "memory.max").write_text(f"{most}\n")
        assert available_bytes(meminfo, tmp_path) == free
    assert available_bytes(tmp_path / "absent", tmp_path / "absent") is None
