"""What every public function says of a first argument that is none, and of numbers beyond all bounds."""

from __future__ import annotations

import inspect
import os
import traceback
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import keelnorm as kn
from keelnorm.engine.error_messages import describe

HUGE = 10**30
X = torch.randn(4, 3)
#: What else a function has to be given.
REST = {
    "backward_as_one_batch": (lambda x: x.sum(), [X]),
    "follow_scaler": (torch.amp.GradScaler("cpu", enabled=False),),
    "MomentumSchedule": (lambda step: 0.5,),
    "adapt": ([X],),
    "fold": (X,),
    "kept_memory": (X,),
    "recalibrate": ([X],),
    "param_groups": (0.1,),
    "export_onnx": (X, os.devnull),
    "merge_statistics": ([1, 1],),
    "convert_domains": (2,),
    "use_domain": ("a",),
    "use_split": (1,),
    "length_mask": (3,),
    "linear": (0.1,),
    "cosine": (0.1,),
    "by_recalibrating": (None, None),
    "DomainBatchNorm.from_batch_norm": (2,),
    "GhostBatchNorm.from_batch_norm": (2,),
}
KEYWORDS: dict[str, dict[str, Any]] = {"linear": {"steps": 3}, "cosine": {"steps": 3}, "step_decay": {"every": 2}}
#: batch_norm's arguments have tests of their own; Sequential's constructor is torch.nn's.
ELSEWHERE = {"batch_norm", "Sequential"}


def nested(layout: torch.layout) -> torch.Tensor:
    return torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)], layout=layout)


WRONG: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "number": lambda: -3,
    "string": lambda: "x",
    "list": list,
    "class": lambda: nn.Linear,
    "state_dict": lambda: nn.BatchNorm1d(3).state_dict(),
    "generator": lambda: (i for i in range(2)),
    "function": lambda: lambda: 0,
    "object": object,
    "nan": lambda: float("nan"),
    "huge": lambda: HUGE,
    "array": lambda: np.zeros((2, 3)),
    "vector": lambda: torch.zeros(3),
    "integers": lambda: torch.full((2, 3), -1),
    "complex": lambda: torch.zeros(2, 3, dtype=torch.complex64),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "csr": lambda: torch.eye(3).to_sparse_csr(),
    "jagged": lambda: nested(torch.jagged),
    "nested": lambda: nested(torch.strided),
}
if torch.backends.mkldnn.is_available():
    WRONG["mkldnn"] = lambda: torch.randn(2, 3, 4, 4).to_mkldnn()
#: Wrong values that are legal for a function, or that say another thing than what came.
LEGAL = {
    "from_flax": {"state_dict"},
    "from_keras": {"state_dict"},
    "explain": {"list"},
    "register": {"class"},
    "merge_statistics": {"list", "generator", "array"},
    "Moments.merge_all": {"list", "state_dict", "generator", "array", "sparse", "csr", "jagged", "mkldnn", "nested"},
}


def functions() -> Iterator[tuple[str, Any]]:
    """Public functions, and the class methods that make a layer, or Moments, of something."""
    modules = [getattr(kn, name) for name in kn.__all__ if isinstance(getattr(kn, name), ModuleType)]
    seen = set()
    for owner in (kn, *modules):
        for name in owner.__all__:
            value = getattr(owner, name)
            if name in ELSEWHERE or id(value) in seen:
                continue
            seen.add(id(value))
            if inspect.isfunction(value) and inspect.signature(value).parameters:
                yield name, value
            for part in ("from_batch_norm", "convert_sync_batchnorm", "from_tensor", "merge_all", "empty"):
                if isinstance(value, type) and hasattr(value, part):
                    yield f"{name}.{part}", getattr(value, part)
    yield "MomentumSchedule", kn.MomentumSchedule
    yield "merge", X_MOMENTS.merge


X_MOMENTS = kn.functional.moments(X)
CALLS = dict(functions())


def called(name: str, value: Any) -> Any:
    result = CALLS[name](value, *REST.get(name, ()), **KEYWORDS.get(name, {}))
    if hasattr(result, "__enter__") and not isinstance(result, nn.Module):
        with result:
            pass
    return result


def is_ours(error: BaseException) -> bool:
    """Whether the package raised it, and not something that it called."""
    *_, innermost = traceback.extract_tb(error.__traceback__)
    return f"{os.sep}keelnorm{os.sep}" in innermost.filename and "raise" in str(innermost.line)


def test_all_functions_are_called() -> None:
    assert len(CALLS) > 45
    assert {"freeze", "convert", "use_domain", "Moments.empty", "SplitBatchNorm.from_batch_norm"} <= CALLS.keys()


@pytest.mark.filterwarnings("ignore:.*(nested|Sparse|sparse|quantize)")
@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_first_argument_is_named_with_what_came(name: str) -> None:
    for kind, make in WRONG.items():
        if kind in LEGAL.get(name, ()):
            continue
        value = make()
        with pytest.raises((TypeError, ValueError)) as raised:
            called(name, value)
        said = str(raised.value)
        assert is_ours(raised.value), f"{name}({kind}): {said}"
        assert name.rpartition(".")[2].rpartition("_")[2] in said or name.partition(".")[0] in said, f"{kind}: {said}"
        if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
            came = describe(value)[:60], type(value).__name__
            assert any(words in said for words in came), f"{name}({kind}): {said}"


@pytest.mark.filterwarnings("ignore:.*(nested|Sparse|sparse|quantize)")
def test_moments_of_what_is_none() -> None:
    ordinary = torch.zeros(3)
    for name in ("count", "mean", "m2"):
        for value in (None, 3, HUGE, "x", [1.0, 2.0, 3.0], np.zeros(3)):
            given = {"count": ordinary, "mean": ordinary, "m2": ordinary} | {name: value}
            with pytest.raises(
                TypeError, match=r"Moments: count, mean and m2 must be tensors; got .*Moments\.from_tensor"
            ):
                kn.Moments(**given)
        with pytest.raises(
            ValueError, match=r"Moments: mean and m2 must have shape \(C,\), count \(\) or \(C,\); got "
        ):
            kn.Moments(**({"count": ordinary, "mean": ordinary, "m2": ordinary} | {name: torch.zeros(2)}))
    with pytest.raises(TypeError, match=r"merge with Moments.* got 3 \(int\)"):
        X_MOMENTS.merge(X_MOMENTS, 3)  # type: ignore[arg-type]
    for channels in (-1, HUGE, True, 3.0):
        with pytest.raises(ValueError, match=r"Moments\.empty: channels must be an integer from 0 on; got "):
            kn.Moments.empty(channels)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["sparse", "csr", "mkldnn", "jagged", "nested"])
@pytest.mark.filterwarnings("ignore:.*(nested|Sparse|sparse)")
def test_tensors_of_other_kinds_are_named_with_what_to_do(kind: str) -> None:
    if kind not in WRONG:
        pytest.skip("torch has no mkldnn here")
    remedy = {"jagged": "Pad it", "nested": "Pad it"}.get(kind, r"Convert it first, with \.to_dense\(\)")
    for function in (kn.functional.moments, kn.Moments.from_tensor):
        with pytest.raises(TypeError, match=rf"moments: x must be an ordinary dense tensor; got .*\. {remedy}"):
            function(WRONG[kind]())
    with pytest.raises(
        TypeError, match=rf"the mask must be an ordinary dense tensor; got .*\. {remedy}|a mask is a boolean"
    ):
        kn.functional.moments(X, WRONG[kind]().bool() if kind in ("sparse", "nested") else WRONG[kind]())


NUMBERS: dict[str, Callable[[], Any]] = {
    "SplitBatchNorm: num_splits": lambda: kn.SplitBatchNorm(3, HUGE),
    "GhostBatchNorm: ghost_size": lambda: kn.GhostBatchNorm(3, HUGE),
    "StepwiseBatchNorm: max_length": lambda: kn.StepwiseBatchNorm(3, HUGE),
    "BatchNormLSTM: hidden_size": lambda: kn.BatchNormLSTM(3, HUGE),
    "BatchNormGRU: num_layers": lambda: kn.BatchNormGRU(3, 4, num_layers=HUGE),
    "BatchNormLSTMCell: input_size": lambda: kn.BatchNormLSTMCell(HUGE, 3),
    "DomainBatchNorm: domains": lambda: kn.DomainBatchNorm(3, HUGE),
    "domains": lambda: kn.convert_domains(nn.Sequential(nn.BatchNorm1d(3)), HUGE),
    "use_domain": lambda: called_with(kn.use_domain, nn.Sequential(kn.DomainBatchNorm(3, 2)), HUGE),
    "SplitBatchNorm: the parts are": lambda: called_with(kn.use_split, nn.Sequential(kn.SplitBatchNorm(3)), HUGE),
    "num_classes": lambda: kn.ConditionalBatchNorm(3, HUGE),
    "embedding_dim": lambda: kn.ConditionalBatchNorm(3, embedding_dim=HUGE),
    "WhiteningBatchNorm: iterations": lambda: kn.WhiteningBatchNorm(3, iterations=HUGE),
    "CrossIterationBatchNorm: window": lambda: kn.CrossIterationBatchNorm(3, window=HUGE),
    "length_mask: size": lambda: kn.functional.length_mask(torch.tensor([1]), HUGE),
    "explain: shape": lambda: kn.kernels.explain((HUGE, 3)),
    "recalibrate: max_batches": lambda: kn.recalibrate(nn.BatchNorm1d(3), [X], max_batches=HUGE),
    "adapt: max_batches": lambda: kn.adapt(nn.BatchNorm1d(3), [X], max_batches=HUGE),
    "step_decay: every": lambda: kn.control.momentum_schedule.step_decay(every=HUGE),
    "linear: steps": lambda: kn.control.momentum_schedule.linear(0.5, 0.1, steps=HUGE),
    "cosine: initial": lambda: kn.control.momentum_schedule.cosine(HUGE, 0.1, steps=3),
    "MomentumSchedule: the state": lambda: kn.MomentumSchedule(nn.BatchNorm1d(3), lambda _: 0.5).load_state_dict(
        {"steps": HUGE}
    ),
    "merge_statistics: counts": lambda: kn.merge_statistics([nn.BatchNorm1d(3).state_dict()] * 2, [10**400, 1]),
}


def called_with(function: Callable[..., Any], *arguments: Any) -> None:
    with function(*arguments):
        pass


@pytest.mark.parametrize("words", NUMBERS)
def test_counts_beyond_all_bounds_are_refused(words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words) as raised:
        NUMBERS[words]()
    assert is_ours(raised.value), str(raised.value)
    assert "00000" in str(raised.value)


def test_numbers_that_are_no_counts_may_be_large() -> None:
    layer = nn.BatchNorm1d(3)
    layer(X)
    flax = kn.to_flax(layer)
    exact = kn.from_flax(flax, count=float(HUGE))
    assert isinstance(exact, nn.BatchNorm1d | kn.BatchNorm)
    torch.testing.assert_close(kn.from_flax(flax, count=HUGE).state_dict(), exact.state_dict())
    torch.testing.assert_close(kn.to_flax(layer, count=HUGE), kn.to_flax(layer, count=float(HUGE)))
    unbounded = kn.BatchRenorm(3, r_max=HUGE, d_max=HUGE)
    torch.testing.assert_close(unbounded(X), kn.BatchRenorm(3, r_max=1e30, d_max=1e30)(X))
    assert float(kn.StepwiseBatchNorm(3, 4, gamma=HUGE).weight.detach()[0]) == float(torch.tensor(1e30))


@pytest.mark.parametrize("value", [1, 0, "1", "", None, X])
def test_switches_are_true_or_false(value: Any) -> None:
    """``preflight("0")`` would be on."""
    with pytest.raises(TypeError, match="preflight: enabled is True or False; got "):
        kn.distributed.preflight(value)
    with pytest.raises(TypeError, match="autotune: enabled is True or False; got "):
        kn.kernels.autotune(value)
    assert not kn.distributed.preflight_is_on()
