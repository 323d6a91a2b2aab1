"""A run that is stopped or killed at any moment: one line, and no worker that lives on."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

PATIENCE = 60
"""Seconds until a test gives up; what it waits for comes far sooner."""


@contextmanager
def sleeping_run(folder):
    """A run with two workers in a session of its own, in this folder."""
    (folder / "started").mkdir()
    with open(folder / "said", "wb") as said:  # a pipe would stay open as long as any worker lives
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("sleeping.py")), "lab", "run", "--jobs", "2"],
            env=os.environ | {"KEELNORM_TEST_STARTED": str(folder / "started")},
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=said,
            start_new_session=True,
            # Tests in a shell's background have it ignored, and so would what they start.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    try:
        yield process
    finally:
        for left in members(process.pid):
            os.kill(left, signal.SIGKILL)
        process.wait()


def members(session):
    """The processes of a session that live."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            state, _, _, of = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(of) == session and state != "Z":
            found.append(int(entry.name))
    return found


def comes(condition):
    until = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are counted in /proc")


@needs_proc
@pytest.mark.parametrize(("sent", "statuses"), [("SIGINT", (130, -2)), ("SIGTERM", (143,))])
def test_stopped_while_workers_start_it_says_so_in_one_line(tmp_path, sent, statuses):
    with sleeping_run(tmp_path) as process:
        assert comes(lambda: len(members(process.pid)) >= 3)  # the run, what tracks its semaphores, and a worker
        assert not any((tmp_path / "started").iterdir())
        # A terminal sends it to all of them, and a supervisor to the run alone.
        (os.killpg if sent == "SIGINT" else os.kill)(process.pid, getattr(signal, sent))
        # Python ends by the signal where code that was made from text, as that of a dataclass, was interrupted.
        assert process.wait(PATIENCE) in statuses
        assert comes(lambda: not members(process.pid))
    said = (tmp_path / "said").read_text()  # beside the bar, and what loky may say of semaphores it takes down
    assert said.count("stopped; what was measured is kept in keelnorm-lab.jsonl, and the same command goes on\n") == 1
    assert "Traceback" not in said


@needs_proc
def test_workers_end_with_a_run_that_is_killed(tmp_path):
    with sleeping_run(tmp_path) as process:
        assert comes(lambda: len(list((tmp_path / "started").iterdir())) == 2)
        process.kill()
        process.wait()
        assert comes(lambda: not members(process.pid))
