"""Faults of fine-tuning, evaluation, settings and the optimizer, written without the doctor's rules."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.doctor.fault import Fault, Patient
from benchmarks.doctor.put_into import dull, feeding_conv, norm_at, norms_of, refit, replace, sgd, track


def frozen_backbone_still_tracks(patient: Patient, path: str) -> set[str]:
    """The backbone is frozen by requires_grad only, and its statistics drift to the new data all the same."""
    head = [module for module in patient.model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))][-1]
    patient.model.requires_grad_(False)
    head.requires_grad_(True)
    patient.optimizer = sgd(patient, head.parameters())
    patient.batches = [(dull(images), classes) for images, classes in patient.batches]
    track(patient.model, patient.batches[:6])
    return set()


def tracking_switched_off_by_attribute(patient: Patient, path: str) -> set[str]:
    """track_running_stats is set to False on a built model for statistics of the batch, but only stops the update."""
    for norm in norms_of(patient.model).values():
        norm.track_running_stats = False
    patient.batches = [(dull(images), classes) for images, classes in patient.batches]
    track(patient.model, patient.batches[:2])
    return set()


def layer_without_running_statistics(patient: Patient, path: str) -> set[str]:
    """A layer is built with track_running_stats=False to mend bad results, and evaluation depends on the batch."""
    old = norm_at(patient, path)
    new = type(old)(old.num_features, old.eps, old.momentum, track_running_stats=False)
    new.weight, new.bias = old.weight, old.bias
    replace(patient.model, path, new)
    return {path}


class _TrainingBatchNorm2d(nn.BatchNorm2d):
    """A batch norm written with the functional form and a fixed training flag."""

    def forward(self, input: Tensor) -> Tensor:
        momentum = 0.1 if self.momentum is None else self.momentum
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, True, momentum, self.eps
        )


def training_flag_fixed(patient: Patient, path: str) -> set[str]:
    """A custom layer calls F.batch_norm with training=True always, so it uses the batch and learns in evaluation."""
    old = norm_at(patient, path)
    new = _TrainingBatchNorm2d(old.num_features, old.eps, old.momentum)
    new.load_state_dict(old.state_dict())
    new.weight, new.bias = old.weight, old.bias
    replace(patient.model, path, new)
    return {path}


def dummy_inputs_in_training_mode(patient: Patient, path: str) -> set[str]:
    """A summary, a count of operations or a timing loop passes random images through the model in training mode."""
    shape = patient.batches[0][0].shape[1:]
    track(patient.model, [(torch.rand(2, *shape), torch.zeros(2)) for _ in range(15)])
    return set()


def new_convolution_under_a_frozen_layer(patient: Patient, path: str) -> set[str]:
    """A convolution is replaced by a new one, and the batch norm after it is frozen with the old one's statistics."""
    path, conv = feeding_conv(patient, path)
    conv.reset_parameters()
    norm_at(patient, path).eval().requires_grad_(False)
    return {path}


def eps_and_momentum_exchanged(patient: Patient, path: str) -> set[str]:
    """A layer is built as BatchNorm2d(channels, 0.1, 1e-5), but the order is eps, momentum."""
    norm = norm_at(patient, path)
    norm.eps, norm.momentum = 0.1, 1e-5
    norm.reset_running_stats()
    track(patient.model, patient.batches[:6])
    return {path}


def momentum_of_keras(patient: Patient, path: str) -> set[str]:
    """momentum=0.99 is taken over from Keras, where it is the share of the old value and not of the new one."""
    for norm in norms_of(patient.model).values():
        norm.momentum = 0.99
    track(patient.model, patient.batches[:3])
    return set()


def weight_decay_shrinks_the_scales(patient: Patient, path: str) -> set[str]:
    """Strong weight decay is meant for the convolutions, but the rule that exempts batch norm matches no name."""
    named = list(patient.model.named_parameters())
    exempt = [param for name, param in named if "batch_norm." in name]
    decayed = [param for name, param in named if "batch_norm." not in name]
    patient.optimizer = sgd(patient, decayed, weight_decay=0.05)
    if exempt:
        patient.optimizer.add_param_group({"params": exempt, "weight_decay": 0.0})
    with torch.no_grad():
        for norm in norms_of(patient.model).values():
            norm.weight.mul_((1 - 0.02 * 0.05) ** 3000)  # 3000 steps at a learning rate of 0.02
            norm.bias.mul_((1 - 0.02 * 0.05) ** 3000)
    refit(patient.model, patient.batches[:6])
    return set()


def left_out_of_the_optimizer(patient: Patient, path: str) -> set[str]:
    """Parameters are split by their dimension for weight decay, and the group of the vectors is never passed on."""
    patient.optimizer = sgd(patient, [param for param in patient.model.parameters() if param.ndim > 1])
    return set()


def replaced_after_the_optimizer_was_made(patient: Patient, path: str) -> set[str]:
    """A layer is exchanged when the optimizer exists already, which goes on to update the parameters of the old one."""
    old = norm_at(patient, path)
    new = type(old)(old.num_features, old.eps, old.momentum)
    new.load_state_dict(old.state_dict())
    replace(patient.model, path, new)
    return {path}


FAULTS: list[Fault] = [
    Fault("frozen backbone still tracks", frozen_backbone_still_tracks, "frozen parameters, statistics that go on"),
    Fault("tracking switched off by attribute", tracking_switched_off_by_attribute, "statistics not updated; stale"),
    Fault("layer without running statistics", layer_without_running_statistics, "evaluation that depends on the batch"),
    Fault("training flag fixed", training_flag_fixed, "a layer that uses the batch in evaluation mode"),
    Fault("dummy inputs in training mode", dummy_inputs_in_training_mode, "statistics that do not fit the data"),
    Fault("new convolution under a frozen layer", new_convolution_under_a_frozen_layer, "frozen, stale statistics"),
    Fault("eps and momentum exchanged", eps_and_momentum_exchanged, "eps too large, momentum too small"),
    Fault("momentum of Keras", momentum_of_keras, "momentum too large: statistics of the last batch"),
    Fault("weight decay shrinks the scales", weight_decay_shrinks_the_scales, "weight decay on scales; small scales"),
    Fault("left out of the optimizer", left_out_of_the_optimizer, "parameters that the optimizer does not have"),
    Fault("replaced after the optimizer", replaced_after_the_optimizer_was_made, "the optimizer lacks its parameters"),
]
