"""Freed memory is reused while asked for: counted in page faults, never in time."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings

import pytest

import keelnorm as kn
from keelnorm import memory

possible = pytest.mark.skipif(memory.obstacle() is not None, reason=f"not here: {memory.obstacle()}")

COUNT = """
import resource, torch, keelnorm as kn

def faults(elements):
    for index in range(15):
        if index == 10:  # reuse begins after seven allocations, see reuse_memory
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(elements)[: 16 << 20].fill_(1.0)  # 64 MB are touched
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

counts = [faults(16 << 20)]
with kn.reuse_memory():
    counts.append(faults(16 << 20))
counts.append(faults(256 << 20))  # too large for what the heap has free: mapped, unless the thresholds stayed
print(*counts)
"""


@possible
def test_page_faults_fall_and_come_back() -> None:
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    fresh, reused, after = map(int, done.stdout.split())
    assert fresh > 10 * max(1, reused)
    assert after > 10 * max(1, reused)


class Recorder:
    """A C library that writes down what it is asked for."""

    def __init__(self, refused: tuple[int, ...] = ()) -> None:
        self.calls: list[tuple[int, ...]] = []
        self.refused = refused

    def mallopt(self, name: int, value: int) -> int:
        self.calls.append((name, value))
        return int(name not in self.refused)

    def malloc_trim(self, pad: int) -> int:
        self.calls.append((pad,))
        return 1


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder()
    monkeypatch.setattr(memory, "obstacle", lambda: None)
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: made)
    return made


def test_the_outermost_counts(library: Recorder) -> None:
    with kn.reuse_memory() as outer:
        raised = list(library.calls)
        assert raised == [(memory.M_MMAP_THRESHOLD, memory.LARGEST_INT), (memory.M_TRIM_THRESHOLD, memory.NEVER)]
        with kn.reuse_memory() as inner:
            assert outer.active
            assert inner.active
        assert not inner.active
        assert library.calls == raised
        inner.undo()
        assert library.calls == raised
    assert (memory.M_MMAP_THRESHOLD, 32 << 20) in library.calls
    assert (memory.M_TRIM_THRESHOLD, 64 << 20) in library.calls
    assert library.calls[-1] == (0,)


def test_it_is_undone_after_an_exception(library: Recorder) -> None:
    with pytest.raises(KeyError), kn.reuse_memory():
        raise KeyError
    assert library.calls[-1] == (0,)


def test_an_older_library_forbids_mappings_altogether(library: Recorder) -> None:
    library.refused = (memory.M_MMAP_THRESHOLD,)
    with kn.reuse_memory() as reuse:
        assert reuse.active
        assert (memory.M_MMAP_MAX, 0) in library.calls
    assert (memory.M_MMAP_MAX, memory.MMAP_MAX) in library.calls


def test_it_is_announced(library: Recorder, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "keelnorm"), kn.reuse_memory() as reuse:
        assert reuse.reason in caplog.text
    assert "goes back" in caplog.text


def test_where_it_cannot_be_had_it_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_warned", False)
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    monkeypatch.setattr(memory, "_owner_of_allocations", lambda _: "libc.so.6")
    why = memory.obstacle()
    assert why
    with pytest.warns(RuntimeWarning, match="is not reused"):
        reuse = kn.reuse_memory()
    assert (reuse.active, reuse.reason) == (False, why)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kn.reuse_memory().undo()


@possible
def test_another_allocator_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_owner_of_allocations", lambda _: "libjemalloc.so.2")
    assert "libjemalloc.so.2" in (memory.obstacle() or "")
