"""PyTorch's own OpInfo samples for ``nn.functional.batch_norm``, with keelnorm's function in place of torch's."""

import pytest
import torch
import torch.nn.functional as F
from nn.layer_pairs import assert_near
from torch.autograd import gradcheck, gradgradcheck

import keelnorm as kn

op_tests = pytest.importorskip(
    "torch.testing._internal.common_methods_invocations", reason="torch.testing's samples need the package expecttest"
)

[INFO] = [info for info in op_tests.op_db if info.name == "nn.functional.batch_norm" and not info.variant_test_name]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ours = kn.functional.batch_norm
#: torch's rules for forward-mode derivatives load some that go through torch.jit.
forward_mode = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


def samples(dtype, requires_grad=True):
    """Each sample as (x, (running_mean, running_var, weight, bias), keywords), and whether keelnorm takes it."""
    for sample in INFO.sample_inputs("cpu", dtype, requires_grad=requires_grad):
        yield sample.input, sample.args, sample.kwargs


def legal_samples(dtype):
    """All but x of shape (0,): keelnorm asks for channels at dimension 1."""
    return [sample for sample in samples(dtype) if sample[0].dim() >= 2]


def as_leaves(tensors, dtype=None):
    """Copies without history, each with the original's requires_grad."""
    return [
        None if t is None else t.detach().clone().to(dtype or t.dtype).requires_grad_(t.requires_grad) for t in tensors
    ]


def test_the_samples_are_there():
    assert len(legal_samples(torch.float32)) >= 8
    assert INFO.dtypes == set(DTYPES)
    assert INFO.error_inputs_func is None  # a test of them belongs here once there are any


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_samples_agree_with_torch_in_float64(dtype, backend):
    for x, arguments, keywords in legal_samples(dtype):
        tensors = as_leaves((x, *arguments))
        oracles = as_leaves((x, *arguments), torch.float64)
        y, y64 = ours(*tensors, **keywords), F.batch_norm(*oracles, **keywords)
        assert y.dtype == dtype
        # One value (2, 1) in inference: rstd from running_var near 0 multiplies the samples' ±9.
        assert_near(y, y64, units=32)
        dy = torch.randn_like(y)
        y.backward(dy), y64.backward(dy.double())
        for t, t64 in zip(tensors, oracles, strict=True):
            if t is not None and t.requires_grad:
                assert_near(t.grad, t64.grad, units=64)
            elif t is not None:
                assert_near(t, t64, units=32)


@pytest.mark.parametrize("training", [True, False])
def test_samples_without_a_channel_dimension_are_refused(training):
    [sample] = [
        (x, arguments, keywords)
        for x, arguments, keywords in samples(torch.float32)
        if x.dim() < 2 and keywords["training"] is training
    ]
    with pytest.raises(ValueError, match=r"two or more dimensions, channels second; got .* shape \(0,\)"):
        ours(sample[0], *sample[1], **sample[2])


def functions_of_samples():
    """Each sample as a function of those of its tensors that require a gradient."""
    for x, arguments, keywords in legal_samples(torch.float64):
        # Running statistics would change from one evaluation to the next.
        fixed = [None if t is None else t.detach().clone() for t in arguments[:2]]
        affine = [t for t in arguments[2:] if t is not None]

        def function(x, *affine, fixed=fixed, keywords=keywords):
            moments = [None if t is None else t.clone() for t in fixed]
            return ours(x, *moments, *(affine or (None, None)), **keywords)

        yield function, as_leaves((x, *affine))


@forward_mode
def test_gradcheck_of_all_samples():
    for function, tensors in functions_of_samples():
        assert gradcheck(function, tensors, check_forward_ad=True, check_batched_grad=True)


@pytest.mark.slow
@forward_mode
def test_gradgradcheck_of_all_samples():
    for function, tensors in functions_of_samples():
        assert gradgradcheck(function, tensors, check_fwd_over_rev=True)
