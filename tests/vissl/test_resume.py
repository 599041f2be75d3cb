"""A training that is killed reaches the weights of one that is not; its summary counts both parts."""

import json
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import vissl_ext  # noqa: F401 - mends VISSL
from vissl_ext.summary import Summary

pytestmark = pytest.mark.vissl

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


def test_summary_counts_the_parts_of_a_resumed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("vissl_ext.summary.time", SimpleNamespace(perf_counter=lambda: now))
    config = {"LOSS": {"name": "isoloss"}, "SEED_VALUE": 1, "OPTIMIZER": {"num_epochs": 2}}
    task = SimpleNamespace(train=True, checkpoint=None, checkpoint_folder=tmp_path, config=config)
    for start in (100.0, 900.0):
        hook, now = Summary(), start
        hook.on_start(task)
        now += 3
        hook.on_phase_start(task)
        for indices in ([4, 2, 4, 2], [1, 1]):  # two views of each; the second batch has one image
            now += 2
            task.last_batch = SimpleNamespace(sample={"data_idx": [torch.tensor(indices)]})
            hook.on_step(task)
        # VISSL saves a hook's state before the end of an epoch reaches it
        task.checkpoint = {"classy_state_dict": {"hooks": {"Summary": dict(hook.get_classy_state())}}}
        now += 1
        hook.on_phase_end(task)
    hook.on_end(task)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["seconds"] == (3 + 4) + (3 + 4 + 1)
    assert summary["images_per_second"] == pytest.approx((3 + 3) / (4 + 5))


@pytest.mark.slow
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
    # of both parts, each image once an epoch
    assert state["hooks"]["Summary"]["images"] == others["hooks"]["Summary"]["images"] == EPOCHS * 96
    rows = [(folder / "metrics.csv").read_text().splitlines() for folder in (whole, killed)]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 1 + EPOCHS
