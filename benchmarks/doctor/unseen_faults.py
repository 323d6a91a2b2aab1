"""Faults of batch normalization as they arise in practice, to measure what share of them the doctor finds.

They come from the literature, from forum questions, from issues and from experience, not from the doctor's rules. Each
is put in by the code that causes it where that is possible: a few passes in training mode, a state dict with a wrong
part, a replaced module, a loss that does too much.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import prune
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.optim.swa_utils import AveragedModel

from benchmarks.doctor.fault import Batch, Fault, Patient

# ---------------------------------------------------------------------------------------------------------------------
# What the faults share
# ---------------------------------------------------------------------------------------------------------------------


def _norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """The batch norms of a model and their paths, in the order of registration."""
    return {path: module for path, module in model.named_modules() if isinstance(module, _BatchNorm)}


def _norm(patient: Patient, path: str) -> _BatchNorm:
    """The batch norm at a path."""
    norm = patient.model.get_submodule(path)
    assert isinstance(norm, _BatchNorm)
    return norm


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    """Puts a module in the place of the one at a path."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


@torch.no_grad()
def _track(model: nn.Module, batches: Iterable[Batch]) -> None:
    """Passes batches through a model in its present mode, so that its batch norms update their statistics."""
    for images, _ in batches:
        model(images)


def _refit(model: nn.Module, batches: Iterable[Batch]) -> None:
    """Estimates the statistics anew, as long training on such batches would: the mean over the batches."""
    norms = _norms(model)
    momenta = {path: norm.momentum for path, norm in norms.items()}
    for norm in norms.values():
        norm.reset_running_stats()
        norm.momentum = None
    _track(model, batches)
    for path, norm in norms.items():
        norm.momentum = momenta[path]


def _sgd(patient: Patient, params: Iterable[nn.Parameter], weight_decay: float | None = None) -> torch.optim.SGD:
    """An optimizer with the settings of the patient's for other parameters."""
    group = patient.optimizer.param_groups[0]
    decay = group.get("weight_decay", 0.0) if weight_decay is None else weight_decay
    return torch.optim.SGD(params, lr=group["lr"], momentum=group.get("momentum", 0.9), weight_decay=decay)


def _step_loss(patient: Patient) -> Callable[[nn.Module, Batch], Tensor]:
    """The patient's loss as a function of the model and a batch."""
    loss = patient.loss
    if not isinstance(loss, nn.Module):
        return loss
    return lambda model, batch: loss(model(batch[0]), batch[1])


def _from(path: str, model: nn.Module) -> Iterator[str]:
    """The paths of all batch norms, beginning at one of them and going round."""
    paths = list(_norms(model))
    start = paths.index(path)
    yield from paths[start:] + paths[:start]


def _feeding_conv(patient: Patient, path: str) -> tuple[str, nn.Conv2d]:
    """The path of a batch norm whose input is the output of a convolution, and that; the given path if it is one."""
    model = patient.model
    feeds: dict[str, nn.Conv2d] = {}
    outputs: dict[int, tuple[nn.Conv2d, Tensor]] = {}
    names = {id(norm): name for name, norm in _norms(model).items()}

    def after_conv(conv: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(conv, nn.Conv2d)
        outputs[id(output)] = (conv, output)  # the output is kept, so that its id stays its own

    def before_norm(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if id(inputs[0]) in outputs:
            feeds[names[id(norm)]] = outputs[id(inputs[0])][0]

    handles = [m.register_forward_hook(after_conv) for m in model.modules() if isinstance(m, nn.Conv2d)]
    handles += [norm.register_forward_pre_hook(before_norm) for norm in _norms(model).values()]
    model.eval()
    _track(model, [(patient.batches[0][0][:2], patient.batches[0][1][:2])])
    model.train()
    for handle in handles:
        handle.remove()
    found = next(candidate for candidate in _from(path, model) if candidate in feeds)
    return found, feeds[found]


def _pair(patient: Patient, path: str) -> tuple[str, str]:
    """Two batch norms of the same size: that at the path if there is such a pair, and the one that differs most."""
    norms = _norms(patient.model)
    for first in _from(path, patient.model):
        size = norms[first].num_features
        others = [other for other in norms if other != first and norms[other].num_features == size]
        if others:
            return first, max(others, key=lambda other: _difference(norms[first], norms[other]))
    raise ValueError("the model has no two batch norms of the same size")


def _difference(one: _BatchNorm, other: _BatchNorm) -> float:
    """How much the logarithms of two batch norms' variances differ."""
    assert one.running_var is not None and other.running_var is not None
    return float((one.running_var.clamp_min(1e-8).log() - other.running_var.clamp_min(1e-8).log()).abs().mean())


def _dull(images: Tensor) -> Tensor:
    """Images of another domain: grey, of low contrast and brighter, as X-rays or pictures in fog."""
    return images.mean(1, keepdim=True).expand_as(images) * 0.4 + 0.8


# ---------------------------------------------------------------------------------------------------------------------
# Data and preprocessing
# ---------------------------------------------------------------------------------------------------------------------


def batches_sorted_by_class(patient: Patient, path: str) -> set[str]:
    """An image folder is listed class by class and the loader is made with shuffle=False."""
    images = torch.cat([batch[0] for batch in patient.batches])
    classes = torch.cat([batch[1] for batch in patient.batches])
    order = torch.argsort(classes, stable=True)
    patient.batches = list(zip(images[order].split(32), classes[order].split(32), strict=True))
    if len(patient.batches[-1][1]) < 2:
        patient.batches.pop()
    _track(patient.model, patient.batches[-8:])
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
    _refit(patient.model, filled[:6])
    return set()


def frames_of_one_clip(patient: Patient, path: str) -> set[str]:
    """A batch is made of consecutive frames of two videos: 32 images, of which only two differ really."""
    clips = []
    for images, classes in patient.batches:
        frames = images[:2].repeat_interleave((len(images) + 1) // 2, 0)[: len(images)]
        labels = classes[:2].repeat_interleave((len(images) + 1) // 2)[: len(images)]
        clips.append((frames + 0.05 * torch.randn_like(frames), labels))
    patient.batches = clips
    _track(patient.model, clips[:8])
    return set()


def two_sources_in_turn(patient: Patient, path: str) -> set[str]:
    """Two data sets are trained on together, and each batch comes from one of them in turn."""
    patient.batches = [
        (images * 0.5 + 1.2 if i % 2 else images, classes) for i, (images, classes) in enumerate(patient.batches)
    ]
    _track(patient.model, patient.batches[:8])
    return set()


# ---------------------------------------------------------------------------------------------------------------------
# The training step
# ---------------------------------------------------------------------------------------------------------------------


def micro_batches_of_two(patient: Patient, path: str) -> set[str]:
    """Gradients are accumulated over micro-batches of two images, and batch norm sees two images at a time."""
    step = _step_loss(patient)

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
    step = _step_loss(patient)

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

    handle = _norm(patient, path).register_forward_pre_hook(overflow)
    _track(patient.model, patient.batches[:1])
    handle.remove()
    broken = set()
    for name, norm in _norms(patient.model).items():
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
    old = _norm(patient, path)
    new = _NoGradBatchNorm2d(old.num_features, old.eps, old.momentum)
    new.load_state_dict(old.state_dict())
    new.weight, new.bias = old.weight, old.bias
    _replace(patient.model, path, new)
    return {path}


# ---------------------------------------------------------------------------------------------------------------------
# Fine-tuning and evaluation
# ---------------------------------------------------------------------------------------------------------------------


def frozen_backbone_still_tracks(patient: Patient, path: str) -> set[str]:
    """The backbone is frozen by requires_grad only, and its statistics drift to the new data all the same."""
    head = [module for module in patient.model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))][-1]
    patient.model.requires_grad_(False)
    head.requires_grad_(True)
    patient.optimizer = _sgd(patient, head.parameters())
    patient.batches = [(_dull(images), classes) for images, classes in patient.batches]
    _track(patient.model, patient.batches[:6])
    return set()


def tracking_switched_off_by_attribute(patient: Patient, path: str) -> set[str]:
    """track_running_stats is set to False on a built model for statistics of the batch, but only stops the update."""
    for norm in _norms(patient.model).values():
        norm.track_running_stats = False
    patient.batches = [(_dull(images), classes) for images, classes in patient.batches]
    _track(patient.model, patient.batches[:2])
    return set()


def layer_without_running_statistics(patient: Patient, path: str) -> set[str]:
    """A layer is built with track_running_stats=False to mend bad results, and evaluation depends on the batch."""
    old = _norm(patient, path)
    new = type(old)(old.num_features, old.eps, old.momentum, track_running_stats=False)
    new.weight, new.bias = old.weight, old.bias
    _replace(patient.model, path, new)
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
    old = _norm(patient, path)
    new = _TrainingBatchNorm2d(old.num_features, old.eps, old.momentum)
    new.load_state_dict(old.state_dict())
    new.weight, new.bias = old.weight, old.bias
    _replace(patient.model, path, new)
    return {path}


def dummy_inputs_in_training_mode(patient: Patient, path: str) -> set[str]:
    """A summary, a count of operations or a timing loop passes random images through the model in training mode."""
    shape = patient.batches[0][0].shape[1:]
    _track(patient.model, [(torch.rand(2, *shape), torch.zeros(2)) for _ in range(15)])
    return set()


def new_convolution_under_a_frozen_layer(patient: Patient, path: str) -> set[str]:
    """A convolution is replaced by a new one, and the batch norm after it is frozen with the old one's statistics."""
    path, conv = _feeding_conv(patient, path)
    conv.reset_parameters()
    _norm(patient, path).eval().requires_grad_(False)
    return {path}


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints and conversion
# ---------------------------------------------------------------------------------------------------------------------


def statistics_missing_in_the_checkpoint(patient: Patient, path: str) -> set[str]:
    """A renamed layer's buffers are not found in the checkpoint, and strict=False passes over it in silence."""
    state = copy.deepcopy(patient.model.state_dict())
    for buffer in ("running_mean", "running_var", "num_batches_tracked"):
        state[f"{path}.old.{buffer}"] = state.pop(f"{path}.{buffer}")
    _norm(patient, path).reset_running_stats()  # a model just built
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
    for name in _norms(patient.model):
        state[f"{name}.running_var"] = (state[f"{name}.running_var"] + 1e-5).sqrt()
    patient.model.load_state_dict(state)
    return set()


def statistics_of_two_layers_exchanged(patient: Patient, path: str) -> set[str]:
    """Arrays are matched by order and shape, and two layers of the same size are listed in another order."""
    first, second = _pair(patient, path)
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
    _refit(patient.model, [batch for batch in shard if len(batch[1]) > 1][:6])
    return set()


# ---------------------------------------------------------------------------------------------------------------------
# Averaging, pruning and other surgery
# ---------------------------------------------------------------------------------------------------------------------


def averaged_model_without_new_statistics(patient: Patient, path: str) -> set[str]:
    """AveragedModel is made at the start of training, averages weights only, and update_bn() is never called."""
    start = copy.deepcopy(patient.model)
    for norm in _norms(start).values():
        norm.reset_running_stats()
    averaged = AveragedModel(start)
    step = _step_loss(patient)
    averaged.update_parameters(patient.model)
    for batch in patient.batches[:2]:
        patient.optimizer.zero_grad()
        step(patient.model, batch).backward()
        patient.optimizer.step()
        averaged.update_parameters(patient.model)
    patient.model = averaged.module.train()
    patient.optimizer = _sgd(patient, patient.model.parameters())
    return set()


def extrapolated_statistics(patient: Patient, path: str) -> set[str]:
    """Task arithmetic goes beyond the fine-tuned model for all of the state dict, and variances become negative."""
    tuned = copy.deepcopy(patient.model)
    _refit(tuned, [(images * 0.3, classes) for images, classes in patient.batches[:6]])
    base, goal = patient.model.state_dict(), tuned.state_dict()
    merged = {key: base[key] + 1.2 * (goal[key] - base[key]) for key in base if base[key].is_floating_point()}
    patient.model.load_state_dict(merged, strict=False)
    return {name for name in _norms(patient.model) if bool((merged[f"{name}.running_var"] < 0).any())}


def pruned_without_new_statistics(patient: Patient, path: str) -> set[str]:
    """The small weights of all convolutions are pruned, and the statistics are still those of the full model."""
    for module in list(patient.model.modules()):
        if isinstance(module, nn.Conv2d):
            prune.l1_unstructured(module, "weight", amount=0.6)
            prune.remove(module, "weight")
    return set()


def layer_slimmed_to_nothing(patient: Patient, path: str) -> set[str]:
    """Slimming prunes channels below one global threshold of the scales, and one layer loses nearly all of its own."""
    norm = _norm(patient, path)
    with torch.no_grad():
        threshold = norm.weight.abs().quantile(0.94)
        mask = (norm.weight.abs() >= threshold).to(norm.weight.dtype)
        norm.weight.mul_(mask)
        norm.bias.mul_(mask)
    _refit(patient.model, patient.batches[:6])
    return {path}


def folded_but_left_in_place(patient: Patient, path: str) -> set[str]:
    """A batch norm is folded into its convolution for deployment, and stays in the model: it is applied twice."""
    path, conv = _feeding_conv(patient, path)
    norm = _norm(patient, path)
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
    first, second = _pair(patient, path)
    _replace(patient.model, second, _norm(patient, first))
    patient.optimizer = _sgd(patient, patient.model.parameters())
    _refit(patient.model, patient.batches[:6])
    return {first, second}


def dropout_before_the_layer(patient: Patient, path: str) -> set[str]:
    """Dropout is put before a batch norm, which learns the larger variance of training and meets another in use."""
    _replace(patient.model, path, nn.Sequential(nn.Dropout(0.5), _norm(patient, path)))
    _refit(patient.model, patient.batches[:6])
    return {f"{path}.1"}


# ---------------------------------------------------------------------------------------------------------------------
# Settings and the optimizer
# ---------------------------------------------------------------------------------------------------------------------


def eps_and_momentum_exchanged(patient: Patient, path: str) -> set[str]:
    """A layer is built as BatchNorm2d(channels, 0.1, 1e-5), but the order is eps, momentum."""
    norm = _norm(patient, path)
    norm.eps, norm.momentum = 0.1, 1e-5
    norm.reset_running_stats()
    _track(patient.model, patient.batches[:6])
    return {path}


def momentum_of_keras(patient: Patient, path: str) -> set[str]:
    """momentum=0.99 is taken over from Keras, where it is the share of the old value and not of the new one."""
    for norm in _norms(patient.model).values():
        norm.momentum = 0.99
    _track(patient.model, patient.batches[:3])
    return set()


def weight_decay_shrinks_the_scales(patient: Patient, path: str) -> set[str]:
    """Strong weight decay is meant for the convolutions, but the rule that exempts batch norm matches no name."""
    named = list(patient.model.named_parameters())
    exempt = [param for name, param in named if "batch_norm." in name]
    decayed = [param for name, param in named if "batch_norm." not in name]
    patient.optimizer = _sgd(patient, decayed, weight_decay=0.05)
    if exempt:
        patient.optimizer.add_param_group({"params": exempt, "weight_decay": 0.0})
    with torch.no_grad():
        for norm in _norms(patient.model).values():
            norm.weight.mul_((1 - 0.02 * 0.05) ** 3000)  # 3000 steps at a learning rate of 0.02
            norm.bias.mul_((1 - 0.02 * 0.05) ** 3000)
    _refit(patient.model, patient.batches[:6])
    return set()


def left_out_of_the_optimizer(patient: Patient, path: str) -> set[str]:
    """Parameters are split by their dimension for weight decay, and the group of the vectors is never passed on."""
    patient.optimizer = _sgd(patient, [param for param in patient.model.parameters() if param.ndim > 1])
    return set()


def replaced_after_the_optimizer_was_made(patient: Patient, path: str) -> set[str]:
    """A layer is exchanged when the optimizer exists already, which goes on to update the parameters of the old one."""
    old = _norm(patient, path)
    new = type(old)(old.num_features, old.eps, old.momentum)
    new.load_state_dict(old.state_dict())
    _replace(patient.model, path, new)
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
    Fault("frozen backbone still tracks", frozen_backbone_still_tracks, "frozen parameters, statistics that go on"),
    Fault("tracking switched off by attribute", tracking_switched_off_by_attribute, "statistics not updated; stale"),
    Fault("layer without running statistics", layer_without_running_statistics, "evaluation that depends on the batch"),
    Fault("training flag fixed", training_flag_fixed, "a layer that uses the batch in evaluation mode"),
    Fault("dummy inputs in training mode", dummy_inputs_in_training_mode, "statistics that do not fit the data"),
    Fault("new convolution under a frozen layer", new_convolution_under_a_frozen_layer, "frozen, stale statistics"),
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
    Fault("eps and momentum exchanged", eps_and_momentum_exchanged, "eps too large, momentum too small"),
    Fault("momentum of Keras", momentum_of_keras, "momentum too large: statistics of the last batch"),
    Fault("weight decay shrinks the scales", weight_decay_shrinks_the_scales, "weight decay on scales; small scales"),
    Fault("left out of the optimizer", left_out_of_the_optimizer, "parameters that the optimizer does not have"),
    Fault("replaced after the optimizer", replaced_after_the_optimizer_was_made, "the optimizer lacks its parameters"),
]
