"""A training that is killed reaches the weights of one that is not."""

import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.vissl, pytest.mark.slow]

EPOCHS = 6


def overrides(method: str, folder: Path) -> list[str]:
    return [
        f"config=pretrain/{method}/digits",
        "config.DATA.TRAIN.BATCHSIZE_PER_REPLICA=32",
        f"config.OPTIMIZER.num_epochs={EPOCHS}",
        "config.CHECKPOINT.CHECKPOINT_FREQUENCY=1",
        f"config.CHECKPOINT.DIR={folder}",
    ]


def final(folder: Path) -> dict[str, Any]:
    return torch.load(folder / f"model_final_checkpoint_phase{EPOCHS - 1}.torch", weights_only=False)


def assert_same(ours: Any, theirs: Any, place: str) -> int:
    """Equal to the bit; how many tensors there were."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), place
        return sum(assert_same(value, theirs[key], f"{place}.{key}") for key, value in ours.items())
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), place
        return 1
    assert ours == theirs, place
    return 0


@pytest.mark.parametrize("method", ["isoloss", "byol"])
def test_killed_training_ends_the_same(method: str, tmp_path: Path, launch: Any, start_launch: Any) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    launch(*overrides(method, whole))

    process: subprocess.Popen = start_launch(*overrides(method, killed))
    deadline = time.monotonic() + 300
    while not (killed / "model_phase1.torch").exists():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / f"model_final_checkpoint_phase{EPOCHS - 1}.torch").exists()
    launch(*overrides(method, killed))

    one, other = final(whole), final(killed)
    assert one["iteration"] == other["iteration"] == EPOCHS * 3
    assert assert_same(one["loss"], other["loss"], "teacher") > 60
    state, others = one["classy_state_dict"], other["classy_state_dict"]
    assert assert_same(state["base_model"]["model"], others["base_model"]["model"], "model") > 120
    assert assert_same(state["optimizer"]["optim"]["state"], others["optimizer"]["optim"]["state"], "optimiser") > 120
    heads = state["base_model"]["model"]["heads"]
    if method == "isoloss":
        assert int(heads["0.predictor.steps"]) == 2 * EPOCHS * 3
        assert float(heads["0.predictor.C"].trace()) > 0
    rows = [(folder / "metrics.csv").read_text().splitlines() for folder in (whole, killed)]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 1 + EPOCHS
