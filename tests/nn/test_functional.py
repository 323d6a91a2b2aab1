"""``kn.functional.batch_norm`` is torch's function with an activation and a residual."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from nn.layer_pairs import assert_near

import keelnorm as kn

C = 5
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def by_torch(x, mean, var, weight, bias, activation, residual, **keywords):
    y = F.batch_norm(x, mean, var, weight, bias, **keywords)
    y = y if residual is None else y + residual
    return y.relu() if activation else y


def test_signature_is_torchs_and_more_keywords():
    ours = list(inspect.signature(kn.functional.batch_norm).parameters.values())
    theirs = list(inspect.signature(F.batch_norm).parameters.values())
    assert [(p.name, p.default) for p in ours[1 : len(theirs)]] == [(p.name, p.default) for p in theirs[1:]]
    assert [(p.name, p.default, p.kind) for p in ours[len(theirs) :]] == [
        ("activation", None, inspect.Parameter.KEYWORD_ONLY),
        ("residual", None, inspect.Parameter.KEYWORD_ONLY),
        ("inplace", False, inspect.Parameter.KEYWORD_ONLY),
        ("mask", None, inspect.Parameter.KEYWORD_ONLY),
        ("sample_weight", None, inspect.Parameter.KEYWORD_ONLY),
        ("weighting", "frequency", inspect.Parameter.KEYWORD_ONLY),
        ("padding", "zero", inspect.Parameter.KEYWORD_ONLY),
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("shape", [(7, C), (3, C, 4), (2, C, 3, 4), (2, C, 2, 3, 2), (2, C, 1, 2, 3, 2)], ids=len)
def test_agrees_with_torch_in_float64(shape, with_residual, activation, dtype, backend):
    for training, weight_there, bias_there in (
        (True, True, True),
        (False, True, True),
        (True, False, True),
        (False, True, False),
    ):
        tensors = {
            "x": torch.randn(shape),
            "weight": torch.randn(C) if weight_there else None,
            "bias": torch.randn(C) if bias_there else None,
            "residual": torch.randn(shape) if with_residual else None,
        }
        ours = {name: None if t is None else t.to(dtype).requires_grad_() for name, t in tensors.items()}
        theirs = {name: None if t is None else t.detach().double().requires_grad_() for name, t in ours.items()}
        moments = torch.randn(C).to(dtype), torch.rand(C).to(dtype) + 0.5
        moments64 = moments[0].double(), moments[1].double()
        keywords = {"training": training, "momentum": 0.3, "eps": 1e-3, "activation": activation}
        x, x64 = ours.pop("x"), theirs.pop("x")
        y = kn.functional.batch_norm(x, *moments, **{**ours, **keywords})
        y64 = by_torch(x64, *moments64, **{**theirs, **keywords})
        assert y.dtype == dtype
        assert_near(y, y64)
        # No gradient where rounding may decide on which side of zero a value lies.
        dy = torch.where(y64.detach().abs() < 64 * torch.finfo(dtype).eps, 0, torch.randn(shape)).to(dtype)
        y.backward(dy), y64.backward(dy.double())
        for found, expected in zip((x, *ours.values()), (x64, *theirs.values()), strict=True):
            if found is not None:
                assert_near(found.grad, expected.grad, units=32)
        for found, expected in zip(moments, moments64, strict=True):
            assert_near(found, expected)


def test_moments_are_updated_in_training_only(backend):
    x, mean, var = torch.randn(4, C), torch.zeros(C), torch.ones(C)
    kn.functional.batch_norm(x, mean, var)
    assert torch.equal(mean, torch.zeros(C))
    assert torch.equal(var, torch.ones(C))
    kn.functional.batch_norm(x, mean, var, training=True, momentum=1.0)
    assert_near(mean, x.double().mean(0))
    assert_near(var, x.double().var(0))


def test_output_is_a_tensor_of_its_own(backend):
    """Whatever could be passed through is not: what comes in is never what comes out, and stays as it was."""
    x, residual = torch.randn(4, C), torch.randn(4, C)
    kept = x.clone(), residual.clone()
    y = kn.functional.batch_norm(x, torch.zeros(C), torch.ones(C), eps=0.0, residual=residual, activation="relu")
    assert y.data_ptr() not in (x.data_ptr(), residual.data_ptr())
    y.fill_(7)
    assert torch.equal(x, kept[0])
    assert torch.equal(residual, kept[1])
