"""Recomputed outputs of masked, weighted, ghost and synchronized calls, of variants and of frozen layers."""

from __future__ import annotations

import copy

import pytest
import torch
from support.forcing import NATIVE, require_kernel
from support.saved_kinds import FUSED, KINDS, SIZE, C, Kind, N, Two, batch, mask
from support.saving import assert_same_bits, assert_saving_changes_nothing, kept, outcome
from torch import nn

import keelnorm as kn

ONE = N * C * SIZE * SIZE * 4
LAYOUTS = pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
#: On machines with GPUs too, the CPU's layers run on these.
BACK_ENDS = ("reference", *NATIVE)


@pytest.mark.parametrize(("activation", "residual"), [(None, False), ("relu", True), ("silu", True)])
@pytest.mark.parametrize("name", KINDS)
def test_the_same_bits(name: str, activation: str | None, residual: bool) -> None:
    model = Two(KINDS[name], activation, residual)
    for training in (True, False):
        assert_saving_changes_nothing(model.train(training), batch())


@pytest.mark.parametrize(
    ("dtype", "memory_format"),
    [
        (torch.float32, torch.channels_last),
        (torch.float64, torch.contiguous_format),
        (torch.bfloat16, torch.channels_last),
        (torch.float16, torch.contiguous_format),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", KINDS)
def test_dtypes_and_layouts(name: str, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    model = Two(KINDS[name], "gelu", residual=True).to(dtype).to(memory_format=memory_format)
    assert_saving_changes_nothing(model, batch(dtype).to(memory_format=memory_format))


@LAYOUTS
@pytest.mark.parametrize("kernel", BACK_ENDS)
@pytest.mark.parametrize("name", FUSED)
def test_every_back_end(name: str, kernel: str, memory_format: torch.memory_format) -> None:
    require_kernel(kernel)
    with kn.kernels.use(kernel):
        for activation in ("relu", "tanh"):
            model = Two(FUSED[name], activation, residual=True).to(memory_format=memory_format)
            assert_saving_changes_nothing(model, batch().to(memory_format=memory_format))


@pytest.mark.parametrize("longest", [1, 8])
@pytest.mark.parametrize("name", KINDS)
def test_what_is_kept(name: str, longest: int) -> None:
    model = Two(KINDS[name], "silu")
    without, found = kept(copy.deepcopy(model), batch(), 0), kept(copy.deepcopy(model), batch(), longest)
    if KINDS[name].recomputed:
        assert found <= without - 2 * ONE
    if name in FUSED:  # the inputs of the two layers, and vectors
        assert 2 * ONE <= found <= 2 * ONE + ONE // 2
    if name == "whitening":
        assert found == without


@pytest.mark.parametrize("name", KINDS)
def test_a_residual_is_recomputed_too(name: str) -> None:
    model = Two(KINDS[name], "relu", residual=True)
    without, found = kept(copy.deepcopy(model), batch(), 0), kept(copy.deepcopy(model), batch(), 8)
    if KINDS[name].recomputed:
        assert found <= without - 2 * ONE
    if name in FUSED and name != "domains":  # which keeps the residual in another order
        assert found <= 2 * ONE + ONE // 2


@pytest.mark.parametrize("name", ["plain", "mask", "mask, keep", "ghost", "sync", "renorm", "L1", "weights"])
def test_frozen_layers(name: str) -> None:
    """In evaluation mode within training the running statistics normalize."""
    model = Two(KINDS[name], "relu", residual=True)
    model(batch())
    kn.freeze(model, affine=name != "weights")  # with a frozen weight, torch's operators keep nothing but the output
    assert_saving_changes_nothing(model, batch())
    assert kept(model, batch(), 8) <= kept(model, batch(), 0) - 2 * ONE


def test_recurrent_layers_and_virtual_batches() -> None:
    torch.manual_seed(0)
    lstm = nn.Sequential(kn.BatchNormLSTM(3, 4))
    x = torch.randn(5, 6, 3)
    twin = copy.deepcopy(lstm)
    expected = lstm(x)[0]
    expected.square().sum().backward()
    with kn.save_memory(twin):
        found = twin(x)[0]
        found.square().sum().backward()
    assert torch.equal(found, expected)
    assert_same_bits([p.grad for p in twin.parameters()], [p.grad for p in lstm.parameters()])

    model = Two(Kind(lambda: kn.VirtualBatchNorm(C)), "relu")
    with kn.collect_reference(model):
        model(batch())
    assert_saving_changes_nothing(model, batch())
    assert kept(model, batch(), 8) <= kept(model, batch(), 0) - 2 * ONE


@pytest.mark.parametrize("name", ["mask", "weights, mask", "sync, mask", "L1, mask", "conditional, mask"])
def test_masked_values_may_be_nan(name: str) -> None:
    class Masked(Two):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.cat([x, x[:, :1]], 1).masked_fill(~mask().unsqueeze(1), torch.nan)
            y = self.bn1(x, activation="relu", **self.given)
            out: torch.Tensor = self.last(y)
            return out

    model = Masked(KINDS[name], "relu")
    assert all(torch.isfinite(each).all() for each in outcome(copy.deepcopy(model), batch()) if each is not None)
    assert_saving_changes_nothing(model, batch())


@pytest.mark.parametrize("name", KINDS)
def test_a_tensor_that_is_input_and_residual_and_read_again(name: str) -> None:
    """Three gradients add up, in the same order."""

    class Both(Two):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            y = self.bn1(x, x, activation="hardswish", **self.given)
            z = self.bn2(y, x, activation="silu", **self.given)
            out: torch.Tensor = self.last(z + y * x)
            return out

    for dtype in (torch.float32, torch.float64):
        assert_saving_changes_nothing(Both(KINDS[name], None).to(dtype), batch(dtype))


@pytest.mark.parametrize("name", KINDS)
def test_autocast_in_the_forward_alone(name: str) -> None:
    model, twin = (Two(KINDS[name], "softplus", residual=True) for _ in range(2))
    for each in (model, twin):
        handle = kn.save_memory(each) if each is twin else None
        with torch.autocast("cpu", torch.bfloat16):
            y = each(batch())
        if handle is not None:
            handle.undo()
        with torch.autograd.set_detect_anomaly(True):
            y.float().square().sum().backward()
    assert_same_bits([p.grad for p in twin.parameters()], [p.grad for p in model.parameters()])


@pytest.mark.parametrize("byte", [1, 2, 128, 255])
def test_any_byte_but_zero_is_true(byte: int) -> None:
    bytes_ = mask().to(torch.uint8) * byte
    kind = Kind(lambda: kn.BatchNorm2d(C), lambda: {"mask": bytes_.view(torch.bool)})
    assert_saving_changes_nothing(Two(kind, "relu"), batch())


@pytest.mark.parametrize("name", ["weight", "running_mean", "num_batches_tracked"])
def test_what_the_fast_operators_decline_is_recomputed_by_the_reference(name: str) -> None:
    """A dtype or strides that the forward's operator declines; the one that recomputes would take the copies."""

    def layer() -> nn.Module:
        bn, strided = kn.BatchNorm2d(C), torch.linspace(0.5, 2, 2 * C).view(C, 2)[:, 0]
        if name == "num_batches_tracked":
            bn.num_batches_tracked = torch.tensor(0, dtype=torch.int32)
        else:
            setattr(bn, name, nn.Parameter(strided) if name == "weight" else strided)
        return bn

    model, twin = (Two(Kind(layer), "gelu", residual=True) for _ in range(2))  # a deep copy would not be strided
    before = kn.kernels.calls()["reference"]
    with kn.save_memory(twin):
        assert_same_bits(outcome(twin, batch()), outcome(model, batch()))
    assert kn.kernels.calls()["reference"] > before
    assert kept(model, batch(), 8) <= kept(model, batch(), 0) - 2 * ONE


@LAYOUTS
def test_groups_one_by_one(memory_format: torch.memory_format) -> None:
    """As on a GPU, whose kernels have none for groups."""
    model = Two(KINDS["ghost, uneven"], "silu", residual=True).to(memory_format=memory_format)
    x = batch().to(memory_format=memory_format)
    with kn.kernels.use("reference"):
        assert_saving_changes_nothing(model, x)
        assert kept(model, x, 8) <= kept(model, x, 0) - 2 * ONE


NOTHING = torch.zeros(4, dtype=torch.bool)
EDGES: dict[str, tuple[Kind, int]] = {
    "one value, running": (Kind(lambda: kn.BatchNorm1d(C, too_few="running")), 1),
    "one value, skip": (Kind(lambda: kn.BatchNorm1d(C, too_few="skip")), 1),
    "one weight": (Kind(lambda: kn.BatchNorm1d(C, too_few="skip"), lambda: {"sample_weight": torch.eye(4)[0]}), 4),
    "one counts": (Kind(lambda: kn.BatchNorm1d(C, too_few="running"), lambda: {"mask": torch.arange(4) < 1}), 4),
    "none counts": (Kind(lambda: kn.BatchNorm1d(C), lambda: {"mask": NOTHING}), 4),
    "none counts, keep": (Kind(lambda: kn.BatchNorm1d(C), lambda: {"mask": NOTHING, "padding": "keep"}), 4),
    "none counts, L1": (Kind(lambda: kn.L1BatchNorm(C), lambda: {"mask": NOTHING}), 4),
    "empty": (Kind(lambda: kn.BatchNorm1d(C)), 0),
    "empty, ghost": (Kind(lambda: kn.GhostBatchNorm(C, 2)), 0),
    "empty, range": (Kind(lambda: kn.RangeBatchNorm(C)), 0),
    "embedding": (
        Kind(lambda: kn.ConditionalBatchNorm(C, embedding_dim=2), lambda: {"condition": torch.ones(4, 2)}),
        4,
    ),
    "no tables": (
        Kind(lambda: kn.ConditionalBatchNorm(C, 2, affine=False), lambda: {"condition": torch.arange(4) % 2}),
        4,
    ),
}


@pytest.mark.parametrize("name", EDGES)
def test_batches_of_few_values(name: str) -> None:
    kind, samples = EDGES[name]

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.bn, self.last = nn.Linear(3, C), kind.layer(), nn.Linear(C, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.bn(self.first(x), activation="silu", **kind.given())
            out: torch.Tensor = self.last(y)
            return out

    assert_saving_changes_nothing(Small(), torch.randn(samples, 3, generator=torch.Generator().manual_seed(0)))
