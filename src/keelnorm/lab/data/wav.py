"""WAV files of spoken words: word and speaker, samples, and log-mel spectrogram."""

from __future__ import annotations

import math
import re
import wave
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from keelnorm.lab.data.data_error import DataError, too_large

BANDS = 24
FRAMES = 64
SECONDS = 0.064
"""The length of a window; the next one begins a quarter of it later, so that a spectrogram spans 1.07 s."""
MOST_RATE = 768_000
"""The highest sampling rate that is read; none of the usual formats has more."""
HERTZ = (60.0, 3800.0)
FLOOR = 1e-10
"""Added to a band's energy; a sine at full scale has about 0.25."""

MOST_WORDS, MOST_SPEAKERS, MOST_EACH = 10, 20, 50
"""Of a collection: the first words by name, the speakers with most recordings of these, the first of each by both."""

_NAMED = re.compile(r"^(?P<word>[^_]+)_(?P<speaker>[^_]+)_(?P<number>\w+)$")
_IN_FOLDER = re.compile(r"^(?P<speaker>[^_]+)_nohash_\d+$")
_KINDS: dict[int, np.dtype] = {1: np.dtype("u1"), 2: np.dtype("<i2"), 4: np.dtype("<i4")}


def word_and_speaker(path: Path) -> tuple[str, str]:
    """Word and speaker by a file's name: {word}_{speaker}_{number}, or {speaker}_nohash_{number} in the word's folder.

    Raises:
        DataError: it says neither.
    """
    if match := _IN_FOLDER.match(path.stem):
        return path.parent.name, match["speaker"]
    if match := _NAMED.match(path.stem):
        return match["word"], match["speaker"]
    raise DataError(
        f"{path} does not tell word and speaker; name it {{word}}_{{speaker}}_{{number}}.wav, or "
        "{speaker}_nohash_{number}.wav in a folder for each word"
    )


def recordings_used(files: Sequence[Path]) -> dict[Path, tuple[str, str]]:
    """The files of a collection that are read, each with its word and speaker."""
    named = {path: word_and_speaker(path) for path in files}
    words = sorted({word for word, _ in named.values()})[:MOST_WORDS]
    said = Counter(speaker for word, speaker in named.values() if word in words)
    speakers = {speaker for speaker, _ in sorted(said.items(), key=lambda item: (-item[1], item[0]))[:MOST_SPEAKERS]}
    each: Counter[tuple[str, str]] = Counter()
    taken = {}
    for path, (word, speaker) in named.items():
        each[word, speaker] += 1
        if word in words and speaker in speakers and each[word, speaker] <= MOST_EACH:
            taken[path] = word, speaker
    return taken


def read_wav(path: Path) -> tuple[Tensor, int]:
    """The samples in [-1, 1], as many as a spectrogram spans, the mean over channels; and the sampling rate.

    Raises:
        DataError: the file is no WAV file of 8, 16 or 32-bit PCM, is not whole or empty, or is sampled too slowly or
            too often. The header is held against the file's size before anything is read.
    """
    try:
        with open(path, "rb") as stream, wave.open(stream) as file:
            rate, width, channels, count = (
                file.getframerate(),
                file.getsampwidth(),
                file.getnchannels(),
                file.getnframes(),
            )
            there = min(path.stat().st_size - stream.tell(), count * width * channels)  # it stands before the samples
            raw = file.readframes(min(span(rate), there // (width * channels)))
    except (wave.Error, EOFError, OSError) as error:
        raise DataError(
            f"{path} can't be read as a WAV file of PCM samples ({str(error) or 'it ends too early'}); convert it to "
            "16-bit PCM, or remove it"
        ) from None
    if width not in _KINDS:
        raise DataError(f"{path} has {8 * width} bits a sample; 8, 16 and 32 can be read: convert it to 16")
    if there != count * width * channels:
        raise DataError(
            f"{path} says that it has {count} samples of {width * channels} bytes, and has {there} bytes; fetch it "
            "again"
        )
    if not count:
        raise DataError(f"{path} has no samples; remove it")
    if rate < 2 * HERTZ[1]:
        raise DataError(f"{path} has {rate} samples a second; at least {2 * HERTZ[1]:.0f} are needed, such as 8000")
    if rate > MOST_RATE:
        raise too_large(path, f"{rate} samples a second", f"{MOST_RATE} samples a second")
    samples = torch.from_numpy(np.frombuffer(raw, _KINDS[width]).astype(np.float32)).view(-1, channels)
    samples = (samples - 128) / 128 if width == 1 else samples / 2.0 ** (8 * width - 1)
    return samples.mean(dim=1), rate


def span(rate: int) -> int:
    """How many samples a spectrogram covers."""
    size = round(SECONDS * rate)
    return size + size // 4 * (FRAMES - 1)


def log_mel(samples: Tensor, rate: int) -> Tensor:
    """(bands, frames): the logarithm of the energy in bands of equal width in mel, cut or padded to a fixed length.

    The spectrum is divided by the sum of its window, so that the energies don't depend on the sampling rate.
    """
    size = round(SECONDS * rate)
    hop = size // 4
    wanted = span(rate)
    samples = torch.nn.functional.pad(samples[:wanted], (0, max(0, wanted - len(samples))))
    window = torch.hann_window(size)
    spectrum = torch.stft(samples, size, hop, window=window, center=False, return_complex=True) / window.sum()
    return (_mel_filters(size, rate) @ spectrum.abs().square() + FLOOR).log()


@cache
def _mel_filters(size: int, rate: int) -> Tensor:
    """(bands, size // 2 + 1): triangles with their tips evenly spaced on the mel scale 2595·log10(1 + f/700)."""
    low, high = (2595 * math.log10(1 + hertz / 700) for hertz in HERTZ)
    hertz = 700 * (10 ** (torch.linspace(low, high, BANDS + 2) / 2595) - 1)
    bins = torch.arange(size // 2 + 1) * (rate / size)
    rising = (bins - hertz[:-2, None]) / (hertz[1:-1] - hertz[:-2])[:, None]
    falling = (hertz[2:, None] - bins) / (hertz[2:] - hertz[1:-1])[:, None]
    return torch.minimum(rising, falling).clamp(min=0)
