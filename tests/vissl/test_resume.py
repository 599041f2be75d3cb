"""A training that is killed reaches the weights of one that is not; its summary counts both parts."""

import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from vissl.data.collators import COLLATOR_REGISTRY

from plugins.methods import METHODS
from vissl_ext.summary import Summary, images

pytestmark = pytest.mark.vissl

EPOCHS = 3
SMALL = {
    "isoloss": {"proj_hidden_dim": 32, "proj_output_dim": 16},
    "byol": {"proj_hidden_dim": 32, "proj_output_dim": 16},
    "amdim": {"proj_output_dim": 16},  # draws locations by the seed and the step
    "cpc": {"context_hidden_dim": 16, "proj_output_dim": 16, "num_negatives": 8},  # draws negatives likewise
}
"""Method → options that make its run small."""
SAMPLER = "DATA.TRAIN.USE_STATEFUL_DISTRIBUTED_SAMPLER"


def overrides(method: str, folder: Path) -> list[str]:
    return [
        f"config=pretrain/{method}/digits",
        "config.DATA.TRAIN.BATCHSIZE_PER_REPLICA=16",
        "config.DATA.TRAIN.DATA_LIMIT=48",
        f"config.OPTIMIZER.num_epochs={EPOCHS}",
        "config.CHECKPOINT.CHECKPOINT_FREQUENCY=1",
        f"config.CHECKPOINT.DIR={folder}",
        *(f"config.LOSS.{method}.{key}={value}" for key, value in SMALL[method].items()),
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
    config = {"LOSS": {"name": "isoloss"}, "DATA": {}, "SEED_VALUE": 1, "OPTIMIZER": {"num_epochs": 2}}
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


@pytest.mark.parametrize("name", ["siamese_collator", "patch_and_image_collator"])
def test_summary_counts_images_where_vissl_leaves_their_indices_out(name: str) -> None:
    size = (9, 3, 4, 4) if name == "siamese_collator" else (3, 4, 4)
    valid = [True] * (1 if name == "siamese_collator" else 10)
    row = {"data": [torch.zeros(size)] * len(valid), "label": [torch.tensor(1)] * len(valid), "data_valid": valid}
    batch = COLLATOR_REGISTRY[name]([{**row, "data_idx": [number] * len(valid)} for number in range(5)])
    assert images(batch) == 5


@pytest.fixture(scope="module")
def ended(
    few_digits: Path, tmp_path_factory: pytest.TempPathFactory, launches: Callable
) -> dict[str, tuple[Path, Path]]:
    """Method → the folder of its uninterrupted training, and of the one that was killed and went on."""
    folders, jobs = {}, []
    for method in SMALL:
        whole, killed = folders[method] = tuple(
            tmp_path_factory.mktemp(f"{method}_{kind}") for kind in ("whole", "cut")
        )
        for folder in (whole, killed, killed):
            jobs.append({"argv": overrides(method, folder), "folder": str(few_digits.parents[1])})
        jobs[-2]["when"] = str(killed / "model_phase0.torch")
    results = launches(jobs)
    assert [result["status"] for result in results] == [0, -signal.SIGKILL, 0] * len(SMALL), results
    for number in range(len(SMALL)):
        assert "resumed after " in results[3 * number + 2]["output"]
    return folders


@pytest.mark.slow
@pytest.mark.parametrize("method", SMALL)
def test_killed_training_ends_the_same(method: str, ended: dict[str, list[Path]]) -> None:
    whole, killed = ended[method]
    one, other = final(whole), final(killed)
    assert one["iteration"] == other["iteration"] == EPOCHS * 3
    # a teacher has as many tensors as the model; of the others, the loss has the clock of their draws
    assert assert_same(one["loss"], other["loss"], "loss") > (60 if METHODS[method].teacher else 0)
    state, others = one["classy_state_dict"], other["classy_state_dict"]
    assert assert_same(state["base_model"]["model"], others["base_model"]["model"], "model") > 60
    assert assert_same(state["optimizer"]["optim"]["state"], others["optimizer"]["optim"]["state"], "optimiser") > 60
    heads = state["base_model"]["model"]["heads"]
    if method in ("amdim", "cpc"):
        clocks = [value for name, value in one["loss"].items() if name.endswith("clock.steps")]
        assert clocks == [EPOCHS * 3]
    if method == "isoloss":
        assert int(heads["0.predictor.steps"]) == 2 * EPOCHS * 3
        assert float(heads["0.predictor.C"].trace()) > 0
    # of both parts, each image once an epoch
    assert state["hooks"]["Summary"]["images"] == others["hooks"]["Summary"]["images"] == EPOCHS * 48
    rows = [(folder / "metrics.csv").read_text().splitlines() for folder in (whole, killed)]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 1 + EPOCHS


@pytest.mark.slow
def test_killed_training_of_two_processes_ends_the_same(
    few_digits: Path, tmp_path: Path, launches: Callable, watched: ModuleType
) -> None:
    """The launcher seeds each process differently; what they hold is the same nevertheless."""
    jobs = [
        {
            "argv": [*overrides("isoloss", tmp_path / kind), *watched.TINY, "config.DISTRIBUTED.NUM_PROC_PER_NODE=2"],
            "folder": str(few_digits.parents[1]),
            "watch": True,
        }
        for kind in ("whole", "cut", "cut")
    ]
    for job in jobs:
        job["argv"].append("config.DATA.TRAIN.DATA_LIMIT=96")
    jobs[1]["when"] = str(tmp_path / "cut" / "model_phase0.torch")
    results = launches(jobs)
    assert [result["status"] for result in results] == [0, -signal.SIGKILL, 0], results
    differ = json.loads((tmp_path / "whole" / watched.REPORT).read_text())
    assert any(name.startswith("loss.teacher") for name in differ.pop("names"))
    assert differ.pop("clock") == [3 * EPOCHS, 3]
    assert set(differ) == {"start", *(f"step {step}" for step in range(1, 3 * EPOCHS + 1))}
    assert not any(differ.values()), differ
    one, other = (final(tmp_path / kind) for kind in ("whole", "cut"))
    assert assert_same(one["loss"], other["loss"], "loss") > 10
    for part in ("base_model", "optimizer"):
        assert assert_same(one["classy_state_dict"][part], other["classy_state_dict"][part], part) > 10


@pytest.mark.slow
def test_a_run_resumes_within_an_epoch_and_ends(few_digits: Path, tmp_path: Path, launches: Callable) -> None:
    argv = [*overrides("isoloss", tmp_path), "config.CHECKPOINT.CHECKPOINT_ITER_FREQUENCY=2"]
    job = {"argv": argv, "folder": str(few_digits.parents[1])}
    (whole,) = launches([job])
    assert whole["status"] == 0, whole["output"][-3000:]
    for path in tmp_path.glob("*.torch"):
        if path.name != "model_iteration4.torch":
            path.unlink()
    other, resumed = launches([{**job, "argv": [*argv, f"config.{SAMPLER}=false"]}, job])
    assert other["status"] == 2 and f"requires config.{SAMPLER}=true, got false" in other["output"], other["output"]
    assert resumed["status"] == 0, resumed["output"][-3000:]
    assert "resumed after 4 of 9" in resumed["output"]
    assert final(tmp_path)["iteration"] == EPOCHS * 3


PER_PROCESS = {
    "DeepCluster v2": [
        *("config.MODEL.HEAD.PARAMS=[[mlp,{dims:[8,8]}]]", "config.LOSS.deepclusterv2_loss.num_clusters=[4,4]"),
        "config.LOSS.deepclusterv2_loss.memory_params.embedding_dim=8",
    ],
    "SwAV": [
        *("config.MODEL.HEAD.PARAMS=[[swav_head,{dims:[8,8],use_bn:false,num_clusters:[4]}]]",),
        *("config.LOSS.swav_loss.queue.queue_length=16", "config.LOSS.swav_loss.embedding_dim=8"),
        *("config.LOSS.swav_loss.num_prototypes=[4]", "config.MODEL.TEMP_FROZEN_PARAMS_ITER_MAP=[]"),
    ],
}
"""Losses of VISSL that keep other tensors in each process, on a tiny network."""
NPID = [
    "config.MODEL.HEAD.PARAMS=[[mlp,{dims:[8,8]}]]",
    "config.LOSS.nce_loss_with_memory.memory_params.embedding_dim=8",
]
"""A loss that keeps a memory bank of all images, the same in each process, on a tiny network."""


def killed_and_resumed(
    method: str, options: list[str], commands: dict, folder: Path, launches: Callable, watched: ModuleType
) -> tuple[dict[str, Any], ...]:
    """Train in two processes: uninterrupted in the folder "whole"; killed after an epoch, and resumed, in "cut".

    The resumed run has two processes, and one with the same joined batch in "one", a copy of the folder.

    Returns:
        The final checkpoints of "whole" and "cut", and the result of the launch in "one".
    """

    def job(kind: str, processes: int, batch: int) -> dict[str, Any]:
        argv = [*commands[method](folder / kind, 2), *watched.TINY[:1], *options]
        argv += [f"config.DISTRIBUTED.NUM_PROC_PER_NODE={processes}", "config.CHECKPOINT.CHECKPOINT_FREQUENCY=1"]
        argv.append(f"config.DATA.TRAIN.BATCHSIZE_PER_REPLICA={batch}")
        return {"argv": argv, "folder": str(folder), "watch": True}

    # the group: without the launcher alone, the processes could end their second epoch of one step
    killed = {**job("cut", 2, 8), "when": str(folder / "cut" / "model_phase0.torch"), "group": True}
    whole, cut = launches([job("whole", 2, 8), killed])
    assert (whole["status"], cut["status"]) == (0, -signal.SIGKILL), (whole, cut)
    shutil.copytree(folder / "cut", folder / "one", symlinks=True)
    resumed, one = launches([job("cut", 2, 8), {**job("one", 1, 16), "watch": False}])
    assert resumed["status"] == 0, resumed
    assert "resumed after 1 of 2 iterations" in resumed["output"]
    ends = (folder / kind / "model_final_checkpoint_phase1.torch" for kind in ("whole", "cut"))
    return *(torch.load(path, weights_only=True) for path in ends), one


@pytest.mark.slow
def test_a_memory_bank_is_the_same_in_all_processes_and_resumes_with_another_number(
    stock_commands: dict, tmp_path: Path, launches: Callable, watched: ModuleType
) -> None:
    whole, cut, one = killed_and_resumed("NPID", NPID, stock_commands, tmp_path, launches, watched)
    differ = json.loads((tmp_path / "whole" / watched.REPORT).read_text())
    bank = "nce_average.memory"
    assert f"loss.{bank}" in differ["names"]
    assert [differ[when] for when in ("start", "step 1", "step 2")] == [[], [], []]
    assert "loss_of_ranks" not in whole["classy_state_dict"]
    for part in ("base_model", "optimizer", "loss"):
        assert assert_same(whole["classy_state_dict"][part], cut["classy_state_dict"][part], part) > 0
    assert one["status"] == 0 and "resumed after 1 of 2 iterations" in one["output"], one["output"][-3000:]
    before, after = (
        torch.load(tmp_path / "one" / f"model_{name}.torch", weights_only=True)["loss"][bank]
        for name in ("phase0", "final_checkpoint_phase1")
    )
    # momentum 0.5: a new row is the normalised sum of the old one, of norm 1, and an embedding of norm 1
    assert not torch.equal(before, after) and bool(((before * after).sum(1) > 0).all())


@pytest.mark.slow
@pytest.mark.parametrize("method", PER_PROCESS)
def test_resume_restores_the_loss_of_each_process(
    method: str, stock_commands: dict, tmp_path: Path, launches: Callable, watched: ModuleType
) -> None:
    one, other, single = killed_and_resumed(method, PER_PROCESS[method], stock_commands, tmp_path, launches, watched)
    ranks = one["classy_state_dict"]["loss_of_ranks"]
    name = "local_memory_embeddings" if method == "DeepCluster v2" else "swav_criterion.local_emb_queue"
    assert not torch.equal(ranks[0][name], ranks[1][name])
    for ours, theirs in zip(ranks, other["classy_state_dict"]["loss_of_ranks"], strict=True):
        assert assert_same(ours, theirs, "loss of a process") > 0
    for part in ("base_model", "optimizer", "loss"):
        assert assert_same(one["classy_state_dict"][part], other["classy_state_dict"][part], part) > 0
    assert single["status"] == 2, single["output"][-3000:]
    (error,) = [line for line in single["output"].splitlines() if line.startswith("error: ")]
    assert re.match(r"error: .*the loss has \S+ of shape .* in the checkpoint .*resume with the same config", error)
