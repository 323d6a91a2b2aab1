import importlib
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
from pathlib import Path

import pytest

import keelnorm
from keelnorm.lab.core import store as store_module
from keelnorm.lab.core.cell import Cell
from keelnorm.lab.core.environment import NOT_MEASURED, source_used
from keelnorm.lab.core.runner import run
from keelnorm.lab.core.store import Store, _digest

HERE = {"machine": "here"}


def double(*, seed):
    return {"value": 2 * seed}


def slow(*, seed):
    if seed == 2:
        time.sleep(60)
    return {"value": seed}


def cells(count, task=double):
    return [Cell(task, {"seed": seed}) for seed in range(count)]


def test_what_is_put_is_got_again_after_reopening(tmp_path):
    path = tmp_path / "deep" / "results.jsonl"
    first, second = cells(2)
    store = Store(path, environment=HERE)
    assert store.get(first) is None
    store.put(first, {"value": 7}, 0.5)
    assert store.get(first) == ({"value": 7}, 0.5)
    again = Store(path, environment=HERE)
    assert again.get(first)[0] == {"value": 7}
    assert again.get(second) is None
    assert again.warnings == []


def test_the_file_tells_machine_versions_code_and_duration(tmp_path):
    path = tmp_path / "results.jsonl"
    store = Store(path)
    for cell in cells(2):
        store.put(cell, {"value": 1}, 0.25)
    described, *records = map(json.loads, path.read_text().splitlines())
    assert {"processor", "cores", "python", "torch", "keelnorm"} <= described["is"].keys()
    assert {record["environment"] for record in records} == {described["environment"]}
    assert records[0].keys() == {"cell", "environment", "code", "finished", "seconds", "result"}


@pytest.mark.parametrize("kept", [1, 20, -1])
def test_a_torn_line_costs_its_own_cell_only(tmp_path, kept):
    path = tmp_path / "results.jsonl"
    first, second, third = cells(3)
    store = Store(path, environment=HERE)
    store.put(first, {"value": 1}, 0.0)
    whole = path.read_bytes()
    store.put(second, {"value": 2}, 0.0)
    line = path.read_bytes()[len(whole) :]
    path.write_bytes(whole + line[:kept].rstrip(b"\n"))
    torn = Store(path, environment=HERE)
    if kept == -1:  # all but the line's end: nothing is lost
        assert torn.get(second)[0] == {"value": 2}
    else:
        assert torn.get(second) is None
        assert len(torn.warnings) == 1
        assert "line 3" in torn.warnings[0]
    torn.put(third, {"value": 3}, 0.0)
    after = Store(path, environment=HERE)
    assert after.get(first)[0] == {"value": 1}
    assert after.get(third)[0] == {"value": 3}


def row(**other):
    """A line that the store of HERE would take for a result, but for what is given."""
    whole = {"cell": "x", "environment": _digest(HERE), "code": "c", "seconds": 1, "result": {"value": 1}}
    return json.dumps(whole | other).encode()


@pytest.mark.parametrize(
    "line",
    [
        b"not json", b"\xff\xfe", b"{}", b"[1]", b"3", b'"order"', b'{"cell": "x"}', b"[" * 100_000,
        b'{"a":' * 100_000, b'{"order": 3}', b'{"order": ["claims"]}', b'{"run": "walked"}', b'{"run": []}',
        row(cell=3), row(cell=["x"]), row(code=None), row(result=[1]), row(result="x"), row(result=None),
        row(seconds="1"), row(seconds=None), row(seconds=True), row(seconds=10**400), row(seconds=float("nan")),
        row(result={"value": float("inf")}), row().replace(b'"value": 1', b'"value": 1e999'),
    ],
)  # fmt: skip
def test_a_line_that_is_no_result_is_named_and_left_out(tmp_path, line):
    path = tmp_path / "results.jsonl"
    (cell,) = cells(1)
    path.write_bytes(line + b"\n")
    store = Store(path, environment=HERE)
    assert len(store.warnings) == 1
    assert "line 1" in store.warnings[0]
    assert path.name in store.warnings[0]
    assert store.order is None
    store.put(cell, {"value": 1}, 0.0)
    assert Store(path, environment=HERE).get(cell)[0] == {"value": 1}


def test_a_row_of_the_right_types_is_taken(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_bytes(row() + b"\n")
    assert Store(path, environment=HERE).warnings == []


def test_a_disk_that_gets_full_costs_the_line_in_hand_and_leaves_no_part_of_it(tmp_path):
    path = tmp_path / "results.jsonl"
    first, second = cells(2)
    store = Store(path, environment=HERE)
    store.put(first, {"value": 1}, 0.0)
    whole = path.read_bytes()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 50, before[1]))  # a part of the line has room
    try:
        with pytest.raises(OSError, match=r"results\.jsonl"):
            store.put(second, {"value": 2}, 0.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == whole
    assert store.get(second) is None
    store.put(second, {"value": 2}, 0.0)
    again = Store(path, environment=HERE)
    assert [again.get(cell)[0]["value"] for cell in (first, second)] == [1, 2]
    assert again.warnings == []


def test_other_machines_and_other_code_do_not_answer(tmp_path, monkeypatch):
    path = tmp_path / "results.jsonl"
    (cell,) = cells(1)
    Store(path, environment=HERE).put(cell, {"value": 1}, 0.0)
    assert Store(path, environment={"machine": "elsewhere"}).get(cell) is None
    monkeypatch.setattr(store_module, "code_fingerprint", lambda task: "edited")
    assert Store(path, environment=HERE).get(cell) is None


def test_without_reuse_nothing_is_read_and_the_later_result_counts(tmp_path):
    path = tmp_path / "results.jsonl"
    (cell,) = cells(1)
    Store(path, environment=HERE).put(cell, {"value": 1}, 0.0)
    fresh = Store(path, reuse=False, environment=HERE)
    assert fresh.get(cell) is None
    fresh.put(cell, {"value": 2}, 0.0)
    assert Store(path, environment=HERE).get(cell)[0] == {"value": 2}


def test_a_result_that_is_not_a_number_is_refused_and_leaves_no_line(tmp_path):
    path = tmp_path / "results.jsonl"
    (cell,) = cells(1)
    store = Store(path, environment=HERE)
    with pytest.raises(ValueError, match="JSON"):
        store.put(cell, {"value": float("nan")}, 0.0)
    assert all(json.loads(line) for line in path.read_text().splitlines())


def _run_until_killed(path):
    run(cells(4, slow), Store(path, environment=HERE), jobs=1)


def test_a_killed_run_goes_on_and_loses_the_cell_in_hand_only(tmp_path, monkeypatch):
    path = tmp_path / "results.jsonl"
    process = multiprocessing.get_context("spawn").Process(target=_run_until_killed, args=(path,))
    process.start()
    while not path.exists() or path.read_text().count("result") < 2:
        assert process.is_alive()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    outcome = run(cells(4, slow), Store(path, environment=HERE), jobs=1)
    assert outcome.reused == 2
    assert [outcome.results[cell.key]["value"] for cell in cells(4, slow)] == [0, 1, 2, 3]


def test_what_was_asked_for_is_remembered(tmp_path):
    path = tmp_path / "results.jsonl"
    store = Store(path, environment=HERE)
    assert store.order is None
    store.remember({"claims": ["convergence"]})
    store.remember({"claims": ["convergence"]})
    assert path.read_text().count("order") == 1
    store.remember({"claims": ["gradients"]})
    assert Store(path, environment=HERE).order == {"claims": ["gradients"]}


MODULE = """
LIMIT = 3
OTHER = 4
def helper(x):
    return x + LIMIT
def task(*, seed):
    return {"value": helper(seed)}
def read(results):
    return OTHER
"""


@pytest.mark.parametrize(
    ("before", "after", "same"),
    [
        ("return OTHER", "return OTHER + 1", True),
        ("OTHER = 4", "OTHER = 5", True),
        ("LIMIT = 3", "LIMIT = 4", False),
        ("x + LIMIT", "x - LIMIT", False),
        ('{"value": helper(seed)}', '{"values": helper(seed)}', False),
        ("def helper(x):", "# a remark\ndef helper(x):", True),
    ],
)
def test_a_result_is_stale_when_what_its_task_uses_was_edited_and_only_then(tmp_path, monkeypatch, before, after, same):
    monkeypatch.syspath_prepend(str(tmp_path))
    kept = []
    for text in (MODULE, MODULE.replace(before, after)):
        assert before in MODULE
        (tmp_path / "some_claim.py").write_text(text)
        sys.modules.pop("some_claim", None)
        importlib.invalidate_caches()
        kept.append(source_used(importlib.import_module("some_claim").task))
    assert (kept[0] == kept[1]) == same


def test_what_makes_no_result_stale_exists() -> None:
    package = Path(keelnorm.__file__).parent
    assert [name for name in NOT_MEASURED if not (package / name).exists()] == []
