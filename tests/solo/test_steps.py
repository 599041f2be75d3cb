"""Runs whose length is given in steps: SEER's stream, and the records of a run that ends within an epoch."""

import csv
import json
from pathlib import Path

import pytest
import torch

from solo_ext.checkpoint import find_checkpoint, read_checkpoint

pytestmark = [pytest.mark.solo, pytest.mark.slow]


@pytest.fixture
def run(new_run, tmp_path):
    return new_run(tmp_path / "runs")


def _summary(run, method="isoloss"):
    return json.loads((run.out / method / "v" / "pretrain.json").read_text())


def test_a_run_that_ends_within_an_epoch_is_complete(run):
    """Epochs of two batches; a checkpoint every tenth epoch and after the last step; speed, epochs and validation."""
    more = ("max_epochs=9", "+max_steps=3", "++checkpoint.frequency=10", "auto_resume.enabled=true")
    text = run(*more)
    summary = _summary(run)
    checkpoint = read_checkpoint(find_checkpoint(run.folder))
    assert (summary["epochs"], summary["steps"], checkpoint["global_step"]) == (2, 3, 3)
    assert summary["images_per_second"] > 0
    assert "0 s left" in text.splitlines()[-2]
    run(*more)  # nothing left to train
    assert (_summary(run)["epochs"], _summary(run)["steps"]) == (2, 3)
    run("max_epochs=9", "+max_steps=5", "auto_resume.enabled=true")  # the run is made longer
    assert _summary(run)["steps"] == 5

    more = ("max_epochs=3", "++check_val_every_n_epoch=2", f"pretrained_feature_extractor={run.folder}")
    for steps, resumes in ((4, False), (5, True)):  # the second run continues the epoch within which the first ends
        options = (*more, f"+max_steps={steps}", "++auto_resume.enabled=true")
        text = run(*options, kind="linear", config="linear")
        linear = json.loads((run.out / "linear" / "v" / "linear.json").read_text())
        assert linear["epochs"] == 2 and 0 <= linear["acc1"] <= linear["best_acc1"] <= 100
        assert read_checkpoint(find_checkpoint(run.out / "linear" / "v"))["global_step"] == steps
        assert ("resuming after epoch 1 of 3" in text) is resumes
    assert "nothing left to train" in run(*options, kind="linear", config="linear")


def _epochs_of(path: Path) -> list[int]:
    with path.open(newline="") as file:
        return [int(row["epoch"]) for row in csv.DictReader(file)]


def test_a_resumed_run_trains_all_steps_and_saves_them(run):
    """Epochs of two batches; a run that was stopped after an epoch, one cut off within one, and a one-epoch stream."""
    more = ("max_epochs=4", "+max_steps=7", "++checkpoint.keep_prev=true", "auto_resume.enabled=true")
    more = (*more, "++method_kwargs.log_eigvals=true")
    run(*more)
    for epoch in (2, 3):
        next(run.folder.glob(f"*-ep={epoch}.ckpt")).unlink()
    (run.folder / "pretrain.json").unlink()
    text = run(*more)
    assert "resuming after epoch 2 of 4" in text and "epoch 2/4" not in text
    assert (_summary(run)["epochs"], _summary(run)["steps"]) == (4, 7)
    assert next(run.folder.glob("*-ep=3.ckpt"))
    assert read_checkpoint(find_checkpoint(run.folder))["global_step"] == 7
    assert _epochs_of(run.folder / "eigenvalues.csv") == [0, 1, 2, 3]
    assert "nothing left to train" in run(*more)


_LONGER = ("max_epochs=4", "++checkpoint.frequency=10", "auto_resume.enabled=true", "++method_kwargs.log_eigvals=true")
_LONGER += ("scheduler.name=none", "momentum.base_tau=0.9", "momentum.final_tau=0.9")  # do not depend on the length


@pytest.fixture(scope="module")
def seven_steps(new_run, tmp_path_factory):
    """The checkpoint of a run of seven steps, without interruption."""
    run = new_run(tmp_path_factory.mktemp("seven") / "runs")
    run(*_LONGER, "+max_steps=7")
    return read_checkpoint(find_checkpoint(run.folder))


@pytest.mark.parametrize("first", [3, 4])
def test_a_run_is_made_longer_after_any_step(first, run, seven_steps):
    """The epoch that the limit cut off is continued with its other images; the last checkpoint has all steps."""
    run(*_LONGER, f"+max_steps={first}")
    text = run(*_LONGER, "+max_steps=7")
    assert f"resuming after epoch {first // 2} of 4" in text and "not resumable" not in text
    assert (_summary(run)["epochs"], _summary(run)["steps"]) == (4, 7)
    checkpoint = read_checkpoint(find_checkpoint(run.folder))
    assert checkpoint["global_step"] == 7
    assert all(torch.equal(value, seven_steps["state_dict"][key]) for key, value in checkpoint["state_dict"].items())
    assert _epochs_of(run.folder / "eigenvalues.csv") == [0, 1, 2, 3]


def test_a_stream_of_one_epoch_is_made_longer(run):
    """An epoch of two batches, of which the first run trains on one."""
    more = ("max_epochs=1", "auto_resume.enabled=true")
    run(*more, "+max_steps=1")
    assert "nothing left to train" in run(*more, "+max_steps=1")
    run(*more, "+max_steps=2")
    assert (_summary(run)["epochs"], _summary(run)["steps"]) == (1, 2)


def _commands_of_the_page() -> list[list[str]]:
    """The words after the configuration's name in the commands of SEER's page."""
    text = (Path(__file__).parents[2] / "docs" / "methods" / "seer.md").read_text()
    blocks = [block for block in text.split("```bash\n")[1:] if "--config-name seer.yaml" in block]
    return [block.split("```")[0].partition("seer.yaml \\\n")[2].split() for block in blocks]


@pytest.mark.parametrize(("number", "steps", "epochs"), [(0, 2, 1), (1, 8, 4)])
def test_seers_recipes_train_as_many_steps_as_they_say(number, steps, epochs, run):
    """Two batches are an epoch here, 20 on the page; the schedule ends at the last step."""
    words = _commands_of_the_page()[number]
    small = {"+max_steps=20": "+max_steps=2", "+limit_train_batches=5": "+limit_train_batches=2"}
    run(*(small.get(word, word) for word in words), config="seer")
    summary = _summary(run, "seer")
    assert (summary["steps"], summary["epochs"]) == (steps, epochs)
    checkpoint = read_checkpoint(find_checkpoint(run.out / "seer" / "v"))
    (schedule,) = checkpoint["lr_schedulers"]
    assert schedule["last_epoch"] == checkpoint["global_step"] == steps
    assert schedule["_last_lr"][0] == pytest.approx(1e-5)
    assert len(list((run.out / "seer" / "v").glob("*.ckpt"))) == 1
