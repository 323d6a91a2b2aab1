"""PyTorch's own ModuleInfo samples for batch norm, with keelnorm's layers in place of torch.nn's."""

import pytest
import torch
from nn.layer_pairs import assert_near, assert_same_moments, randomize, snapshot, twin

import keelnorm as kn

module_tests = pytest.importorskip(
    "torch.testing._internal.common_modules", reason="torch.testing's samples need the package expecttest"
)

OURS = {name: getattr(kn, name.removeprefix("nn.")) for name in ("nn.BatchNorm1d", "nn.BatchNorm2d", "nn.BatchNorm3d")}
INFOS = [info for info in module_tests.module_db if info.name in OURS]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def samples(info, dtype, training):
    return info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training)


def test_the_samples_are_there():
    assert {info.name for info in INFOS} == OURS.keys()
    assert all(len(samples(info, torch.float32, True)) >= 5 for info in INFOS)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
def test_samples_agree_with_torch_in_float64(info, dtype, training, backend):
    """Forward, gradients and state of two steps; float64 runs on the composite of the reference, float32 on kernels."""
    for sample in samples(info, dtype, training):
        arguments = sample.constructor_input
        ours = OURS[info.name](*arguments.args, **arguments.kwargs).to(dtype).train(training)
        theirs = twin(randomize(ours), info.module_cls, *arguments.args, **arguments.kwargs)
        for _ in range(2):
            x = sample.forward_input.args[0].detach().requires_grad_()
            x64 = x.detach().double().requires_grad_()
            ours.zero_grad()
            theirs.zero_grad()
            y, y64 = ours(x), theirs(x64)
            assert y.dtype == dtype
            assert_near(y, y64)
            dy = torch.randn_like(y)
            y.backward(dy), y64.backward(dy.double())
            # Scale: weight·rstd·dy, where rstd is at most 1/√eps for a constant channel; samples are spread over ±9.
            assert_near(x.grad, x64.grad, units=32)
            for (name, p), p64 in zip(ours.named_parameters(), theirs.parameters(), strict=True):
                assert p.grad is not None, name
                assert_near(p.grad, p64.grad, units=32)
        if x.numel() > 0:
            assert_same_moments(ours, theirs)


@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
def test_zero_batch_sample_changes_no_statistics(info, backend):
    """Where keelnorm differs on purpose: torch counts an empty batch in num_batches_tracked."""
    [sample] = [sample for sample in samples(info, torch.float32, True) if sample.desc == "zero_batch"]
    layer = OURS[info.name](*sample.constructor_input.args)
    before = snapshot(layer)
    y = layer(*sample.forward_input.args)
    assert y.shape == sample.forward_input.args[0].shape
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
def test_error_samples_raise_as_torch(info, backend):
    errors = info.module_error_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=False, training=True)
    assert errors
    for error in errors:
        sample = error.module_error_input
        assert error.error_on is module_tests.ModuleErrorEnum.FORWARD_ERROR
        layer = OURS[info.name](*sample.constructor_input.args, **sample.constructor_input.kwargs)
        with pytest.raises(error.error_type, match=error.error_regex):
            layer(*sample.forward_input.args, **sample.forward_input.kwargs)
