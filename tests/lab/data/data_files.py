"""Writers of the formats that a reader's folder may have, and the reader's own folder, for the tests beside."""

from __future__ import annotations

import gzip
import os
import wave
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def write_idx(path: Path, values: np.ndarray, *, packed: bool = False) -> None:
    """An IDX file of unsigned bytes: 0, 0, the type 8, the number of dimensions, each big-endian, then the values."""
    header = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    raw = header + values.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(raw) if packed else raw)


def write_mnist(
    folder: Path, part: str = "t10k", *, count: int = 40, packed: bool = True, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """A pair of files as MNIST's; returns what is in them."""
    draw = np.random.default_rng(seed)
    pictures, labels = draw.integers(0, 256, (count, 28, 28)), np.arange(count) % 10
    end = ".gz" if packed else ""
    write_idx(folder / f"{part}-images-idx3-ubyte{end}", pictures, packed=packed)
    write_idx(folder / f"{part}-labels-idx1-ubyte{end}", labels, packed=packed)
    return pictures, labels


def write_picture(path: Path, colour: tuple[int, int, int], side: int = 32) -> None:
    """A picture of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), colour).save(path)


def write_wav(
    path: Path,
    samples: np.ndarray,
    *,
    rate: int = 8000,
    width: int = 2,
    channels: int = 1,
    frames: int | None = None,
    claimed_rate: int | None = None,
) -> None:
    """A WAV file of samples in [-1, 1), (n,) or (n, channels). `frames` and `claimed_rate` are what the header says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scaled = np.round(samples * 2.0 ** (8 * width - 1)).astype(np.int64)
    scaled = scaled + 128 if width == 1 else scaled
    raw = scaled.astype("<i8").reshape(-1, 1).view(np.uint8)[:, :width].tobytes()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(raw)
    content = bytearray(path.read_bytes())
    if frames is not None:
        content[40:44] = (frames * width * channels).to_bytes(4, "little")
    if claimed_rate is not None:
        content[24:28] = claimed_rate.to_bytes(4, "little")
    path.write_bytes(content)


def tone(hertz: float, rate: int = 8000, seconds: float = 0.3) -> np.ndarray:
    """A sine of half the full scale."""
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)


def write_speech(folder: Path) -> None:
    """Two words by three speakers, six times each."""
    for word, hertz in (("no", 300.0), ("yes", 1500.0)):
        for speaker, pitch in (("ann", 1.0), ("bob", 1.1), ("eve", 0.9)):
            for number in range(6):
                write_wav(folder / f"{word}_{speaker}_{number}.wav", tone(hertz * pitch + number))


def readers_folder(name: str) -> Path:
    """The folder with real data; skips where there is none, or it has no such data in it."""
    folder = os.environ.get("KEELNORM_DATA_DIR")
    if not folder or not (Path(folder) / name).is_dir():
        pytest.skip(f"KEELNORM_DATA_DIR names no folder with {name}/ in it")
    return Path(folder)
