"""A method with a memory of images, patches, a frozen and re-initialised predictor and a loss with parameters."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.vissl

EPOCHS = 2


@pytest.mark.slow
def test_a_killed_training_of_two_processes_ends_the_same(
    few_digits: Path, tmp_path: Path, launches: Callable, toys: ModuleType, watched: ModuleType
) -> None:
    def job(kind: str, *more: str) -> dict[str, Any]:
        argv = [
            *(*toys.CONFIG, f"config.CHECKPOINT.DIR={tmp_path / kind}", "config.CHECKPOINT.CHECKPOINT_FREQUENCY=1"),
            *("config.DISTRIBUTED.NUM_PROC_PER_NODE=2", "config.DATA.TRAIN.BATCHSIZE_PER_REPLICA=16"),
            *(f"config.OPTIMIZER.num_epochs={EPOCHS}", *more),
        ]
        return {"argv": argv, "folder": str(few_digits.parents[1]), "watch": True, "toys": True}

    jobs = [job("whole"), {**job("cut"), "when": str(tmp_path / "cut" / "model_phase0.torch")}, job("cut")]
    results = launches(jobs)
    assert [result["status"] for result in results] == [0, -signal.SIGKILL, 0], results
    differ = json.loads((tmp_path / "whole" / watched.REPORT).read_text())
    steps = 96 // 32 * EPOCHS
    assert {"loss.objective.criterion.bank.rows", "loss.objective.criterion.scale"} < set(differ.pop("names"))
    assert differ.pop("clock") == [steps, steps // EPOCHS]
    assert set(differ) == {"start", *(f"step {step}" for step in range(1, steps + 1))}
    assert not any(differ.values()), differ
    one, other = (
        torch.load(tmp_path / kind / f"model_final_checkpoint_phase{EPOCHS - 1}.torch", weights_only=True)
        for kind in ("whole", "cut")
    )
    assert_same(one["loss"], other["loss"])
    for part in ("base_model", "optimizer", "loss"):
        assert_same(one["classy_state_dict"][part], other["classy_state_dict"][part])
    different = {name for state in one["classy_state_dict"]["loss_of_ranks"] for name in state}
    assert different and all(name.startswith("teacher.module.trunk.layers.1.running_") for name in different), different
    assert one["loss"]["objective.criterion.bank.rows"].shape == (96, toys.D)
    passes = one["classy_state_dict"]["base_model"]["model"]["heads"]["0.predictor.passes"]
    assert passes.tolist() == [EPOCHS, EPOCHS * 96, steps, steps]


def assert_same(ours: Any, theirs: Any) -> None:
    """Equal to the bit."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert_same(value, theirs[key])
    elif isinstance(ours, Tensor):
        assert torch.equal(ours, theirs)
    else:
        assert ours == theirs
