"""A character-level language model with a batch-normalized LSTM, to start from.

It trains on the source code of Python's standard library, or on a folder of text files of yours; files are held out
for validation and test. What is printed: bits per character on the validation part along the way, on the test part at
the end, and a few lines that the model writes. In evaluation each step has the running statistics of its place in the
window.

    python examples/text.py                 some minutes on one core
    python examples/text.py notes/          on the .txt, .md, .py and .rst files of a folder, at least ten of them
    python examples/text.py --plain         torch.nn.LSTM in its place, for comparison
    python examples/text.py --quick         less than 20 seconds; too short to learn more than frequencies
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keelnorm.lab.data.text import ASCII, characters, divided
from keelnorm.nn.recurrent.recurrent_layers import BatchNormLSTM

WINDOW, BATCH, RATE = 50, 32, 0.01
SUFFIXES = (".txt", ".md", ".py", ".rst")


class LanguageModel(nn.Module):
    """Characters (n, length) to logits of the next ones (n, length, 128)."""

    def __init__(self, hidden: int, *, plain: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(ASCII, 32)
        if plain:
            self.recurrent: nn.Module = nn.LSTM(32, hidden, batch_first=True)
        else:
            self.recurrent = BatchNormLSTM(32, hidden, batch_first=True, max_length=WINDOW)
        self.head = nn.Linear(hidden, ASCII)

    def forward(self, codes: Tensor) -> Tensor:
        return self.head(self.recurrent(self.embed(codes))[0])


def windows(text: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Windows of characters, and the characters one further on."""
    taken = text[starts[:, None] + torch.arange(WINDOW + 1)].long()
    return taken[:, :-1], taken[:, 1:]


@torch.no_grad()
def bits(model: nn.Module, text: Tensor) -> float:
    """Bits per character over windows that are spread evenly over a text."""
    model.eval()
    x, y = windows(text, torch.linspace(0, len(text) - WINDOW - 1, 300).long())
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten()).item() / math.log(2)


@torch.no_grad()
def write(model: nn.Module, beginning: str, count: int, temperature: float = 0.7) -> str:
    """Let the model continue a text: each character from the last ones, as many as a window has."""
    model.eval()
    codes = [min(ord(character), ASCII - 1) for character in beginning]
    for _ in range(count):
        # The state begins at zero in every window, as in training: a step's moments belong to its place there.
        logits = model(torch.tensor([codes[-WINDOW:]]))[0, -1] / temperature
        codes.append(int(torch.multinomial(logits.softmax(0), 1)))
    text = "".join(map(chr, codes))
    return "".join(character if character.isprintable() or character == "\n" else "·" for character in text)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="of text files; without, Python's standard library")
    parser.add_argument("--steps", type=int, default=600, help="training steps (600)")
    parser.add_argument("--hidden", type=int, default=128, help="units (128)")
    parser.add_argument("--plain", action="store_true", help="torch.nn.LSTM")
    parser.add_argument("--quick", action="store_true", help="30 steps, 32 units")
    given = parser.parse_args(arguments)
    if given.steps < 1 or given.hidden < 1:
        parser.error("--steps and --hidden must be 1 or more")
    torch.set_num_threads(1)  # the steps are small and one after the other
    steps, hidden = (30, 32) if given.quick else (given.steps, given.hidden)
    try:
        if given.folder is None:
            train, validation, test = characters()
        else:
            files = [path for path in sorted(given.folder.rglob("*")) if path.suffix in SUFFIXES]
            train, validation, test = divided(files)
    except ValueError as error:
        parser.error(str(error))
    if min(map(len, (train, validation, test))) <= WINDOW + 1:
        parser.error(f"each part needs more than {WINDOW + 1} characters")
    torch.manual_seed(0)
    model = LanguageModel(hidden, plain=given.plain)
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    print(f"{len(train):,} characters to train on, {len(validation):,} and {len(test):,} held out")
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:  # falls to zero, so that the end is not a matter of luck
            group["lr"] = RATE * (1 - (step - 1) / steps)
        x, y = windows(train, torch.randint(len(train) - WINDOW, (BATCH,)))
        optimizer.zero_grad()
        F.cross_entropy(model.train()(x).flatten(0, 1), y.flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % max(1, steps // 5) == 0:
            print(f"step {step}: {bits(model, validation):.3f} bits per character on the validation part", flush=True)
    print(f"test: {bits(model, test):.3f} bits per character")
    print("---")
    print(write(model, "def ", 40 if given.quick else 200))


if __name__ == "__main__":
    main()
