"""Domain-specific batch normalization: what is its own; the rest is in the contract suite."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import keelnorm as kn
from keelnorm.nn.domain.convert_domains import convert_domains, use_domain
from keelnorm.nn.domain.domain_batch_norm import DomainBatchNorm

C = 3
NAMES = ["source", "target", "third"]
IDS = torch.tensor([1, 0, 1, 1, 0, 0, 1])


def near(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def randomized(module):
    with torch.no_grad():
        for value in module.parameters():
            value.add_(torch.rand_like(value))
        for name, value in module.named_buffers():
            if name.endswith("running_var"):
                value.uniform_(0.5, 2)
            elif value.is_floating_point():
                value.normal_()
    return module


def plain_layers(layer, **keywords):
    """A torch.nn layer for each domain, in the domain's state."""
    layers = []
    for d in range(len(layer.domains)):
        plain = nn.BatchNorm2d(C, momentum=layer.momentum).double().train(layer.training)
        plain.load_state_dict(
            {name: v if v.shape == plain.state_dict()[name].shape else v[d] for name, v in layer.state_dict().items()}
        )
        layers.append(plain)
    return layers


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("ids", [IDS, IDS.sort().values], ids=["mixed", "grouped"])
def test_a_domain_is_a_batch_norm_of_its_own(ids, momentum, share, training):
    """Outputs, gradients and running statistics of each domain are torch.nn's on its samples alone; twice, so that the
    counters differ where batches do."""
    layer = randomized(DomainBatchNorm(C, NAMES, momentum=momentum, share_affine=share).double()).train(training)
    plain = plain_layers(layer)
    for present in (ids, torch.zeros_like(ids)):
        x, residual, dy = torch.randn(3, len(ids), C, 4, 5, dtype=torch.float64)
        x.requires_grad_()
        layer.zero_grad(), [one.zero_grad() for one in plain]
        y = layer(x, residual, domain=present, activation="relu")
        y.backward(dy)
        for d in present.unique().tolist():
            own = present == d
            part = x.detach()[own].requires_grad_()
            expected = torch.relu(plain[d](part) + residual[own])
            expected.backward(dy[own])
            near(y[own], expected)
            near(x.grad[own], part.grad)
        for name in ("weight", "bias"):
            grads = torch.stack(
                [torch.zeros(C) if v.grad is None else v.grad for v in (p.get_parameter(name) for p in plain)]
            )
            near(layer.get_parameter(name).grad, grads.sum(0) if share else grads)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        near(layer.get_buffer(name), torch.stack([one.get_buffer(name) for one in plain]))


@pytest.mark.parametrize("shape", [(7, C), (7, C, 5), (7, C, 2, 3, 2)])
def test_numbers_per_sample_and_one_for_all_agree(shape):
    layer = randomized(DomainBatchNorm(C, 2, share_affine=False).double())
    twin = copy.deepcopy(layer)
    x = torch.randn(shape, dtype=torch.float64)
    near(layer(x, domain=torch.ones(7, dtype=torch.int64)), twin(x, domain="1"))
    near(layer(x, domain=1), twin(x, domain="1"))
    for name, value in twin.named_buffers():
        near(layer.get_buffer(name), value)


def test_an_absent_domain_keeps_its_bank():
    layer = randomized(DomainBatchNorm(C, NAMES))
    before = copy.deepcopy(layer.state_dict())
    layer(torch.randn(7, C), domain=IDS)
    assert layer.num_batches_tracked.tolist() == [1, 1, 0]
    for name in ("running_mean", "running_var"):
        assert torch.equal(layer.get_buffer(name)[2], before[name][2])
        assert not torch.isclose(layer.get_buffer(name)[:2], before[name][:2]).any()


@pytest.mark.parametrize("domain", [torch.tensor([0, 0, 1, 0]), torch.tensor([0, 1, 0, 0])])
def test_one_value_per_channel_names_the_domain(domain):
    """No domain is updated then, not even those with enough."""
    layer = randomized(DomainBatchNorm(C, NAMES))
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=r"domain 'target'.*no variance"):
        layer(torch.randn(4, C), domain=domain)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert layer.eval()(torch.randn(4, C), domain=domain).isfinite().all()


@pytest.mark.parametrize(
    ("domain", "error", "says"),
    [
        (None, ValueError, r"which domain\? .*use_domain"),
        ("fourth", ValueError, r"\['source', 'target', 'third'\].*got 'fourth'"),
        (3, ValueError, "from 0 to 2.*got 3"),
        (True, ValueError, "got True"),
        (["source"], TypeError, "got"),
        (torch.zeros(7), ValueError, "int64.*float32"),
        (torch.zeros(7, 1, dtype=torch.int64), ValueError, r"\(7, 1\)"),
        (torch.full((7,), 3), ValueError, "numbers from 3 to 3"),
        (torch.tensor([0, -1] * 3), ValueError, "numbers from -1 to 0"),
        (torch.zeros(6, dtype=torch.int64), ValueError, "6 domains came"),
    ],
)
def test_a_domain_that_there_is_not(domain, error, says):
    layer = randomized(DomainBatchNorm(C, NAMES))
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(error, match=f"DomainBatchNorm.*{says}"):
        layer(torch.randn(7, C), domain=domain)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("domains", [0, -1, True, [], ["a", "a"], "ab", [1, 2], 2.0])
def test_domains_that_mean_nothing(domains):
    with pytest.raises(ValueError, match="distinct names"):
        DomainBatchNorm(C, domains)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_use_domain_is_no_part_of_the_layer(copied):
    """A copy made inside has no choice; blocks may end in another order."""
    layer = DomainBatchNorm(C, NAMES)
    first, second = use_domain(layer, "target"), use_domain(layer, "third")
    first.__enter__(), second.__enter__()
    other = copied(layer)
    with pytest.raises(ValueError, match="which domain"):
        other(torch.randn(4, C))
    other.domain = "target"  # a choice of the user's own is part of it
    assert copied(other).domain == "target"
    first.__exit__(None, None, None)
    assert layer.domain == "third"
    second.__exit__(None, None, None)
    assert layer.domain is None


def test_use_domain_nests_and_ends():
    model = nn.Sequential(nn.Linear(2, C), DomainBatchNorm(C, NAMES), nn.ReLU(), DomainBatchNorm(C, NAMES))
    layers = [model[1], model[3]]
    with use_domain(model, "target") as same:
        assert same is model
        assert [layer.domain for layer in layers] == ["target"] * 2
        with use_domain(model[3], 0):
            assert [layer.domain for layer in layers] == ["target", 0]
        with pytest.raises(TypeError), use_domain(model, "third"):
            model("no tensor")
        with pytest.raises(ValueError, match=r"use_domain: 1: .*'fourth'"), use_domain(model, "fourth"):
            pytest.fail("the block runs")
        assert [layer.domain for layer in layers] == ["target"] * 2
        model(torch.randn(4, 2))
        layers[0](torch.randn(4, C), domain="third")  # the call goes first
    assert [layer.domain for layer in layers] == [None] * 2
    assert [layer.num_batches_tracked.tolist() for layer in layers] == [[0, 1, 1], [0, 1, 0]]
    with pytest.raises(ValueError, match="no DomainBatchNorm; convert_domains"), use_domain(nn.ReLU(), 0):
        pytest.fail("the block runs")


def test_use_domain_holds_in_other_threads():
    model = DomainBatchNorm(C, NAMES)
    with use_domain(model, "third"):
        thread = threading.Thread(target=model, args=(torch.randn(4, C),))
        thread.start()
        thread.join()
    assert model.num_batches_tracked.tolist() == [0, 0, 1]


def test_checkpointing_belongs_inside_the_block():
    model = DomainBatchNorm(C, NAMES, share_affine=False)
    x = torch.randn(4, C, requires_grad=True)
    with use_domain(model, "target"):
        checkpoint(model, x, use_reentrant=False).sum().backward()
        y = checkpoint(model, x, use_reentrant=False)
    assert model.num_batches_tracked.tolist() == [0, 2, 0]
    with pytest.raises(ValueError, match="which domain"):
        y.sum().backward()


def test_a_single_banks_checkpoint_goes_to_every_bank():
    plain = nn.Sequential(nn.Conv2d(2, C, 3), randomized(nn.BatchNorm2d(C)))
    plain[1].num_batches_tracked.fill_(5)
    for share in (True, False):
        net = nn.Sequential(nn.Conv2d(2, C, 3), DomainBatchNorm(C, NAMES, share_affine=share))
        net.load_state_dict(plain.state_dict())
        for name, value in plain[1].state_dict().items():
            assert torch.equal(net[1].state_dict()[name], value.expand_as(net[1].state_dict()[name])), name
        x = torch.randn(4, 2, 6, 6)
        net.eval(), plain.eval()
        for name in NAMES:
            with use_domain(net, name):
                torch.testing.assert_close(net(x), plain(x))
    other = nn.Sequential(net[0], DomainBatchNorm(C, 2))
    with pytest.raises(RuntimeError, match=r"size mismatch for 1\.running_mean"):
        other.load_state_dict(net.state_dict(), strict=False)


@pytest.mark.parametrize("bias", [True, False])
def test_from_batch_norm(bias):
    plain = randomized(nn.BatchNorm2d(C, eps=1e-3)).double().eval()
    plain.bias = plain.bias if bias else None
    plain.weight.requires_grad_(False)
    shared, own = (DomainBatchNorm.from_batch_norm(plain, NAMES, share_affine=share) for share in (True, False))
    assert shared.weight is plain.weight
    assert shared.bias is plain.bias
    assert own.weight.shape == (3, C)
    assert not own.weight.requires_grad
    x = torch.randn(4, C, 2, 2, dtype=torch.float64)
    for layer in (shared, own):
        assert not layer.training
        near(layer(x, domain="third"), plain(x))
        with pytest.raises(ValueError, match="must have 4 dimensions"):
            layer(x.flatten(1), domain="third")


def test_convert_domains():
    norm = nn.BatchNorm1d(C)
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(2, C), norm), "b": norm, "c": kn.BatchNorm1d(C)})
    parameters = dict(model.named_parameters())
    assert convert_domains(model, NAMES) is model
    assert model["a"][1] is model["b"]
    assert {type(model[name]) for name in "bc"} == {DomainBatchNorm}
    assert {name: id(value) for name, value in model.named_parameters()} == {n: id(v) for n, v in parameters.items()}
    converted = model["c"]
    model["d"] = nn.BatchNorm1d(C)
    convert_domains(model, 2)
    assert model["c"] is converted
    assert model["d"].domains == ("0", "1")
    assert type(convert_domains(nn.BatchNorm1d(C), 2)) is DomainBatchNorm
    with pytest.raises(ValueError, match="no batch normalization"):
        convert_domains(model, 2)


def test_a_model_that_does_not_convert_stays():
    model = nn.Sequential(nn.BatchNorm1d(C), nn.Sequential(nn.SyncBatchNorm(C)))
    with pytest.raises(TypeError, match=r"convert_domains: 1\.0: .*SyncBatchNorm"):
        convert_domains(model, 2)
    assert [type(module) for module in (model[0], model[1][0])] == [nn.BatchNorm1d, nn.SyncBatchNorm]


class Discriminator(nn.Module):
    """Three layers and a norm between them, of which there is one for each kind of sample."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(1, C, 3), nn.Linear(C, 1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(C), nn.BatchNorm2d(C)])

    def forward(self, x, kind):
        return self.last(torch.relu(self.norms[kind](self.first(x))).mean((2, 3)))


def test_a_discriminators_step_keeps_real_and_generated_apart():
    """Loss and gradients are those of two norms with shared γ and β, whether the two halves come apart or together."""
    reference = Discriminator().double()
    reference.norms[1].weight, reference.norms[1].bias = reference.norms[0].weight, reference.norms[0].bias
    model = nn.Sequential(reference.first, nn.BatchNorm2d(C), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = copy.deepcopy(nn.Sequential(*model, reference.last)).double()
    convert_domains(model, ["real", "generated"])
    together = copy.deepcopy(model)
    real, generated = torch.randn(6, 1, 5, 5).double(), torch.rand(4, 1, 5, 5).double()
    bce = nn.functional.binary_cross_entropy_with_logits

    def loss(on_real, on_generated):
        return bce(on_real, torch.ones_like(on_real)) + bce(on_generated, torch.zeros_like(on_generated))

    expected = loss(reference(real, 0), reference(generated, 1))
    with use_domain(model, "real"):
        on_real = model(real)
    with use_domain(model, "generated"):
        on_generated = model(generated)
    apart = loss(on_real, on_generated)
    with use_domain(together, torch.tensor([0] * 6 + [1] * 4)):
        mixed = loss(*together(torch.cat([real, generated])).split([6, 4]))
    for value in (expected, apart, mixed):
        value.backward()
    near(apart, expected), near(mixed, expected)
    wanted = [reference.first, reference.norms[0], reference.last]
    for net in (model, together):
        for ours, theirs in zip((net[0], net[1], net[5]), wanted, strict=True):
            near(ours.weight.grad, theirs.weight.grad)
            near(ours.bias.grad, theirs.bias.grad)
        for name in ("running_mean", "running_var"):
            near(net[1].get_buffer(name), torch.stack([one.get_buffer(name) for one in reference.norms]))


def test_compiles_with_a_domain_for_the_model():
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(2, C), DomainBatchNorm(C, NAMES, share_affine=False)).double()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for name in ("target", "source", "target"):
        x = torch.randn(5, 2, dtype=torch.float64)
        with use_domain(model, name), use_domain(twin, name):
            near(compiled(x), twin(x))
    near(model[1].running_var, twin[1].running_var)
    assert model[1].num_batches_tracked.tolist() == [1, 2, 0]
    torch._dynamo.reset()


def test_repr():
    assert repr(DomainBatchNorm(C, 2)).startswith("DomainBatchNorm(domains=['0', '1'], share_affine=True, 3, eps=")
