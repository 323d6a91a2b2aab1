"""A variational autoencoder and a GAN, their training, and how they are judged."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import keelnorm as kn
from keelnorm.lab.core.cell import Result
from keelnorm.lab.core.seeds import generator, seed_from
from keelnorm.lab.data import Split, images
from keelnorm.lab.training.frechet import frechet_distance
from keelnorm.lab.training.train import batches

BATCH = 64
LATENT, HIDDEN = 16, 128
VAE_LAYERS = (2, 5)
VAE_RATES = (0.001, 0.003)
GAN_RATE = 5e-4


# name: (label, style, in the generator, in the discriminator, what shares the discriminator's batch)
GANS: dict[str, tuple[str, str, str, str, str]] = {
    "none": ("no normalization", "none", "none", "none", "separate"),
    "G": ("in the generator", "bn", "bn", "none", "separate"),
    "G, D separate": ("in both; real and fake in batches of their own", "other-1", "bn", "bn", "separate"),
    "G, D mixed": ("in both; real and fake in one batch", "other-2", "bn", "bn", "mixed"),
    "G, D skip": ("in both but D's first layer; batches of their own", "other-3", "bn", "skip", "separate"),
    "G, D virtual": ("in G; virtual batch norm in D, reference of both", "renorm", "bn", "virtual", "separate"),
}


def stacked_layers(sizes: Sequence[int], normalization: str, *, leaky: bool = False) -> list[nn.Module]:
    """Linear layers with ReLU (or leaky ReLU), normalized ahead of it.

    `normalization` is "none", "bn", "skip" (batch norm, but not in the first layer) or "virtual".
    """
    modules: list[nn.Module] = []
    for place, (into, out) in enumerate(pairwise(sizes)):
        normal = normalization != "none" and not (normalization == "skip" and place == 0)
        modules.append(nn.Linear(into, out, bias=not normal))
        if normal:
            modules.append(kn.VirtualBatchNorm(out) if normalization == "virtual" else kn.BatchNorm1d(out))
        modules.append(nn.LeakyReLU(0.2) if leaky else nn.ReLU())
    return modules


class VAE(nn.Module):
    """A variational autoencoder of binary pixels: layers on either side of a normal latent."""

    def __init__(self, features: int, layers: int, normalization: str) -> None:
        super().__init__()
        hidden = [HIDDEN] * layers
        self.encoder = kn.Sequential(*stacked_layers([features, *hidden], normalization), nn.Linear(HIDDEN, 2 * LATENT))
        self.decoder = kn.Sequential(*stacked_layers([LATENT, *hidden], normalization), nn.Linear(HIDDEN, features))

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        """The negative evidence lower bound of each sample, in nats, with one draw of the latent."""
        mean_, log_var = self.encoder(x).chunk(2, dim=1)
        logits = self.decoder(mean_ + (0.5 * log_var).exp() * noise)
        reconstruction = F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(dim=1)
        divergence = 0.5 * (log_var.exp() + mean_.square() - 1 - log_var).sum(dim=1)
        total: Tensor = reconstruction + divergence
        return total


def vae(*, data: str, arm: str, layers: int, seed: int, rate: float, steps: int) -> Result:
    """Train a VAE with Adam; its negative ELBO on validation and test data, in nats an image."""
    split = images(data, seed, centered=False)
    train = split.train_x.flatten(1)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed_from(draw="initialization", data=data, layers=layers, seed=seed))
        model = VAE(train.shape[1], layers, arm)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    noise = generator(draw="latent", data=data, seed=seed)
    for chosen in batches(len(train), BATCH, steps, generator(draw="order", data=data, seed=seed)):
        optimizer.zero_grad()
        model(train[chosen], torch.randn(BATCH, LATENT, generator=noise)).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 100.0)
        optimizer.step()
    model.eval()
    held_out = generator(draw="latent of evaluation", data=data, seed=seed)
    scores = {}
    with torch.no_grad():
        for part, x in (("validation", split.validation_x.flatten(1)), ("test", split.test_x.flatten(1))):
            draws = [model(x, torch.randn(len(x), LATENT, generator=held_out)).mean() for _ in range(4)]
            scores[part] = round(torch.stack(draws).mean().item(), 4)
    return dict(scores)


@cache
def feature_network(data: str, seed: int) -> nn.Sequential:
    """A classifier up to its last hidden layer, trained on real images; its features judge generated ones."""
    split = images(data, seed, centered=False)
    x = split.train_x.flatten(1)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed_from(draw="judge", data=data, seed=seed))
        features = nn.Sequential(nn.Linear(x.shape[1], 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
        classifier = nn.Sequential(*features, nn.Linear(32, split.classes))
    optimizer = torch.optim.Adam(classifier.parameters(), 0.003)
    for chosen in batches(len(x), BATCH, 300, generator(draw="judge's order", data=data, seed=seed)):
        optimizer.zero_grad()
        F.cross_entropy(classifier(x[chosen]), split.train_y[chosen]).backward()
        optimizer.step()
    return features.eval().requires_grad_(False)


def gan(*, data: str, arm: str, seed: int, steps: int) -> Result:
    """Train a GAN, and the Fréchet distance of what it generates from real test images, on a classifier's features.

    Returns:
        distance; real: that between the training and the test images, which is as good as it gets.
    """
    split = images(data, seed, centered=False)
    _, _, in_generator, in_discriminator, batch_of = GANS[arm]
    features = split.train_x[0].numel()
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed_from(draw="initialization", data=data, seed=seed))
        make = kn.Sequential(
            *stacked_layers([LATENT, HIDDEN, HIDDEN], in_generator), nn.Linear(HIDDEN, features), nn.Sigmoid()
        )
        judge = kn.Sequential(
            *stacked_layers([features, HIDDEN, HIDDEN], in_discriminator, leaky=True), nn.Linear(HIDDEN, 1)
        )
    _play(make, judge, split, batch_of, virtual=in_discriminator == "virtual", steps=steps, axes=(data, seed))
    make.eval()
    with torch.no_grad():
        made = make(torch.randn(1000, LATENT, generator=generator(draw="generated", data=data, seed=seed)))
    network = feature_network(data, seed)
    real, train = (network(x.flatten(1)) for x in (torch.cat([split.validation_x, split.test_x]), split.train_x))
    return {
        "distance": float(f"{frechet_distance(network(made), real):.5g}"),
        "real": float(f"{frechet_distance(train, real):.5g}"),
    }


def _play(
    make: nn.Module, judge: nn.Module, split: Split, batch_of: str, *, virtual: bool, steps: int, axes: tuple[str, int]
) -> None:
    """The two take turns, one step of Adam each, with the loss that does not saturate."""
    data, seed = axes
    x = split.train_x.flatten(1)
    optimizers = [torch.optim.Adam(each.parameters(), GAN_RATE, betas=(0.5, 0.999)) for each in (make, judge)]
    noise = generator(draw="latent", data=data, seed=seed)
    ones, zeros = torch.ones(BATCH, 1), torch.zeros(BATCH, 1)
    reference = x[:BATCH]
    loss = F.binary_cross_entropy_with_logits
    for chosen in batches(len(x), BATCH, steps, generator(draw="order", data=data, seed=seed)):
        real = x[chosen]
        fake = make(torch.randn(BATCH, LATENT, generator=noise))
        for turn, optimizer in ((1, optimizers[1]), (0, optimizers[0])):
            own = fake.detach() if turn else fake
            if virtual:  # a reference of both kinds, so that it favours neither
                with kn.collect_reference(judge), torch.no_grad() if not turn else nullcontext():
                    judge(torch.cat([reference, fake.detach()]))
            if batch_of == "mixed":
                on_real, on_fake = judge(torch.cat([real, own])).chunk(2)
            else:
                on_real, on_fake = (judge(real) if turn else zeros), judge(own)
            optimizer.zero_grad()
            (loss(on_real, ones) + loss(on_fake, zeros) if turn else loss(on_fake, ones)).backward()
            optimizer.step()
