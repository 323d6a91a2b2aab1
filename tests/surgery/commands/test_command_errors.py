"""What the commands say when something is wrong, and what they leave alone then."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from surgery.commands.invoke import refused, run, runner
from torch import nn

from keelnorm.cli import app
from keelnorm.engine.atomic_write import replacing


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["nets"], "expected package.module:callable, such as torchvision.models:resnet50; got 'nets'"),
        (["gone.nets:small"], "gone.nets:small: no module named 'gone'"),
        (["nets:gone"], "nets:gone: there is no 'gone' in nets; it has Block, Pair, batches, fails"),
        (["nets:answer.deep"], "nets:answer.deep: there is no 'deep' in nets"),
        (["nets:answer"], "nets:answer must be a callable; it is 42 (int)"),
        (["nets:one_tensor"], "nets:one_tensor must return a torch.nn.Module; it returned a float32 tensor"),
        (["nets:fails"], "nets:fails() raised KeyError: 'no such size' (nets.py:36)"),
        (["nets.py:small"], "nets.py:small: a module is meant, not its file: nets:small"),
        (["./nets.py:small"], "./nets.py:small: a module is meant, not its file: nets:small"),
        (["deep/er.py:small"], "deep/er.py:small: a module is meant, not its file: deep.er:small"),
        (["/else/where.py:f"], "a module is meant, not its file: where:f, in the directory /else"),
        (["nets:small", "--args", "{"], "--args must be JSON"),
        (["nets:small", "--args", "[1]"], "--args must be a JSON object of keywords"),
        (["nets:small", "--args", '{"size": 1}'], "nets:small(size=1) raised TypeError"),
        (["nets:linear", "--args", '{"size": 1}'], "nets:linear is a model already"),
        (["nets:small", "--where", "zz"], "where='zz' matches no batch norm. The model's are: '1', '3.bn'"),
        (["nets:small", "--out", "w.pt"], "--out must end in .safetensors; got w.pt"),
        (["nets:small", "--out", "gone/w.safetensors"], "nothing can be written to gone"),
        (["nets:small", "--report", "r.txt"], "--report must end in .json; got r.txt"),
        (
            ["broken:model"],
            "broken:model: importing broken raised ModuleNotFoundError: No module named 'not_there' (broken.py:1)",
        ),
        (["wrong:model"], "wrong:model: importing wrong raised ZeroDivisionError: division by zero (wrong.py:1)"),
    ],
)
def test_errors_say_what_was_asked_and_what_is_legal(words: list[str], answer: str) -> None:
    Path("broken.py").write_text("import not_there\n", encoding="utf-8")
    Path("wrong.py").write_text("1 / 0\n", encoding="utf-8")
    assert answer in refused("convert", *words)


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ([], "fold runs the model on an example: give --input 1,3,224,224 or --example FILE"),
        (["--input", "1,x"], "got '1,x'; dtypes are float32"),
        (["--input", "1,3:float"], "got '1,3:float'; dtypes are float32"),
        (["--input", "0,3"], "sizes of at least 1"),
        (["--input", "1,2,8,8"], "RuntimeError: "),
        (["--input", "1,3,8,8", "--example", "x.npy"], "--input and --example exclude each other"),
        (["--example", "x.png"], "--example must be a .safetensors or .npy file; got x.png"),
        (["--example", "gone.npy"], "there is no file gone.npy"),
    ],
)
def test_examples_that_are_none(words: list[str], answer: str) -> None:
    assert answer in refused("fold", "nets:small", *words)


def test_an_error_of_the_models_own_code_says_where(folder: Path) -> None:
    (folder / "mine.py").write_text(
        "import json\nimport torch\nfrom torch import nn\n\n\nclass Net(nn.Module):\n"
        "    def __init__(self, way='torch'):\n        super().__init__()\n"
        "        self.bn, self.way = nn.BatchNorm1d(3), way\n\n"
        "    def forward(self, x):\n        if self.way == 'json':\n            return json.loads('{')\n"
        "        return self.bn(x.view(7, 3))\n\n\n"
        "class Twin(Net):\n    def forward(self, x):\n        raise ValueError('fold: as the command begins')\n",
        encoding="utf-8",
    )
    words = ("fold", "mine:Net", "--input", "4,3")
    assert re.fullmatch(r"RuntimeError: shape '\[7, 3\]' is invalid .* \(mine\.py:14\)", refused(*words))
    assert refused(*words, "--args", '{"way": "json"}').endswith("(mine.py:13)")  # not in Python's own json
    said = refused("fold", "mine:Twin", "--input", "4,3")
    assert said == "ValueError: fold: as the command begins (mine.py:19)"
    assert "(nets" not in refused("fold", "nets:linear", "--input", "4,5")  # torch's layers alone


@pytest.mark.parametrize("words", [("--debug", "convert", "nets:fails"), ("convert", "nets:fails", "--debug")])
def test_debug_prints_the_traceback(words: tuple[str, ...]) -> None:
    result = runner.invoke(app, words)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "nets:fails() raised KeyError: 'no such size' (nets.py:36)\n" in result.stderr
    assert "Traceback (most recent call last)" in result.stderr
    assert 'nets.py", line 36, in fails\n    raise KeyError("no such size")' in result.stderr


def test_debug_of_other_commands() -> None:
    for words in (["lab", "run", "gone"], ["bench", "page", "nets.py"]):
        plain, told = (runner.invoke(app, [*words, *more]) for more in ([], ["--debug"]))
        assert plain.exit_code == told.exit_code == 2
        assert "Traceback" not in plain.stderr
        assert "Traceback (most recent call last)" in told.stderr


def test_help_has_a_short_form() -> None:
    for words in ([], ["fold"], ["lab"], ["lab", "run"], ["bench"], ["bench", "compare"]):
        assert run(*words, "-h").stdout == run(*words, "--help").stdout != ""


def test_files_of_the_current_directory_do_not_stand_for_installed_packages(folder: Path) -> None:
    for name in ("safetensors", "rich", "onnx"):
        (folder / f"{name}.py").write_text("from pathlib import Path\nPath('ran').touch()\n", encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    words = ["convert", "nets:small", "--out", "o.safetensors", "--json"]
    for start in (["-m", "keelnorm"], ["-c", "import sys; del sys.path[0]; from keelnorm.cli import main; main()"]):
        done = subprocess.run([sys.executable, *start, *words], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["summary"]["converted"] == 2
        Path("o.safetensors").unlink()
    assert not Path("ran").exists()
    said = refused("convert", "safetensors:model")
    assert said.startswith("safetensors:model: safetensors is both safetensors.py here and /")
    assert not Path("ran").exists()


def test_completion_knows_the_commands() -> None:
    environment = {"_KEELNORM_COMPLETE": "complete_bash", "COMP_WORDS": "keelnorm rec", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "keelnorm"], capture_output=True, text=True, env=os.environ | environment
    )
    assert (done.returncode, done.stdout.split()) == (0, ["recalibrate"]), done.stderr


def test_files_are_not_overwritten_unless_told(model: nn.Module) -> None:
    for name in ("o.safetensors", "r.json"):
        Path(name).write_text("mine", encoding="utf-8")
    said = refused("convert", "nets:small", "--out", "o.safetensors")
    assert said == "o.safetensors exists; --force overwrites it"
    assert refused("inspect", "nets:small", "--report", "r.json") == "r.json exists; --force overwrites it"
    assert Path("o.safetensors").read_text() == Path("r.json").read_text() == "mine"
    run("convert", "nets:small", "--out", "o.safetensors", "--report", "r.json", "--force")
    assert len(load_file("o.safetensors")) == len(model.state_dict())
    assert json.loads(Path("r.json").read_text(encoding="utf-8"))["operation"] == "convert"


def test_a_failure_leaves_the_file_that_was_there() -> None:
    path = Path("o.safetensors")
    path.write_text("mine", encoding="utf-8")

    def write_half() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half", encoding="utf-8")
            raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="full"):
        write_half()
    assert path.read_text(encoding="utf-8") == "mine"
    assert sorted(one.name for one in Path().iterdir()) == ["nets.py", "o.safetensors"]


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, keelnorm; before = set(sys.modules); import keelnorm.cli; "
        "print([name for name in ('safetensors', 'onnx', 'onnxruntime', 'torch.onnx._internal.exporter', "
        "'keelnorm.surgery') if name in set(sys.modules) - before])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"
