"""Faults of checkpoints, conversion, averaging and pruning, written without the doctor's rules."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.optim.swa_utils import AveragedModel

from benchmarks.doctor.fault import Fault, Patient
from benchmarks.doctor.put_into import feeding_conv, norm_at, norms_of, pair_of, refit, replace, sgd, step_loss


def statistics_missing_in_the_checkpoint(patient: Patient, path: str) -> set[str]:
    """A renamed layer's buffers are not found in the checkpoint, and strict=False passes over it in silence."""
    state = copy.deepcopy(patient.model.state_dict())
    for buffer in ("running_mean", "running_var", "num_batches_tracked"):
        state[f"{path}.old.{buffer}"] = state.pop(f"{path}.{buffer}")
    norm_at(patient, path).reset_running_stats()  # a model just built
    patient.model.load_state_dict(state, strict=False)
    return {path}


def weight_and_bias_in_the_other_order(patient: Patient, path: str) -> set[str]:
    """A converter reads the scale first, but the file (Darknet's, for one) has the shift first."""
    state = copy.deepcopy(patient.model.state_dict())
    state[f"{path}.weight"], state[f"{path}.bias"] = state[f"{path}.bias"], state[f"{path}.weight"]
    patient.model.load_state_dict(state)
    return {path}


def deviation_stored_as_variance(patient: Patient, path: str) -> set[str]:
    """A converter from a library that stores standard deviations puts them into running_var as they are."""
    state = copy.deepcopy(patient.model.state_dict())
    for name in norms_of(patient.model):
        state[f"{name}.running_var"] = (state[f"{name}.running_var"] + 1e-5).sqrt()
    patient.model.load_state_dict(state)
    return set()


def statistics_of_two_layers_exchanged(patient: Patient, path: str) -> set[str]:
    """Arrays are matched by order and shape, and two layers of the same size are listed in another order."""
    first, second = pair_of(patient, path)
    state = copy.deepcopy(patient.model.state_dict())
    for buffer in ("running_mean", "running_var"):
        one, other = f"{first}.{buffer}", f"{second}.{buffer}"
        state[one], state[other] = state[other], state[one]
    patient.model.load_state_dict(state)
    return {first, second}


def statistics_of_the_first_worker_only(patient: Patient, path: str) -> set[str]:
    """The data are split among workers without shuffling, and the checkpoint has the statistics of the first worker."""
    images = torch.cat([batch[0] for batch in patient.batches])
    classes = torch.cat([batch[1] for batch in patient.batches])
    mine = torch.isin(classes, classes.unique()[:2])
    shard = list(zip(images[mine].split(32), classes[mine].split(32), strict=True))
    refit(patient.model, [batch for batch in shard if len(batch[1]) > 1][:6])
    return set()


def averaged_model_without_new_statistics(patient: Patient, path: str) -> set[str]:
    """AveragedModel is made at the start of training, averages weights only, and update_bn() is never called."""
    start = copy.deepcopy(patient.model)
    for norm in norms_of(start).values():
        norm.reset_running_stats()
    averaged = AveragedModel(start)
    step = step_loss(patient)
    averaged.update_parameters(patient.model)
    for batch in patient.batches[:2]:
        patient.optimizer.zero_grad()
        step(patient.model, batch).backward()
        patient.optimizer.step()
        averaged.update_parameters(patient.model)
    patient.model = averaged.module.train()
    patient.optimizer = sgd(patient, patient.model.parameters())
    return set()


def extrapolated_statistics(patient: Patient, path: str) -> set[str]:
    """Task arithmetic goes beyond the fine-tuned model for all of the state dict, and variances become negative."""
    tuned = copy.deepcopy(patient.model)
    refit(tuned, [(images * 0.3, classes) for images, classes in patient.batches[:6]])
    base, goal = patient.model.state_dict(), tuned.state_dict()
    merged = {key: base[key] + 1.2 * (goal[key] - base[key]) for key in base if base[key].is_floating_point()}
    patient.model.load_state_dict(merged, strict=False)
    return {name for name in norms_of(patient.model) if bool((merged[f"{name}.running_var"] < 0).any())}


def pruned_without_new_statistics(patient: Patient, path: str) -> set[str]:
    """The small weights of all convolutions are pruned, and the statistics are still those of the full model."""
    for module in list(patient.model.modules()):
        if isinstance(module, nn.Conv2d):
            prune.l1_unstructured(module, "weight", amount=0.6)
            prune.remove(module, "weight")
    return set()


def layer_slimmed_to_nothing(patient: Patient, path: str) -> set[str]:
    """Slimming prunes channels below one global threshold of the scales, and one layer loses nearly all of its own."""
    norm = norm_at(patient, path)
    with torch.no_grad():
        threshold = norm.weight.abs().quantile(0.94)
        mask = (norm.weight.abs() >= threshold).to(norm.weight.dtype)
        norm.weight.mul_(mask)
        norm.bias.mul_(mask)
    refit(patient.model, patient.batches[:6])
    return {path}


def folded_but_left_in_place(patient: Patient, path: str) -> set[str]:
    """A batch norm is folded into its convolution for deployment, and stays in the model: it is applied twice."""
    path, conv = feeding_conv(patient, path)
    norm = norm_at(patient, path)
    assert norm.running_mean is not None and norm.running_var is not None
    weight, bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    with torch.no_grad():
        conv.weight.copy_(weight)
    conv.bias = nn.Parameter(bias.detach().clone())
    return {path}


def one_layer_in_two_places(patient: Patient, path: str) -> set[str]:
    """The same module is used after two convolutions to save a line, and its statistics mix two distributions."""
    first, second = pair_of(patient, path)
    replace(patient.model, second, norm_at(patient, first))
    patient.optimizer = sgd(patient, patient.model.parameters())
    refit(patient.model, patient.batches[:6])
    return {first, second}


def dropout_before_the_layer(patient: Patient, path: str) -> set[str]:
    """Dropout is put before a batch norm, which learns the larger variance of training and meets another in use."""
    replace(patient.model, path, nn.Sequential(nn.Dropout(0.5), norm_at(patient, path)))
    refit(patient.model, patient.batches[:6])
    return {f"{path}.1"}


FAULTS: list[Fault] = [
    Fault("statistics missing in the checkpoint", statistics_missing_in_the_checkpoint, "statistics never estimated"),
    Fault("weight and bias in the other order", weight_and_bias_in_the_other_order, "scales near 0, shifts near 1"),
    Fault("deviation stored as variance", deviation_stored_as_variance, "variances that do not fit the data"),
    Fault("statistics of two layers exchanged", statistics_of_two_layers_exchanged, "statistics of another layer"),
    Fault("statistics of the first worker only", statistics_of_the_first_worker_only, "statistics of other data"),
    Fault("averaged model, old statistics", averaged_model_without_new_statistics, "statistics not estimated anew"),
    Fault("extrapolated statistics", extrapolated_statistics, "negative variances"),
    Fault("pruned, old statistics", pruned_without_new_statistics, "statistics that do not fit the pruned weights"),
    Fault("layer slimmed to nothing", layer_slimmed_to_nothing, "most channels of the layer off: scales of zero"),
    Fault("folded but left in place", folded_but_left_in_place, "normalized twice; stale statistics; a useless bias"),
    Fault("one layer in two places", one_layer_in_two_places, "a shared layer whose statistics mix two inputs"),
    Fault("dropout before the layer", dropout_before_the_layer, "a variance that is larger in training than in use"),
]
