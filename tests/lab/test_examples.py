"""The laboratory's examples run, at a size that is only big enough to run."""

from __future__ import annotations

import os
import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
DATA = os.environ.get("KEELNORM_DATA_DIR")


def run(name: str, *arguments: str) -> None:
    runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](list(arguments))


def numbers(said: str, pattern: str) -> list[float]:
    return [float(found) for found in re.findall(pattern, said, re.MULTILINE)]


def test_generative(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "samples.pgm"
    run("generative", "--quick", "--seeds", "2", "--out", str(picture))
    said = capsys.readouterr().out
    scores = numbers(said, r"^  \w.*?  +(\d+\.\d\d) \[")
    assert len(scores) == 6
    assert all(10 < score < 60 for score in scores[:2])  # 44 nats for pixels of probability 1/2
    assert len(numbers(said, r"difference (-?\d+\.\d\d) \[")) == 4
    header, pixels = picture.read_bytes().split(b" 255\n")
    assert header == b"P5 80 40"
    assert len(pixels) == 80 * 40


def test_speech_on_the_stand_in(capsys: pytest.CaptureFixture[str]) -> None:
    run("speech", "--quick")
    said = capsys.readouterr().out
    assert "digits in place of speech" in said
    assert len(numbers(said, r"^  difference, .*: (-?\d+\.\d) \[")) == 2


@pytest.mark.skipif(DATA is None, reason="KEELNORM_DATA_DIR names no folder with recordings")
def test_speech_on_recordings(capsys: pytest.CaptureFixture[str]) -> None:
    run("speech", str(DATA), "--quick")
    said = capsys.readouterr().out
    assert "600 recordings, 6 speakers" in said
    assert "george" in said


def test_speech_without_recordings_says_what_is_meant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run("speech", str(tmp_path))
    assert ended.value.code == 2
    assert "WAV files of spoken words" in capsys.readouterr().err


@pytest.mark.parametrize("layer", [[], ["--plain"]])
def test_text(layer: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(10):
        (tmp_path / f"{number}.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    run("text", str(tmp_path), "--steps", "100", "--hidden", "16", *layer)
    said = capsys.readouterr().out
    (test,) = numbers(said, r"^test: (\d+\.\d+) bits per character$")
    assert test < 4.8  # log2(27): what a model without any idea of the text would need
    assert said.count("\ndef ") == 1


def test_text_of_too_few_files_says_how_many(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "one.txt").write_text("text")
    with pytest.raises(SystemExit):
        run("text", str(tmp_path))
    assert "at least ten" in capsys.readouterr().err
