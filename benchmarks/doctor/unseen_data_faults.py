"""Faults of data, preprocessing and the training step, written without the doctor's rules."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.doctor.fault import Batch, Fault, Patient
from benchmarks.doctor.put_into import norm_at, norms_of, refit, replace, step_loss, track


def batches_sorted_by_class(patient: Patient, path: str) -> set[str]:
    """An image folder is listed class by class and the loader is made with shuffle=False."""
    images = torch.cat([batch[0] for batch in patient.batches])
    classes = torch.cat([batch[1] for batch in patient.batches])
    order = torch.argsort(classes, stable=True)
    patient.batches = list(zip(images[order].split(32), classes[order].split(32), strict=True))
    if len(patient.batches[-1][1]) < 2:
        patient.batches.pop()
    track(patient.model, patient.batches[-8:])
    return set()


def images_not_normalized(patient: Patient, path: str) -> set[str]:
    """The new pipeline has ToTensor() but no Normalize(): the images are in 0..1 and not standardized as before."""
    patient.batches = [((images * 0.25 + 0.47).clamp(0, 1), classes) for images, classes in patient.batches]
    return set()


def channels_last_reshaped(patient: Patient, path: str) -> set[str]:
    """Images come as (N, H, W, C) from another library and are brought to (N, C, H, W) by view() and not permute()."""
    patient.batches = [
        (images.permute(0, 2, 3, 1).reshape(images.shape), classes) for images, classes in patient.batches
    ]
    return set()


def blank_images_fill_batches(patient: Patient, path: str) -> set[str]:
    """The collate function fills every batch to a fixed size with blank images, which only the loss ignores."""
    filled = []
    for images, classes in patient.batches:
        images, classes = images.clone(), classes.clone()
        kept = max(2, len(images) * 5 // 8)
        images[kept:], classes[kept:] = 0.0, -100
        filled.append((images, classes))
    patient.batches = filled
    refit(patient.model, filled[:6])
    return set()


def frames_of_one_clip(patient: Patient, path: str) -> set[str]:
    """A batch is made of consecutive frames of two videos: 32 images, of which only two differ really."""
    clips = []
    for images, classes in patient.batches:
        frames = images[:2].repeat_interleave((len(images) + 1) // 2, 0)[: len(images)]
        labels = classes[:2].repeat_interleave((len(images) + 1) // 2)[: len(images)]
        clips.append((frames + 0.05 * torch.randn_like(frames), labels))
    patient.batches = clips
    track(patient.model, clips[:8])
    return set()


def two_sources_in_turn(patient: Patient, path: str) -> set[str]:
    """Two data sets are trained on together, and each batch comes from one of them in turn."""
    patient.batches = [
        (images * 0.5 + 1.2 if i % 2 else images, classes) for i, (images, classes) in enumerate(patient.batches)
    ]
    track(patient.model, patient.batches[:8])
    return set()


def micro_batches_of_two(patient: Patient, path: str) -> set[str]:
    """Gradients are accumulated over micro-batches of two images, and batch norm sees two images at a time."""
    step = step_loss(patient)

    def accumulated(model: nn.Module, batch: Batch) -> Tensor:
        parts = [part for part in zip(batch[0].split(2), batch[1].split(2), strict=True) if len(part[1]) > 1]
        return torch.stack([step(model, part) for part in parts]).mean()

    patient.loss = accumulated
    with torch.no_grad():
        for batch in patient.batches[:2]:
            accumulated(patient.model, batch)
    return set()


def strong_view_in_a_pass_of_its_own(patient: Patient, path: str) -> set[str]:
    """Consistency training passes the plain and the strongly augmented images one after the other."""
    step = step_loss(patient)

    def both_views(model: nn.Module, batch: Batch) -> Tensor:
        images, classes = batch
        contrast = 0.2 + 0.4 * torch.rand(len(images), 1, 1, 1)
        strong = images * contrast + 1.0 + 0.4 * torch.randn_like(images)
        return step(model, (images, classes)) + step(model, (strong, classes))

    patient.loss = both_views
    with torch.no_grad():
        for batch in patient.batches[:4]:
            both_views(patient.model, batch)
    return set()


def loss_leaves_the_model_in_eval(patient: Patient, path: str) -> set[str]:
    """Self-training makes its targets in evaluation mode and does not go back to training mode afterwards."""

    def self_training(model: nn.Module, batch: Batch) -> Tensor:
        images, classes = batch
        model.eval()
        with torch.no_grad():
            target = model(images).softmax(1)
        output = model(images + 0.1 * torch.randn_like(images))
        return F.cross_entropy(output, classes) + 0.5 * F.cross_entropy(output, target)

    patient.loss = self_training
    with torch.no_grad():
        self_training(patient.model, patient.batches[0])
    return set()


def overflow_left_in_the_statistics(patient: Patient, path: str) -> set[str]:
    """An activation overflows in half precision: the scaler skips the step, but the statistics are updated already."""

    def overflow(_: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        peak = torch.zeros_like(inputs[0])
        peak[0, 0] = 1e5
        return (inputs[0] + peak).half().float()

    handle = norm_at(patient, path).register_forward_pre_hook(overflow)
    track(patient.model, patient.batches[:1])
    handle.remove()
    broken = set()
    for name, norm in norms_of(patient.model).items():
        assert norm.running_mean is not None and norm.running_var is not None
        if not (norm.running_mean.isfinite().all() and norm.running_var.isfinite().all()):
            broken.add(name)
    return broken


class _NoGradBatchNorm2d(nn.BatchNorm2d):
    """A batch norm that is to be frozen and runs under no_grad()."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(input)


def no_grad_around_a_layer(patient: Patient, path: str) -> set[str]:
    """A layer is frozen by running it under no_grad(), which also cuts the gradient of all that comes before it."""
    old = norm_at(patient, path)
    new = _NoGradBatchNorm2d(old.num_features, old.eps, old.momentum)
    new.load_state_dict(old.state_dict())
    new.weight, new.bias = old.weight, old.bias
    replace(patient.model, path, new)
    return {path}


FAULTS: list[Fault] = [
    Fault("batches sorted by class", batches_sorted_by_class, "batches not shuffled: one class in each batch"),
    Fault("images not normalized", images_not_normalized, "inputs or statistics that do not fit each other"),
    Fault("channels-last images reshaped", channels_last_reshaped, "inputs or statistics that do not fit each other"),
    Fault("blank images fill the batches", blank_images_fill_batches, "blank or equal images in the batches"),
    Fault("frames of one clip in a batch", frames_of_one_clip, "images of a batch that depend on each other; noise"),
    Fault("two sources in turn", two_sources_in_turn, "batches of different distributions; statistics that mix them"),
    Fault("micro-batches of two", micro_batches_of_two, "too few images for the statistics of a batch"),
    Fault("strong view in a pass of its own", strong_view_in_a_pass_of_its_own, "several passes of unlike data a step"),
    Fault("loss leaves the model in eval", loss_leaves_the_model_in_eval, "evaluation mode while training"),
    Fault("overflow left in the statistics", overflow_left_in_the_statistics, "statistics that are not finite"),
    Fault("no_grad around a layer", no_grad_around_a_layer, "no gradient at or before the layer"),
]
