"""Does batch normalization carry over to a speaker that training has not heard? And does adapting its moments help?

A convolutional network over time learns to tell spoken words apart from log-mel spectrograms. Each speaker in turn is
held out; the network is tested on that speaker as it is, and after `kn.adapt` has set its running statistics to those
of the speaker's recordings, without their words. What is printed is the test accuracy: the mean over speakers, and of
the differences, speaker by speaker, each with its 95 % interval.

    python examples/speech.py recordings/        WAV files named {word}_{speaker}_{number}.wav, or
                                                 {speaker}_nohash_{number}.wav in a folder for each word, such as the
                                                 Free Spoken Digit Dataset
    python examples/speech.py                    without recordings: digits read as spectra, in place of speech
    python examples/speech.py --quick            less than 20 seconds; too short to say anything about training
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import keelnorm as kn
from keelnorm.lab.core.seeds import generator, seed_from
from keelnorm.lab.data import DataError, Recordings, Split, discover, spoken
from keelnorm.lab.data.data_folder import reading_from
from keelnorm.measure.statistics import difference, mean

CHANNELS, BATCH, RATE = 48, 32, 0.003


def network(bands: int, classes: int, *, normalized: bool) -> nn.Sequential:
    """(n, bands, frames) to (n, classes); `kn.Sequential` runs batch norm and ReLU as one kernel."""
    modules: list[nn.Module] = []
    for layer in range(3):
        into = bands if layer == 0 else CHANNELS
        modules.append(nn.Conv1d(into, CHANNELS, 3, stride=1 + layer % 2, padding=1, bias=not normalized))
        modules += [kn.BatchNorm1d(CHANNELS)] if normalized else []
        modules.append(nn.ReLU())
    return kn.Sequential(*modules, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(CHANNELS, classes))


def train(split: Split, steps: int, seed: int, *, normalized: bool) -> nn.Module:
    torch.manual_seed(seed_from(example="speech", draw="weights", seed=seed))
    model = network(split.train_x.shape[1], split.classes, normalized=normalized)
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    draw = generator(example="speech", draw="batches", seed=seed)
    for step in range(steps):
        for group in optimizer.param_groups:  # falls to zero, so that the end is not a matter of luck
            group["lr"] = RATE * (1 - step / steps)
        chosen = torch.randint(len(split.train_y), (BATCH,), generator=draw)
        optimizer.zero_grad()
        F.cross_entropy(model(split.train_x[chosen]), split.train_y[chosen]).backward()
        optimizer.step()
    return model.eval()


def scaled(split: Split) -> Split:
    """Minus the training part's mean, over its standard deviation: one number each, so that speakers still differ."""
    center, width = split.train_x.mean(), split.train_x.std()
    return split.with_inputs(lambda x: (x - center) / width)


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return 100 * (model(x).argmax(1) == y).float().mean().item()


def recordings(folder: Path | None) -> Recordings:
    """The reader's recordings, or the stand-in."""
    if folder is None:
        return spoken("digits")
    found = [identity for identity in discover(folder) if identity.startswith("speech@")]
    if not found:
        raise DataError(f"{folder} has data, but no WAV files of spoken words")
    with reading_from(folder):
        return spoken(found[0])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="where the recordings are; without, the stand-in")
    parser.add_argument("--steps", type=int, default=500, help="training steps (500)")
    parser.add_argument("--quick", action="store_true", help="40 steps, two speakers")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        heard = recordings(given.folder)
    except ValueError as error:
        parser.error(str(error))
    speakers = range(2 if given.quick else len(heard.names))
    steps = 40 if given.quick else given.steps
    kind = "digits in place of speech" if heard.stand_in else "recordings"
    print(f"{len(heard.y)} {kind}, {len(heard.names)} speakers; accuracy in % on each speaker held out")
    arms: dict[str, list[float]] = {"no normalization": [], "batch norm": [], "batch norm, adapted": []}
    for speaker in speakers:
        split = scaled(heard.held_out(speaker, seed=0))
        models = {name: train(split, steps, speaker, normalized=name == "batch norm") for name in list(arms)[:2]}
        models["batch norm, adapted"], _ = kn.adapt(copy.deepcopy(models["batch norm"]), [split.test_x], progress=False)
        for name, model in models.items():
            arms[name].append(accuracy(model, split.test_x, split.test_y))
        print(
            f"  {heard.names[speaker]:<20}" + "".join(f"{name}: {values[-1]:.1f}   " for name, values in arms.items())
        )
    for name, values in arms.items():
        print(f"  {name:<24}{mean(values).text(1)}")
    for first, second in (("batch norm", "no normalization"), ("batch norm, adapted", "batch norm")):
        print(f"  difference, {first} - {second}: {difference(arms[first], arms[second]).text(1)}")


if __name__ == "__main__":
    main()
