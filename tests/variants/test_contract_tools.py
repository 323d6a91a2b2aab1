"""The contract: torch.compile, and errors that name the layer and change nothing; and the suite's own rules."""

import copy
import re
from pathlib import Path

import pytest
import torch
from variants.collected import HERE, VARIANTS, collect, for_each, small, unknown_promises
from variants.contract import assert_same, buffers_of, layer_of, run


@pytest.fixture
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compare_compiled(variant, *, fullgraph):
    """Two training steps and one in evaluation: the same as without the compiler."""
    layer = layer_of(variant, small(variant))
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=fullgraph, backend="aot_eager")
    for training in (True, True, False):
        layer.train(training), twin.train(training)
        x, residual = torch.randn(2, *small(variant), dtype=torch.float64)
        keywords = {"activation": "relu", **variant.keywords(x)}
        found = run(layer, x, residual, call=compiled, **keywords)
        assert_same(found, run(twin, x, residual, **keywords), 1e-10)


# Where a graph goes on after a break, Dynamo itself looks at .grad of what came out of the first part.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.usefixtures("_fresh_dynamo")
@for_each()
def test_compiles(variant):
    """To one graph; where it is said why not, indeed not, and to several."""
    if variant.compiles is not True:
        assert variant.compiles.endswith("."), "a sentence says why not"
        with pytest.raises(RuntimeError):  # which every error of Dynamo's is
            compare_compiled(variant, fullgraph=True)
        torch._dynamo.reset()
    compare_compiled(variant, fullgraph=variant.compiles is True)


def fewer_channels(x):
    return {"input": x[:, 1:]}


def integers(x):
    return {"input": x.long()}


def one_dimension(x):
    return {"input": x.flatten()}


def no_tensor(x):
    return {"input": x.tolist()}


def a_residual_that_broadcasts(x):
    return {"residual": x[:1]}


def an_integer_residual(x):
    return {"residual": x.long()}


def an_unknown_activation(x):
    return {"activation": "rectified"}


WRONG = (
    fewer_channels,
    integers,
    one_dimension,
    no_tensor,
    a_residual_that_broadcasts,
    an_integer_residual,
    an_unknown_activation,
)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("wrong", WRONG)
@for_each()
def test_wrong_input(variant, wrong, training):
    """The error names the layer; buffers and what comes after are as if nothing had happened."""
    layer = layer_of(variant, small(variant)).train(training)
    twin = copy.deepcopy(layer)
    x = torch.randn(small(variant), dtype=torch.float64)
    keywords = variant.keywords(x)
    with pytest.raises((TypeError, ValueError), match=rf"\b{type(layer).__name__}\b"):
        layer(**{"input": x, **keywords, **wrong(x)})
    assert all(torch.equal(value, buffers_of(twin)[name]) for name, value in buffers_of(layer).items())
    assert_same(run(layer, x, **keywords), run(twin, x, **keywords))


@for_each()
def test_one_value_per_channel(variant):
    """Has no variance: refused in training, by name and with nothing changed; taken in evaluation."""
    layer = layer_of(variant, small(variant))
    twin = copy.deepcopy(layer)
    x = torch.randn(1, small(variant)[1], *[1] * (len(small(variant)) - 2), dtype=torch.float64)
    with pytest.raises(ValueError, match=rf"\b{type(layer).__name__}\b"):
        layer(x, **variant.keywords(x))
    assert all(torch.equal(value, buffers_of(twin)[name]) for name, value in buffers_of(layer).items())
    assert layer.eval()(x, **variant.keywords(x)).isfinite().all()


@for_each()
def test_torchscript_is_refused(variant):
    layer = layer_of(variant, small(variant))
    with pytest.raises(RuntimeError, match=rf"\b{type(layer).__name__}\b"):
        layer.__prepare_scriptable__()


def test_unkept_promises_are_tests():
    text = "".join(path.read_text(encoding="utf-8") for path in HERE.glob("test_contract_*.py"))
    promises = set(re.findall(r"^def (test_\w+)\(variant\b", text, re.MULTILINE))
    assert "test_formula" in promises
    for variant in VARIANTS:
        assert not list(unknown_promises(variant, promises)), f"{variant.name}: no test has this name"
        assert all(reason.strip().endswith(".") for reason in variant.unkept.values())


def test_collects_every_file_or_fails(tmp_path: Path, monkeypatch):
    """No file, an empty list, a file that fails: none of them passes in silence."""
    folder = tmp_path / "package_of_cases"
    folder.mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="asked of nothing"):
        collect(folder, folder.name)
    (folder / "cases_empty.py").write_text("VARIANTS = []\n")
    with pytest.raises(ValueError, match=r"cases_empty\.py"):
        collect(folder, folder.name)
    (folder / "cases_broken.py").write_text("import no_such_module_of_anyone\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_module_of_anyone"):
        collect(folder, folder.name)
