"""Callbacks in the trainers themselves: Lightning's, and that of transformers."""

from __future__ import annotations

import csv
import logging
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def samples(number=64):
    x = torch.randn(number, 4, generator=torch.Generator().manual_seed(0))
    return x, (x.sum(1) > 0).long()


@pytest.fixture(autouse=True)
def _quiet():
    """The trainers' own warnings and logs are not looked at."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Recorder:
    """What a logger gets."""

    def __init__(self):
        self.got = []

    def log_metrics(self, metrics, step=None):
        self.got.append((step, set(metrics)))


def lightning_module(*, breaks=False, skips=False):
    lightning = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed")

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        """Calls its model, and not itself, as most do."""

        def __init__(self):
            super().__init__()
            self.model = network()

        def training_step(self, batch, index):
            if breaks and index == 3:
                raise OSError("no more data")
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def on_train_batch_start(self, batch, index):
            return -1 if skips and index == 4 else None

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    return lightning, Module()


def fitted(tmp_path, callbacks, *, breaks=False, skips=False, **options):
    lightning, module = lightning_module(breaks=breaks, skips=skips)
    torch.manual_seed(1)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*samples()), batch_size=8)
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", callbacks=callbacks, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, default_root_dir=tmp_path, **{"logger": False, **options},
    )  # fmt: skip
    trainer.fit(module, loader)
    return module


def test_lightning(tmp_path):
    pytest.importorskip("lightning.pytorch", reason="Lightning is not installed")
    from keelnorm.trainers.lightning import MonitorBatchNorms

    path = tmp_path / "record.csv"
    callback = MonitorBatchNorms(every=4, to=path)
    module = fitted(tmp_path, [callback])
    assert [seen.step for seen in callback.monitor.observations] == [4, 8, 12, 16]
    for seen in callback.monitor.observations:
        assert set(seen.layers) == {"model.1"}
        assert seen.layers["model.1"].gradient > 0
    with path.open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["4", "8", "12", "16"]
    for mine, plain in zip(module.state_dict().values(), fitted(tmp_path, []).state_dict().values(), strict=True):
        assert torch.equal(mine, plain)
    assert all(not part._forward_pre_hooks for part in module.modules())


def test_lightning_writes_to_the_loggers_of_the_trainer(tmp_path):
    pytest.importorskip("lightning.pytorch", reason="Lightning is not installed")
    from lightning.pytorch.loggers import CSVLogger

    from keelnorm.trainers.lightning import MonitorBatchNorms

    logger = CSVLogger(tmp_path)
    fitted(tmp_path, [MonitorBatchNorms(every=8)], logger=logger)
    with open(f"{logger.log_dir}/metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("batch_norm/noise/model.1")]
    assert [row["step"] for row in rows] == ["8", "16"]


@pytest.mark.slow
def test_both_names_of_lightning():
    pytest.importorskip("pytorch_lightning", reason="Lightning is not installed")
    code = (
        "import {0}; from keelnorm.trainers.lightning import MonitorBatchNorms\n"
        "assert issubclass(MonitorBatchNorms, {0}.Callback)"
    )
    for name in ("pytorch_lightning", "lightning.pytorch"):
        subprocess.run([sys.executable, "-W", "ignore", "-c", code.format(name)], check=True)


def test_lightning_that_ends_with_an_error(tmp_path):
    pytest.importorskip("lightning.pytorch", reason="Lightning is not installed")
    from keelnorm.trainers.lightning import MonitorBatchNorms

    callback = MonitorBatchNorms(every=1, to=[])
    with pytest.raises(OSError, match="no more data"):
        fitted(tmp_path, [callback], breaks=True)
    assert [seen.step for seen in callback.monitor.observations] == [1, 2, 3, 4]
    assert callback.monitor.observations[-1].layers == {}


def test_lightning_that_skips_a_batch(tmp_path):
    pytest.importorskip("lightning.pytorch", reason="Lightning is not installed")
    from keelnorm.trainers.lightning import MonitorBatchNorms

    callback = MonitorBatchNorms(every=1, to=[])
    module = fitted(tmp_path, [callback], skips=True)
    assert all(not part._forward_pre_hooks for part in module.modules())
    assert callback.monitor.observations


def test_the_trainer_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    from keelnorm.trainers.transformers import MonitorBatchNorms

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = network()

        def forward(self, x, labels):
            logits = self.body(x)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    def train(callbacks):
        model = Model()
        x, y = samples()
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), num_train_epochs=2, per_device_train_batch_size=8, report_to=[], use_cpu=True,
            save_strategy="no", disable_tqdm=True, gradient_accumulation_steps=2, logging_steps=100,
        )  # fmt: skip
        data = [{"x": one, "labels": label} for one, label in zip(x, y, strict=True)]
        transformers.Trainer(model, arguments, train_dataset=data, callbacks=callbacks).train()
        return model

    recorder = Recorder()
    callback = MonitorBatchNorms(every=4, to=recorder)
    model = train([callback])
    assert [seen.step for seen in callback.monitor.observations] == [4, 8, 12, 16]
    assert [step for step, _ in recorder.got] == [4, 8, 12, 16]
    assert "batch_norm/drift/body.1" in recorder.got[0][1]
    for mine, plain in zip(model.state_dict().values(), train([]).state_dict().values(), strict=True):
        assert torch.equal(mine, plain)
    assert all(not part._forward_pre_hooks for part in model.modules())


def test_a_model_without_batch_norms_is_refused(tmp_path):
    pytest.importorskip("lightning.pytorch", reason="Lightning is not installed")
    from keelnorm.trainers.lightning import MonitorBatchNorms

    with pytest.raises(ValueError, match="Monitor: "):
        fitted(tmp_path, [MonitorBatchNorms(where="nowhere")])
