"""The lightly runs of the suite digits: commands, collected results, and one training."""

import json
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from lightly_ext.benchmarks.schema import parser, validate
from plugins.experiments import run as experiments
from plugins.experiments.method_pages import commands as page_commands
from plugins.experiments.report import read_losses, read_spectrum
from plugins.experiments.suites import Request, lightly, solo
from plugins.methods import METHODS
from solo_ext.transforms import DATASETS, evaluation_side

pytestmark = pytest.mark.lightly
ROOT = Path(__file__).parents[2]


def parsed(step):
    """Parse the arguments of the command of a step."""
    assert step.arguments[:2] == ("-m", "lightly_ext.benchmarks")
    return validate(vars(parser().parse_args(step.arguments[2:])))


@pytest.fixture(scope="module")
def column():
    """The runs by their methods; listing them composes every configuration."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return {run.method: run for run in lightly.digits(Request())}


@pytest.mark.slow
def test_every_method_has_a_column(column):
    assert list(column) == sorted(METHODS)


@pytest.mark.sample("isoloss", "ssl_ey")
@pytest.mark.parametrize("method", METHODS)
def test_settings_are_those_of_solo_learns_column(in_checkout, column, method):
    with initialize_config_dir(str(ROOT / "configs" / "solo" / "digits"), version_base="1.2"):
        theirs, linear, linear_5 = compose(method), compose("linear"), compose("linear_5")
    train, few = map(parsed, column[method].steps)
    assert train.methods == few.methods == [method]
    assert train.epochs == theirs.max_epochs and few.epochs == 0
    for name in ("lr", "weight_decay"):
        assert getattr(train, name) == float(theirs.optimizer[name])
    assert (train.batch_size_per_device, train.optimizer) == (theirs.optimizer.batch_size, theirs.optimizer.name)
    assert train.option == {**theirs.method_kwargs, **theirs.momentum}
    assert train.option == few.option, "the checkpoint is of the same model"
    assert (tuple(train.mean), tuple(train.std)) == DATASETS["digits"][1:3]
    assert train.input_size == evaluation_side(theirs.augmentations[0], "digits") and train.eval_hf_prob == float(
        DATASETS["digits"].flip
    )
    assert (train.linear_epochs, train.linear_lr) == (linear.max_epochs, linear.optimizer.lr)
    assert (few.linear_epochs, few.batch_size_per_device) == (linear_5.max_epochs, linear_5.optimizer.batch_size)
    expected = {"min_scale": 0.6, "cj_strength": 1.0, "cj_bright": 0.4, "cj_hue": 0.5, "hf_prob": 0.0}
    assert {key: train.transform[key] for key in expected} == expected
    words = shlex.split(page_commands(method)["lightly"].replace("\\\n", ""))[3:]
    page = validate(vars(parser().parse_args(words)))
    for name in ("backbone", "input_size", "epochs", "warmup_epochs", "batch_size_per_device", "optimizer", "lr"):
        assert getattr(page, name) == getattr(train, name), f"{name} on the method's page"
    assert (page.weight_decay, page.option, page.num_workers) == (train.weight_decay, train.option, train.num_workers)


def test_commands_name_seed_folders_data_and_checkpoint(in_checkout, monkeypatch):
    monkeypatch.setattr(lightly, "methods_of", lambda folder: ["byol"])
    request = Request(seeds=[3], epochs=2, out=Path("my results"), data_folder=Path("images"))
    (run,) = lightly.digits(request)
    train, few = map(parsed, run.steps)
    folder = Path("my results/digits/lightly/byol/seed3")
    assert run.folder == train.log_dir == folder and few.log_dir == folder / "linear_5"
    assert train.seed == few.seed == 3 and train.epochs == 2
    assert (train.train_dir, few.train_dir) == (Path("images/digits/train"), Path("images/digits/train_5"))
    assert train.val_dir == few.val_dir == Path("images/digits/val")
    assert few.ckpt_path == folder / "byol" / "checkpoint.ckpt"
    assert few.skip_knn_eval and not train.skip_knn_eval and train.skip_finetune_eval and few.skip_finetune_eval


def test_neighbours_are_counted_as_in_solo_learns_column(in_checkout, column):
    run = next(run for run in solo.digits(Request()) if run.method == "byol")
    words = run.steps[1].arguments
    train = parsed(column["byol"].steps[0])
    assert float(words[words.index("--k") + 1]) == train.knn_k
    assert float(words[words.index("--temperature") + 1]) == train.knn_t


def test_progress_is_rows_of_all_epochs(in_checkout, tmp_path, monkeypatch):
    monkeypatch.setattr(lightly, "methods_of", lambda folder: ["byol"])
    (run,) = lightly.digits(Request(out=tmp_path))
    assert run.steps[0].name == "pretrain"  # the step of which the runner shows the epochs
    assert run.progress(run.folder) is None
    (run.folder / run.method).mkdir(parents=True)
    (run.folder / run.method / "metrics.csv").write_text("epoch,loss\n0,2.0\n1,1.5\n")
    assert run.progress(run.folder) == (2, parsed(run.steps[0]).epochs, 1.5, None)


@pytest.mark.slow
def test_a_method_runs_from_training_to_table(few_digits_here, preload, tmp_path, monkeypatch):
    """On one epoch of fewer images: the numbers are those that the evaluations wrote."""
    few_digits_here(130, val=20)
    preload("lightly")
    linear = lightly._linear
    monkeypatch.setattr(lightly, "_linear", lambda config: {**linear(config), "linear-epochs": 2})
    assert experiments.main(["digits", "--only", "lightly/ssl_ey", "--epochs", "1"]) == 0
    out = tmp_path / "results"
    folder = out / "digits" / "lightly" / "ssl_ey" / "seed0"
    result = json.loads((folder / "result.json").read_text())
    assert (result["framework"], result["method"], result["epochs"]) == ("lightly", "ssl_ey", 1)
    train, few = (json.loads((f / "ssl_ey" / "result.json").read_text()) for f in (folder, folder / "linear_5"))
    assert result["knn"] == 100 * train["knn"]["top1"] and result["linear"] == 100 * train["linear"]["top1"]
    assert result["linear_5"] == 100 * few["linear"]["top1"]
    assert result["knn"] > 20 and result["linear"] > 20 and 0 < result["linear_5"] <= 100  # chance is 10
    assert result["images_per_second"] > 0 and result["versions"]["lightly"]
    assert result["config"]["methods"] == ["ssl_ey"] and result["config"]["lr"] == 0.008
    (epochs, losses), (_, (spectrum,)) = read_losses(folder), read_spectrum(folder)
    assert epochs == [1.0] and losses[0] > train["train_loss"], "the mean of an epoch in which it sinks"
    assert len(spectrum) == 64 and spectrum == sorted(spectrum, reverse=True)
    assert "| SSL-EY |" in (out / "digits" / "table.md").read_text()
