"""Where does batch normalization stand in a generative model? A VAE and a GAN on handwritten digits, to start from.

The VAE has batch norm in encoder and decoder. The GAN has it in the generator; its discriminator has none, batch norm
that sees real and fake images in batches of their own (which fails), batch norm that sees both in one batch, or
virtual batch norm, which does not depend on the batch. What is printed is measured on test images: the VAE's
negative evidence lower bound in nats, and the Fréchet distance of the GAN's images from real ones on a classifier's
features; lower is better. Mean over seeds, with 95 % intervals. Samples are written as a picture that any viewer opens
(PGM).

    python examples/generative.py            some minutes on one core
    python examples/generative.py --quick    less than 20 seconds; too short to say anything about training
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import keelnorm as kn
from keelnorm.lab.core.seeds import generator, seed_from
from keelnorm.lab.data import Split, digits
from keelnorm.lab.training.frechet import frechet_distance
from keelnorm.measure.statistics import difference, mean

PIXELS, SIDE, LATENT, HIDDEN, BATCH = 64, 8, 16, 128, 64
DISCRIMINATORS = ("none", "separate", "mixed", "virtual")


@dataclass(frozen=True)
class Size:
    """Training steps of the VAE, of the GAN, and of the classifier that judges."""

    vae: int
    gan: int
    classifier: int


FULL, QUICK = Size(600, 1500, 400), Size(40, 40, 100)


def block(into: int, out: int, norm: type[nn.Module] | None, activation: nn.Module) -> Iterator[nn.Module]:
    """A linear layer, its normalization and activation; a bias only where no normalization would take it away."""
    yield nn.Linear(into, out, bias=norm is None)
    if norm is not None:
        yield norm(out)
    yield activation


class VAE(nn.Module):
    """A variational autoencoder of binary pixels."""

    def __init__(self, norm: type[nn.Module] | None) -> None:
        super().__init__()
        self.encode = kn.Sequential(
            *block(PIXELS, HIDDEN, norm, nn.ReLU()),
            *block(HIDDEN, HIDDEN, norm, nn.ReLU()),
            nn.Linear(HIDDEN, 2 * LATENT),
        )
        self.decode = kn.Sequential(
            *block(LATENT, HIDDEN, norm, nn.ReLU()), *block(HIDDEN, HIDDEN, norm, nn.ReLU()), nn.Linear(HIDDEN, PIXELS)
        )

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        """The negative evidence lower bound of each image, with one draw of the latent."""
        center, log_variance = self.encode(x).chunk(2, dim=1)
        logits = self.decode(center + (log_variance / 2).exp() * noise)
        reconstruction = F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(dim=1)
        return reconstruction + (log_variance.exp() + center.square() - 1 - log_variance).sum(dim=1) / 2


def make_generator() -> nn.Sequential:
    """Noise (n, 16) to images (n, 64). No normalization at the output: an image is to have a brightness of its own."""
    norm = kn.BatchNorm1d
    return kn.Sequential(
        *block(LATENT, HIDDEN, norm, nn.ReLU()),
        *block(HIDDEN, HIDDEN, norm, nn.ReLU()),
        nn.Linear(HIDDEN, PIXELS),
        nn.Sigmoid(),
    )


def make_discriminator(kind: str) -> nn.Sequential:
    """Images (n, 64) to one logit each."""
    norm = {"none": None, "virtual": kn.VirtualBatchNorm}.get(kind, kn.BatchNorm1d)
    return kn.Sequential(
        *block(PIXELS, HIDDEN, norm, nn.LeakyReLU(0.2)),
        *block(HIDDEN, HIDDEN, norm, nn.LeakyReLU(0.2)),
        nn.Linear(HIDDEN, 1),
    )


def batches(x: Tensor, steps: int, seed: int) -> Iterator[Tensor]:
    """Batches of images, drawn anew at every step."""
    draw = generator(example="generative", draw="batches", seed=seed)
    for _ in range(steps):
        yield x[torch.randint(len(x), (BATCH,), generator=draw)]


def train_vae(norm: type[nn.Module] | None, x: Tensor, steps: int, seed: int) -> VAE:
    torch.manual_seed(seed_from(example="generative", draw="weights", seed=seed))
    model = VAE(norm)
    optimizer = torch.optim.Adam(model.parameters(), 0.003)
    for batch in batches(x, steps, seed):
        optimizer.zero_grad()
        model(batch, torch.randn(BATCH, LATENT)).mean().backward()
        optimizer.step()
    return model.eval()


def train_gan(kind: str, x: Tensor, steps: int, seed: int) -> nn.Module:
    """The generator after a game with a discriminator of this kind."""
    torch.manual_seed(seed_from(example="generative", draw="weights", seed=seed))
    make, judge = make_generator(), make_discriminator(kind)
    adams = [torch.optim.Adam(model.parameters(), 5e-4, betas=(0.5, 0.999)) for model in (make, judge)]
    ones, zeros = torch.ones(BATCH, 1), torch.zeros(BATCH, 1)
    loss = F.binary_cross_entropy_with_logits
    for real in batches(x, steps, seed):
        fake = make(torch.randn(BATCH, LATENT))
        for adam, images in ((adams[1], fake.detach()), (adams[0], fake)):
            judging = adam is adams[1]
            if (
                kind == "virtual"
            ):  # the reference holds both kinds; its moments follow the weights, so it runs each time
                with kn.collect_reference(judge), nullcontext() if judging else torch.no_grad():
                    judge(torch.cat([x[:BATCH], images.detach()]))
            if kind == "mixed":
                on_real, on_fake = judge(torch.cat([real, images])).chunk(2)
            else:
                on_real, on_fake = (judge(real) if judging else ones), judge(images)
            adam.zero_grad()
            (loss(on_real, ones) + loss(on_fake, zeros) if judging else loss(on_fake, ones)).backward()
            adam.step()
    return make.eval()


def train_features(split: Split, steps: int) -> nn.Sequential:
    """A classifier's layers up to the last hidden one: what the Fréchet distance looks at."""
    torch.manual_seed(seed_from(example="generative", draw="classifier"))
    features = kn.Sequential(nn.Linear(PIXELS, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
    classifier = nn.Sequential(features, nn.Linear(32, 10))
    optimizer = torch.optim.Adam(classifier.parameters(), 0.003)
    x, y = split.train_x.flatten(1), split.train_y
    for step in range(steps):
        chosen = torch.randint(
            len(x), (BATCH,), generator=generator(example="generative", draw="classifier", step=step)
        )
        optimizer.zero_grad()
        F.cross_entropy(classifier(x[chosen]), y[chosen]).backward()
        optimizer.step()
    return features.requires_grad_(False)


def write_samples(path: Path, images: Tensor) -> None:
    """A grid of images (n, 64) in [0, 1] as a grey picture."""
    rows = images.view(-1, 10, SIDE, SIDE).permute(0, 2, 1, 3).reshape(-1, 10 * SIDE)
    grey = (rows * 255).round().to(torch.uint8)
    path.write_bytes(f"P5 {grey.shape[1]} {grey.shape[0]} 255\n".encode() + grey.numpy().tobytes())


def report(label: str, scores: list[float], baseline: list[float]) -> None:
    change = "" if scores is baseline else f"   difference {difference(scores, baseline).text(2)}"
    print(f"  {label:<58}{mean(scores).text(2):<26}{change}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds (5)")
    parser.add_argument("--quick", action="store_true", help="few steps")
    parser.add_argument(
        "--out", type=Path, default=Path("samples.pgm"), help="where samples of the last GAN are written"
    )
    given = parser.parse_args(arguments)
    if given.seeds < 1:
        parser.error("--seeds must be 1 or more")
    torch.set_num_threads(1)
    size = QUICK if given.quick else FULL
    splits = [digits(seed, centered=False) for seed in range(given.seeds)]

    print(f"VAE, negative evidence lower bound in nats; seeds: {given.seeds}")
    bounds: dict[str, list[float]] = {}
    for label, norm in (("no normalization", None), ("batch norm in encoder and decoder", kn.BatchNorm1d)):
        bounds[label] = []
        for seed, split in enumerate(splits):
            model, x = train_vae(norm, split.train_x.flatten(1), size.vae, seed), split.test_x.flatten(1)
            with torch.no_grad():
                bounds[label].append(model(x, torch.randn(len(x), LATENT)).mean().item())
        report(label, bounds[label], bounds["no normalization"])

    print("GAN with batch norm in the generator, Fréchet distance; the discriminator has")
    words = {
        "none": "no normalization", "separate": "batch norm, real and fake in batches of their own",
        "mixed": "batch norm, real and fake in one batch", "virtual": "virtual batch norm",
    }  # fmt: skip
    distances: dict[str, list[float]] = {}
    made = torch.empty(0)
    for kind in DISCRIMINATORS:
        distances[kind] = []
        for seed, split in enumerate(splits):
            make = train_gan(kind, split.train_x.flatten(1), size.gan, seed)
            features = train_features(split, size.classifier)
            with torch.no_grad():
                made = make(torch.randn(1000, LATENT))
                distances[kind].append(frechet_distance(features(made), features(split.test_x.flatten(1))))
        report(words[kind], distances[kind], distances["none"])
    write_samples(given.out, made[:50])
    print(f"samples: {given.out}")


if __name__ == "__main__":
    main()
