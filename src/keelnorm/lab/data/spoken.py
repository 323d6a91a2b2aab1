"""Spoken words by several speakers: the reader's WAV files, or a stand-in made of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from keelnorm.lab.core.plan import kind_of
from keelnorm.lab.core.seeds import generator
from keelnorm.lab.core.threads import one_thread
from keelnorm.lab.data.data_error import DataError
from keelnorm.lab.data.data_folder import files_of
from keelnorm.lab.data.data_split import Split, split
from keelnorm.lab.data.images import all_images
from keelnorm.lab.data.wav import log_mel, read_wav, recordings_used

GROUPS = 6


@dataclass(frozen=True)
class Recordings:
    """Recordings of words by several speakers.

    Args:
        x: (n, bands, frames), log energies.
        y: (n,), the word's number.
        speakers: (n,), the speaker's number.
        names: the speakers' names.
        stand_in: whether these are images in place of speech.
        data: the data set's identity, an axis of the draws.
    """

    x: Tensor
    y: Tensor
    speakers: Tensor
    names: tuple[str, ...]
    stand_in: bool = False
    data: str = ""

    def at_random(self, seed: int) -> Split:
        """A fifth of the recordings for test and a fifth for validation, all speakers in all parts."""
        part = len(self.y) // 5
        return split(self.x, self.y, data=self.data, seed=seed, validation=part, test=part)

    def held_out(self, speaker: int, seed: int) -> Split:
        """All recordings of one speaker for test; of the others a fifth, drawn by `seed`, for validation.

        Raises:
            ValueError: there is no such speaker, or no other one.
        """
        if not 0 <= speaker < len(self.names) or len(self.names) < 2:
            raise ValueError(f"speaker {speaker} can't be held out; there are {len(self.names)}, numbered from 0")
        out = (self.speakers == speaker).nonzero().flatten()
        others = (self.speakers != speaker).nonzero().flatten()
        draw = generator(draw="split", data=self.data, seed=seed, speaker=speaker)
        others = others[torch.randperm(len(others), generator=draw)]
        validation, train = others[: len(others) // 5], others[len(others) // 5 :]
        return Split(*(part[chosen] for chosen in (train, validation, out) for part in (self.x, self.y)))


@cache
def spoken(data: str) -> Recordings:
    """The recordings of a data set: "speech@…", or "digits", the stand-in; read once a process.

    The stand-in reads each of scikit-learn's digits as eight frames of eight bands: its rows, from the top. Its
    "speakers" are six groups of images, equally large, by the thickness of their strokes: an image's mean ink minus
    that of its class. What it shares with speech is a sequence of frames, and a group that training
    has not seen.

    Raises:
        DataError: the files are missing, or one of them can't be read.
    """
    return _stand_in() if kind_of(data) == "digits" else read_recordings(files_of(data), data)


def read_recordings(files: Sequence[Path], data: str = "") -> Recordings:
    """Log-mel spectrograms of WAV files, which say word and speaker by their names or their folders.

    Of a large collection the first 10 words by name are read, the 20 speakers with most recordings of these, and 50
    recordings of each word by each speaker.

    Raises:
        DataError: one can't be read, or all have the same word.
    """
    named = recordings_used(files)
    words, speakers = (sorted(set(each)) for each in zip(*named.values(), strict=True))
    if len(words) < 2:
        raise DataError(f"the WAV files in {files[0].parent} all have the word {words[0]!r}; two or more are needed")
    with one_thread():  # for so small transforms more threads cost more than they save
        x = torch.stack([log_mel(*read_wav(path)) for path in named])
    y = torch.tensor([words.index(word) for word, _ in named.values()])
    by = torch.tensor([speakers.index(speaker) for _, speaker in named.values()])
    return Recordings(x, y, by, tuple(speakers), data=data)


def speakers_of(data: str) -> int:
    """How many speakers a data set has; its identity says so, nothing is read."""
    return GROUPS if kind_of(data) == "digits" else int(data.rpartition(".")[2])


def _stand_in() -> Recordings:
    pictures, y = all_images("digits")
    ink = pictures.flatten(1).mean(dim=1)
    by_class = torch.stack([ink[y == label].mean() for label in range(int(y.max()) + 1)])
    thickness = ink - by_class[y]
    edges = torch.quantile(thickness, torch.linspace(0, 1, GROUPS + 1)[1:-1])
    names = tuple(f"strokes {place + 1} of {GROUPS}" for place in range(GROUPS))
    frames = pictures.squeeze(1).transpose(1, 2)  # rows as frames, columns as bands
    return Recordings(frames, y, torch.bucketize(thickness, edges), names, stand_in=True, data="digits")
