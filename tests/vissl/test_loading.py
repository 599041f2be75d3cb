"""Runs with losses of ours and of VISSL: metrics.csv, TensorBoard, the trained trunk in Python; modules of the user."""

import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import vissl_ext
from plugins.tools.command import UserError
from plugins.tools.records import read_rows
from plugins.tools.resnet8 import resnet8
from vissl_ext.compat.tensorboard_values import scalar
from vissl_ext.user_modules import import_modules

pytestmark = pytest.mark.vissl

PAGE = (Path(__file__).parents[2] / "docs" / "vissl.md").read_text()
SMALL = (
    *("config.DATA.TRAIN.DATA_PATHS=[datasets/digits/train]", "config.DATA.TRAIN.BATCHSIZE_PER_REPLICA=32"),
    *("config.DATA.NUM_DATALOADER_WORKERS=0", "config.OPTIMIZER.num_epochs=2", "config.LOG_FREQUENCY=1"),
    *("config.HOOKS.TENSORBOARD_SETUP.USE_TENSORBOARD=true", "config.HOOKS.TENSORBOARD_SETUP.LOG_PARAMS=false"),
    "config.HOOKS.TENSORBOARD_SETUP.LOG_PARAMS_GRADIENTS=false",
)


@pytest.fixture(scope="module")
def runs(few_digits: Path, launch: Callable) -> Path:
    """Folder with runs/isoloss, a run of SimSiam, whose predictor has its own learning rate, and runs/simclr."""
    folder = few_digits.parents[1]
    launch(
        "config=pretrain/simsiam/digits",
        *(*SMALL, "config.LOSS.simsiam.proj_hidden_dim=32", "config.LOSS.simsiam.proj_output_dim=16"),
        "config.LOSS.simsiam.log_quality=features",
        f"config.CHECKPOINT.DIR={folder / 'runs' / 'isoloss'}",
    )
    launch(
        "config=pretrain/simclr/simclr_8node_resnet",
        *(*SMALL, "config.DATA.TRAIN.TRANSFORMS.1.size=16"),
        *("config.MODEL.TRUNK.NAME=plain_resnet", "config.MODEL.TRUNK.RESNETS.DEPTH=8"),
        *("config.MODEL.HEAD.PARAMS=[[mlp,{dims:[64,128]}]]", f"config.CHECKPOINT.DIR={folder / 'runs' / 'simclr'}"),
    )
    return folder


def _scalars(folder: Path) -> dict[str, dict[int, float]]:
    events = EventAccumulator(str(folder / "tb_logs"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["isoloss", "simclr"])
def test_metrics_and_tensorboard_of_any_loss(name: str, runs: Path) -> None:
    folder = runs / "runs" / name
    rows, logged = read_rows(folder / "metrics.csv"), _scalars(folder)
    losses = logged["Training/Loss"]
    assert sorted(losses) == list(range(6)) and [row["epoch"] for row in rows] == ["0", "1"]
    for epoch, row in enumerate(rows):
        mean = sum(losses[step] for step in range(3 * epoch, 3 * epoch + 3)) / 3
        assert float(row["loss"]) == pytest.approx(mean, abs=1e-5)
        for column in row.keys() - {"epoch"}:
            assert logged[f"Epoch/{column}"][epoch] == pytest.approx(float(row[column]), rel=1e-5)
    terms = {"epoch", "loss"} if name == "simclr" else {"epoch", "loss", "cosine", "z_std", "quality/features/rankme"}
    assert terms <= rows[0].keys() and (name != "simclr" or rows[0].keys() == terms)
    assert len(logged["Training/Learning_rate"]) == 6


def test_tensorboard_shows_the_largest_of_several_rates() -> None:
    with pytest.raises(TypeError):
        round([0.1, 0.2], 5)  # as VISSL does
    assert scalar([0.1, 0.2], 5) == 0.2 and scalar(1.5e-7, 5) == 1.5e-7
    assert scalar(torch.tensor([1.0, 3.0])) == 2.0


def _reference(checkpoint: Path) -> torch.nn.Module:
    """The network alone, in float64."""
    trunk = torch.load(checkpoint, weights_only=False)["classy_state_dict"]["base_model"]["model"]["trunk"]
    network = resnet8()
    network.fc = torch.nn.Identity()
    network.load_state_dict({key.removeprefix("_feature_blocks."): value for key, value in trunk.items()})
    return network.double().eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["isoloss", "simclr"])
def test_a_trained_model_is_loaded_in_one_call(name: str, runs: Path) -> None:
    folder = runs / "runs" / name
    images, expected = torch.randn(4, 3, 16, 16), _reference(folder / "checkpoint.torch")
    for source in (folder, str(folder / "model_final_checkpoint_phase1.torch")):
        model = vissl_ext.load_model(source)
        assert not model.training and model.config.MODEL.TRUNK.RESNETS.DEPTH == 8
        with torch.no_grad():
            found = model.double()(images.double())
            torch.testing.assert_close(found, expected(images.double()))
            (pooled,) = model(images.double(), ["res5"])
        torch.testing.assert_close(pooled.mean((2, 3)), found)
    first = vissl_ext.load_model(folder / "model_phase0.torch")
    assert not torch.equal(first(images), found.float())


@pytest.mark.slow
def test_the_call_of_the_page(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(
        r"\n((?:    .*\n|\n)+)", PAGE.partition("which VISSL writes there:\n")[2].partition("\n## ")[0]
    )
    monkeypatch.chdir(runs)
    names: dict[str, Any] = {}
    exec(re.sub(r"^    ", "", code, flags=re.MULTILINE), names)
    assert names["features"].shape == (8, 64) and names["res5"].shape == (8, 64, 4, 4) and names["res4"].ndim == 4
    torch.testing.assert_close(names["res5"].mean((2, 3)), names["features"])


@pytest.mark.slow
def test_wrong_files_raise_a_one_line_error(runs: Path, tmp_path: Path) -> None:
    folder = runs / "runs" / "simclr"
    with pytest.raises(UserError, match=re.escape(f"{tmp_path} contains no checkpoint")):
        vissl_ext.load_model(tmp_path)
    with pytest.raises(UserError, match=r"there is no file .*nothing\.torch"):
        vissl_ext.load_model(tmp_path / "nothing.torch")
    moved = tmp_path / "moved.torch"
    moved.write_bytes((folder / "checkpoint.torch").read_bytes())
    with pytest.raises(UserError, match=r"needs the configuration of its run, but there is no file .*train_config"):
        vissl_ext.load_model(moved)
    vissl_ext.load_model(moved, folder / "train_config.yaml")
    text = (folder / "train_config.yaml").read_text()
    for old, new, message in (
        ("DEPTH: 8", "DEPTH: 18", "contains another trunk than plain_resnet of"),
        ("NAME: plain_resnet", "NAME: mine", "the trunk mine is not registered: import the module that registers it"),
        ("MODEL:", "MODELS:", "it has no section MODEL"),
    ):
        assert old in text
        (tmp_path / "config.yaml").write_text(text.replace(old, new))
        with pytest.raises(UserError, match=message):
            vissl_ext.load_model(moved, tmp_path / "config.yaml")
    torch.save({"state_dict": {}}, moved)
    with pytest.raises(UserError, match="is not a checkpoint of VISSL"):
        vissl_ext.load_model(moved, folder / "train_config.yaml")


@pytest.mark.slow
def test_the_loss_and_the_trunk_of_the_page_in_two_processes(runs: Path, launch: Callable) -> None:
    """The launcher starts the processes anew, so each imports the module."""
    section = PAGE.partition("## Your own loss and trunk\n")[2]
    (code,), (command,) = (re.findall(rf"```{kind}\n(.*?)```", section, re.DOTALL) for kind in ("python", "bash"))
    (runs / "my_loss.py").write_text(code)
    words = shlex.split(command.replace("\\\n", " "))[3:]
    output = launch(*words, "config.DATA.TRAIN.BATCHSIZE_PER_REPLICA=16", "config.DISTRIBUTED.NUM_PROC_PER_NODE=2")
    # one of the two prints
    shown = [line.split("  ")[:2] for line in output.splitlines() if line.startswith("epoch ")]
    assert ["epoch 1/2", "iteration 1/3"] in shown and all(shown.count(line) == 1 for line in shown), output
    folder = runs / "runs" / "alignment"
    rows = read_rows(folder / "metrics.csv")
    assert 0 < float(rows[1]["loss"]) < float(rows[0]["loss"]) < 2
    trunk = torch.load(folder / "checkpoint.torch", weights_only=False)["classy_state_dict"]["base_model"]["model"]
    assert sorted(trunk["trunk"]) == ["layer.bias", "layer.weight"]
    assert json.loads((folder / "summary.json").read_text())["config"]["LOSS"]["alignment"]["power"] == 1


def test_modules_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "broken_module.py").write_text("1 / 0\n")
    (tmp_path / "json.py").write_text("")
    (tmp_path / "good_module.py").write_text("value = 3\n")
    for given, message in (
        ("nothing.py", "--import: there is no file nothing.py"),
        ("no_such_module", "--import no_such_module: the import failed with ModuleNotFoundError: No module named"),
        ("broken_module", "--import broken_module: the import failed with ZeroDivisionError: division by zero"),
        ("json.py", f"--import {tmp_path / 'json.py'}: another module has the name json; rename the file"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            import_modules([given])
    assert import_modules(["good_module.py", "good_module"]) == [str(tmp_path / "good_module.py"), "good_module"]
