import pytest
import torch
from torch import nn
from torch.nn import functional as F

import evenkeel as ek
from evenkeel.lab import networks
from evenkeel.lab.arms import ARMS, arm_named
from evenkeel.lab.networks import cnn, mlp, stack
from evenkeel.lab.seeds import generator
from evenkeel.lab.training import descend, losses

ALONE = {"mlp": mlp, "cnn": cnn}
RATES = torch.tensor([0.02, 0.1, 0.3])
SCALES = torch.tensor([0.5, 1.0, 2.0])


def replica_of(whole, network, arm, number):
    """The replica `number` of a stack as a network of its own."""
    alone = ALONE[network](arm)
    trained = [module for module in alone if isinstance(module, (nn.Linear, nn.Conv2d))]
    with torch.no_grad():
        for layer, module in enumerate(trained):
            rows = whole.weights[layer].view(whole.replicas, *module.weight.shape)
            module.weight.copy_(rows[number])
            if module.bias is not None:
                bias = whole._bias(layer).view(whole.replicas, -1)
                module.bias.copy_(bias[number])
    return alone


@pytest.mark.parametrize("initialization", ["he", "torch"])
@pytest.mark.parametrize("arm_name", list(ARMS))
@pytest.mark.parametrize("network", list(ALONE))
def test_a_stack_is_its_replicas_trained_apart(network, arm_name, initialization):
    arm = arm_named(arm_name)
    whole = stack(network, arm, SCALES, generator(draw="test"), initialization)
    alone = [replica_of(whole, network, arm, number) for number in range(3)]
    optimizers = [torch.optim.SGD(each.parameters(), lr=rate) for each, rate in zip(alone, RATES.tolist(), strict=True)]
    for _ in range(4):
        images, labels = torch.randn(20, 1, 8, 8), torch.randint(0, 10, (20,))
        together = losses(whole, images, labels)
        together.sum().backward()
        descend(whole, RATES)
        apart = []
        for each, optimizer in zip(alone, optimizers, strict=True):
            optimizer.zero_grad()
            loss = F.cross_entropy(each(images), labels)
            loss.backward()
            optimizer.step()
            apart.append(loss.detach())
        torch.testing.assert_close(together.detach(), torch.stack(apart), rtol=2e-4, atol=1e-5)
    whole.eval()
    images = torch.randn(20, 1, 8, 8)
    expected = torch.stack([each.eval()(images).t() for each in alone])
    torch.testing.assert_close(whole(images), expected, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("network", list(ALONE))
def test_a_lost_replica_leaves_the_others_alone(network):
    arm = arm_named("torch")
    lost, kept = (
        stack(network, arm, torch.tensor([first, 1.0]), generator(draw="test")) for first in (float("inf"), 1.0)
    )
    images, labels = torch.randn(20, 1, 8, 8), torch.randint(0, 10, (20,))
    for whole in (lost, kept):
        losses(whole, images, labels).sum().backward()
        descend(whole, torch.tensor([0.1, 0.1]))
    after = [losses(whole, images, labels).detach() for whole in (lost, kept)]
    assert torch.isnan(after[0][0])
    torch.testing.assert_close(after[0][1], after[1][1])


@pytest.mark.parametrize("network", list(ALONE))
def test_all_arms_start_from_the_same_weights(network):
    starts = [stack(network, arm, torch.ones(1), generator(draw="test")) for arm in ARMS.values()]
    for other in starts[1:]:
        for first, second in zip(starts[0].weights, other.weights, strict=True):
            assert torch.equal(first, second)


def test_torchs_own_initialization_has_its_range():
    ours = stack("mlp", arm_named("none"), torch.ones(1), generator(draw="test"), "torch")
    for weight, bias, theirs in zip(
        ours.weights, ours.biases, [m for m in mlp(arm_named("none")) if isinstance(m, nn.Linear)], strict=True
    ):
        bound = theirs.in_features**-0.5
        for drawn, built in ((weight, theirs.weight), (bias, theirs.bias)):
            assert drawn.abs().max() <= bound
            assert built.abs().max() <= bound
        assert weight.std().item() == pytest.approx(theirs.weight.std().item(), rel=0.1)


def test_each_arm_has_the_layers_it_is_named_for():
    for build in (mlp, cnn):
        kinds = {name: [type(module) for module in build(arm)] for name, arm in ARMS.items()}
        assert not [kind for kind in kinds["none"] if issubclass(kind, nn.modules.batchnorm._BatchNorm)]
        assert sum(kind in (nn.BatchNorm1d, nn.BatchNorm2d) for kind in kinds["torch"]) == 3
        assert sum(kind in (ek.BatchNorm1d, ek.BatchNorm2d) for kind in kinds["evenkeel"]) == 3
        assert isinstance(build(arm_named("evenkeel")), ek.Sequential)


@pytest.mark.parametrize("find", [arm_named, lambda name: stack(name, arm_named("none"), torch.ones(1), None)])
def test_an_unknown_name_is_answered_with_the_known_ones(find):
    with pytest.raises(KeyError, match="there are"):
        find("transformer")


def test_strides_fit_the_channels():
    assert len(networks.CNN_CHANNELS) == len(networks.CNN_STRIDES)
