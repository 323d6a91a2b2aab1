"""Does batch normalization help generative models? A variational autoencoder, and a GAN with batch norm in several
places."""

from __future__ import annotations

from collections.abc import Sequence

from keelnorm.lab.claims._generators import BATCH, GAN_RATE, GANS, HIDDEN, LATENT, VAE_LAYERS, VAE_RATES, gan, vae
from keelnorm.lab.core.cell import Cell, Results
from keelnorm.lab.core.claim import Claim, Reading, Source
from keelnorm.lab.core.plan import Plan, seeds_text
from keelnorm.lab.reading.figures import Axis, Figure, Series, Table
from keelnorm.lab.reading.results_by_arm import Runs
from keelnorm.lab.reading.verdicts import Finding
from keelnorm.lab.reading.wording import signed, times
from keelnorm.measure.statistics import difference, geometric_mean, mean, ratio

NAMES = {"none": "no normalization", "bn": "batch norm"}


QUICK_GANS = ("none", "G", "G, D separate", "G, D mixed")


def _vae_cells(plan: Plan, data: str) -> list[Cell]:
    steps = 100 if plan.quick else 500
    return [
        Cell(
            vae,
            {"data": data, "arm": arm, "layers": layers, "seed": seed, "rate": rate, "steps": steps},
            cost=steps * layers * 6e-4,
        )
        for layers in VAE_LAYERS
        for seed in plan.seed_range(quick=3, full=6)
        for arm in NAMES
        for rate in (VAE_RATES[1:] if plan.quick else VAE_RATES)
    ]


def _gan_cells(plan: Plan, data: str) -> list[Cell]:
    steps = 150 if plan.quick else 700
    return [
        Cell(gan, {"data": data, "arm": arm, "seed": seed, "steps": steps}, cost=steps * 3e-3)
        for seed in plan.seed_range(quick=3, full=5)
        for arm in (QUICK_GANS if plan.quick else GANS)
    ]


def _sets(plan: Plan) -> list[str]:
    return plan.sets("digits", *([] if plan.quick else ["mnist"]))


def cells(plan: Plan) -> Sequence[Cell]:
    return [cell for data in _sets(plan) for cell in (*_vae_cells(plan, data), *_gan_cells(plan, data))]


def read(plan: Plan, results: Results) -> Reading:
    findings, figures, rows, words = [], [], [], []
    for data in _sets(plan):
        where = data.partition("@")[0]
        runs = Runs(_vae_cells(plan, data), results, arms=("arm", "rate"), where=("layers",))
        rates = VAE_RATES[1:] if plan.quick else VAE_RATES
        for layers in VAE_LAYERS:
            test = {}
            for arm, label in NAMES.items():
                tried = {rate: runs.of((arm, rate), layers) for rate in rates}
                scores = {rate: mean([r["validation"] for r in each]).value for rate, each in tried.items()}
                rate = min(scores, key=lambda each, found=scores: found[each])  # type: ignore[misc]
                test[arm] = [r["test"] for r in tried[rate]]
                rows.append(
                    [
                        f"{where}, VAE, {layers} layers on either side",
                        label,
                        f"{mean(test[arm]).text(2)} nats (rate {rate:g})",
                    ]
                )
            gain = difference(test["none"], test["bn"])
            findings.append(
                Finding(
                    "negative ELBO of a VAE, none − batch norm",
                    f"{where}, {layers} layers",
                    gain,
                    0.0,
                    unit="nats",
                    digits=2,
                )
            )
            words.append(f"a VAE of {layers} layers on either side gains {signed(gain, 2).replace('points', 'nats')}")
        gans = Runs(_gan_cells(plan, data), results)
        names = [name for name in GANS if not plan.quick or name in QUICK_GANS]
        distance = {name: [r["distance"] for r in gans.of(name)] for name in names}
        real = geometric_mean([r["real"] for r in gans.of("none")])
        better = ratio(distance["none"], distance["G"])
        findings += [
            Finding("Fréchet distance of a GAN, none over batch norm in G", where, better, 1.0, unit="×", digits=2),
            Finding(
                "Fréchet distance of a GAN, batch norm in G over in G and D (batches of their own)",
                where,
                ratio(distance["G"], distance["G, D separate"]),
                1.0,
                unit="×",
                digits=2,
            ),
            Finding(
                "the remedy: batches of their own over one mixed batch in D",
                where,
                ratio(distance["G, D separate"], distance["G, D mixed"]),
                1.0,
                unit="×",
                digits=2,
                decisive=False,
            ),
        ]
        if "G, D virtual" in distance:
            virtual = ratio(distance["G, D separate"], distance["G, D virtual"])
            findings.append(
                Finding(
                    "the remedy: batches of their own over virtual batch norm in D",
                    where,
                    virtual,
                    1.0,
                    unit="×",
                    digits=2,
                    decisive=False,
                )
            )
        words.append(
            f"a GAN's distance from real images is {times(better, 'smaller', 'larger', 'not clearly different')} "
            f"with batch norm in the generator, "
            f"{geometric_mean(distance['G']).value:.1f} against "
            f"{geometric_mean(distance['G, D separate']).value:.1f} when the discriminator has it too and sees real "
            f"and fake in batches of their own, {geometric_mean(distance['G, D mixed']).value:.1f} when it sees them "
            f"in one ({where})"
        )
        rows += [[f"{where}, GAN", GANS[name][0], geometric_mean(distance[name]).text(None)] for name in names]
        rows.append([f"{where}, GAN", "training images against test images", real.text(None)])
        figures.append(
            Figure(
                f"Fréchet distance of a GAN by where its batch norm stands: {where}",
                Axis("place", categories=[GANS[name][0] for name in names]),
                Axis("Fréchet distance from real images", scale="log"),
                [
                    Series(
                        "seeds",
                        "bn",
                        [place for place, name in enumerate(names) for _ in distance[name]],
                        [v for name in names for v in distance[name]],
                    )
                ],
                "Fréchet distance of generated from real images on a classifier's features, a box over the seeds; "
                "smaller is better. "
                + "; ".join(f"{GANS[name][0]}: {geometric_mean(distance[name]).value:.1f}" for name in names)
                + f". Training images are at {real.value:.2f}.",
                kind="boxes",
                reference=(real.value, "training images"),
            )
        )
    return Reading(
        f"With batch norm {'; '.join(words)}.",
        findings,
        figures,
        [Table("Negative ELBO in nats, and Fréchet distance; smaller is better", ["where", "arm", "result"], rows)],
        setup=[
            ("Data", "images with values from 0 to 1, as they come"),
            (
                "VAE",
                f"fully connected, 2 or 5 layers of {HIDDEN} on either side of {LATENT} latent numbers, pixels as "
                f"probabilities; Adam, "
                f"{100 if plan.quick else 500} steps of {BATCH}, the rate with the best validation score of "
                f"{', '.join(f'{r:g}' for r in rates)}; test data in evaluation mode",
            ),
            (
                "GAN",
                f"fully connected, two layers of {HIDDEN} on either side, leaky ReLU in the discriminator; Adam at "
                f"{GAN_RATE:g} with β₁ = 0.5, "
                f"{150 if plan.quick else 700} steps of {BATCH}; the same in all arms",
            ),
            (
                "Fréchet distance",
                "between 1,000 generated and the held-out real images, on the 32 features of a classifier that was "
                "trained on real ones",
            ),
            ("Virtual", "kn.VirtualBatchNorm, whose reference batch is half real, half generated"),
            ("Seeds", seeds_text(plan.seed_range(quick=3, full=5))),
        ],
        notes=[
            "With batches of their own a discriminator tells real from fake by the batch, not by the image: its "
            "normalized values say how an image stands "
            "in its batch, and what is common to all of a batch is lost."
        ],
    )


CLAIM = Claim(
    number=16,
    title="Generative models",
    statement="Batch normalization helps generative models.",
    question="Do a VAE and a GAN get better with batch norm, and where must it stand?",
    literature="Radford, Metz and Chintala put batch norm into both networks of their GAN, but not at the "
    "generator's output nor the discriminator's input, because "
    "there it made training oscillate. Salimans et al. propose virtual batch norm, since otherwise an output depends "
    "on the others of its batch. Later GANs mostly "
    "leave it out of the discriminator (Miyato et al. 2018).",
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
    cells=cells,
    read=read,
)
