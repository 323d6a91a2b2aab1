"""Does batch normalization help generative models?

A variational autoencoder, and a GAN with batch norm in several places.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from keelnorm.lab.claims._generative_training import (
    BATCH,
    GAN_RATE,
    GANS,
    HIDDEN,
    LATENT,
    VAE_LAYERS,
    VAE_RATES,
    gan,
    vae,
)
from keelnorm.lab.core.cell import Cell, Results
from keelnorm.lab.core.claim import Claim, Reading, Source
from keelnorm.lab.core.plan import ByForm, Plan, Seeds, seeds_text
from keelnorm.lab.reading.best_rates import best_rate
from keelnorm.lab.reading.results_by_arm import Runs
from keelnorm.lab.reading.series import boxes
from keelnorm.lab.reading.verdicts import Finding, difference_finding, ratio_finding
from keelnorm.lab.reading.wording import signed, times, where_text
from keelnorm.measure.page_parts import Axis, Figure, Table
from keelnorm.measure.statistics import Interval, geometric_mean, mean, ratio

NAMES = {"none": "no normalization", "bn": "batch norm"}
CHOSEN_GANS = ByForm(quick=("none", "G", "G, D separate", "G, D mixed"), full=tuple(GANS))
GAN_STEPS = ByForm(quick=150, full=700)
GAN_SEEDS = Seeds(quick=3, full=5)
TRIED_VAE_RATES = ByForm(quick=VAE_RATES[1:], full=VAE_RATES)
VAE_STEPS = ByForm(quick=100, full=500)
VAE_SEEDS = Seeds(quick=3, full=6)


def _sets(plan: Plan) -> list[str]:
    return plan.data_sets("digits", *([] if plan.quick else ["mnist"]))


def _vae_cells(plan: Plan, data: str) -> list[Cell]:
    steps = VAE_STEPS.of(plan)
    return [
        Cell(
            vae,
            {"data": data, "arm": arm, "layers": layers, "seed": seed, "rate": rate, "steps": steps},
            cost=steps * layers * 6e-4,
        )
        for layers in VAE_LAYERS
        for seed in VAE_SEEDS.of(plan)
        for arm in NAMES
        for rate in TRIED_VAE_RATES.of(plan)
    ]


def _gan_cells(plan: Plan, data: str) -> list[Cell]:
    steps = GAN_STEPS.of(plan)
    return [
        Cell(gan, {"data": data, "arm": arm, "seed": seed, "steps": steps}, cost=steps * 3e-3)
        for seed in GAN_SEEDS.of(plan)
        for arm in CHOSEN_GANS.of(plan)
    ]


@dataclass
class Parts:
    """Words, findings and rows of one kind of model on one data set."""

    words: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)


def read(plan: Plan, results: Results) -> Reading:
    """What batch norm changes in a VAE's bound, and in a GAN's distance from real images."""
    findings, figures, rows, words = [], [], [], []
    for data in _sets(plan):
        where = where_text(data)
        vaes = _vae_parts(plan, where, Runs(_vae_cells(plan, data), results, arms=("arm", "rate"), where=("layers",)))
        gans = Runs(_gan_cells(plan, data), results)
        distance = {name: [run["distance"] for run in gans.of(name)] for name in CHOSEN_GANS.of(plan)}
        real = geometric_mean([run["real"] for run in gans.of("none")])
        findings += [*vaes.findings, *_gan_findings(where, distance)]
        words += [*vaes.words, _gan_words(where, distance)]
        rows += vaes.rows
        rows += [[f"{where}, GAN", GANS[name][0], geometric_mean(each).text(None)] for name, each in distance.items()]
        rows.append([f"{where}, GAN", "training images against test images", real.text(None)])
        figures.append(_gan_figure(where, distance, real))
    return Reading(
        f"With batch norm {'; '.join(words)}.",
        findings,
        figures,
        [Table("Negative ELBO in nats, and Fréchet distance; smaller is better", ["where", "arm", "result"], rows)],
        setup=_setup(plan),
        notes=[
            "With batches of their own a discriminator tells real from fake by the batch, not by the image: its "
            "normalized values say how an image stands in its batch, and what is common to all of a batch is lost."
        ],
    )


def _vae_parts(plan: Plan, where: str, runs: Runs) -> Parts:
    parts = Parts()
    for layers in VAE_LAYERS:
        test = {}
        for arm, label in NAMES.items():
            tried = {rate: runs.of((arm, rate), layers) for rate in TRIED_VAE_RATES.of(plan)}
            rate = best_rate(tried, lambda run: run["validation"], lower_is_better=True)
            test[arm] = [run["test"] for run in tried[rate]]
            result = f"{mean(test[arm]).text(2)} nats (rate {rate:g})"
            parts.rows.append([f"{where}, VAE, {layers} layers on either side", label, result])
        gain = difference_finding(
            "negative ELBO of a VAE, none − batch norm",
            f"{where}, {layers} layers",
            test["none"],
            test["bn"],
            unit="nats",
            digits=2,
        )
        parts.findings.append(gain)
        in_nats = signed(gain.effect, 2).replace("points", "nats")
        parts.words.append(f"a VAE of {layers} layers on either side gains {in_nats}")
    return parts


def _gan_findings(where: str, distance: dict[str, list[float]]) -> list[Finding]:
    asides = {"G, D mixed": "one mixed batch in D", "G, D virtual": "virtual batch norm in D"}
    own = distance["G, D separate"]
    return [
        ratio_finding(
            "Fréchet distance of a GAN, without batch norm ÷ with it in G",
            where,
            ratio(distance["none"], distance["G"]),
        ),
        ratio_finding(
            "Fréchet distance of a GAN, batch norm in G over in G and D (batches of their own)",
            where,
            ratio(distance["G"], own),
        ),
        *(
            ratio_finding(
                f"the remedy: batches of their own over {words}", where, ratio(own, distance[name]), decisive=False
            )
            for name, words in asides.items()
            if name in distance
        ),
    ]


def _gan_words(where: str, distance: dict[str, list[float]]) -> str:
    better = ratio(distance["none"], distance["G"])
    typical = {name: f"{geometric_mean(values).value:.1f}" for name, values in distance.items()}
    return (
        f"a GAN's distance from real images is {times(better, 'smaller', 'larger', 'not clearly different')} "
        f"with batch norm in the generator, {typical['G']} against {typical['G, D separate']} when the discriminator "
        f"has it too and sees real and fake in batches of their own, {typical['G, D mixed']} when it sees them "
        f"in one ({where})"
    )


def _gan_figure(where: str, distance: dict[str, list[float]], real: Interval) -> Figure:
    said = "; ".join(f"{GANS[name][0]}: {geometric_mean(each).value:.1f}" for name, each in distance.items())
    return Figure(
        f"Fréchet distance of a GAN by where its batch norm stands: {where}",
        Axis("place", categories=[GANS[name][0] for name in distance]),
        Axis("Fréchet distance from real images", scale="log"),
        [boxes("seeds", "bn", list(distance.values()))],
        "Fréchet distance of generated from real images on a classifier's features, a box over the seeds; "
        f"smaller is better. {said}. Training images are at {real.value:.2f}.",
        kind="boxes",
        reference=(real.value, "training images"),
    )


def _setup(plan: Plan) -> dict[str, str]:
    return {
        "Data": "images with values from 0 to 1, as they come",
        "VAE": f"fully connected, 2 or 5 layers of {HIDDEN} on either side of {LATENT} latent numbers, pixels as "
        f"probabilities; Adam, {VAE_STEPS.of(plan)} steps of {BATCH}, the rate with the best validation score of "
        f"{', '.join(f'{rate:g}' for rate in TRIED_VAE_RATES.of(plan))}; test data in evaluation mode",
        "GAN": f"fully connected, two layers of {HIDDEN} on either side, leaky ReLU in the discriminator; Adam at "
        f"{GAN_RATE:g} with β₁ = 0.5, {GAN_STEPS.of(plan)} steps of {BATCH}; the same in all arms",
        "Fréchet distance": "between 1,000 generated and the held-out real images, on the 32 features of a classifier "
        "that was trained on real ones",
        "Virtual": "kn.VirtualBatchNorm, whose reference batch is half real, half generated",
        "Seeds": seeds_text(GAN_SEEDS.of(plan)),
    }


CLAIM: Claim = Claim(
    number=16,
    title="Generative models",
    statement="Batch normalization helps generative models.",
    question="Do a VAE and a GAN get better with batch norm, and where must it stand?",
    literature="Radford, Metz and Chintala put batch norm into both networks of their GAN, but not at the generator's "
    "output nor the discriminator's input, because there it made training oscillate. Salimans et al. propose virtual "
    "batch norm, since otherwise an output depends on the others of its batch. Later GANs mostly leave it out of the "
    "discriminator (Miyato et al. 2018).",
    sources=[
        Source("Radford, Metz, Chintala 2016: DCGAN, section 3", "https://arxiv.org/abs/1511.06434"),
        Source(
            "Salimans et al. 2016: Improved techniques for training GANs, section 3.5",
            "https://arxiv.org/abs/1606.03498",
        ),
        Source("Miyato, Kataoka, Koyama, Yoshida 2018: spectral normalization", "https://arxiv.org/abs/1802.05957"),
        Source("Heusel et al. 2017: the Fréchet inception distance", "https://arxiv.org/abs/1706.08500"),
    ],
    criterion="Holds if a VAE's negative ELBO is lower with batch norm at both depths, a GAN's Fréchet distance is "
    "lower with batch norm in its generator than without, and "
    "lower still with batch norm in the discriminator too; depends if some of these hold.",
    data=("digits", "mnist"),
    cells=lambda plan: [cell for data in _sets(plan) for cell in (*_vae_cells(plan, data), *_gan_cells(plan, data))],
    read=read,
)
