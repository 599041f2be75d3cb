"""Checkpoints and the folder of a run: no interruption of a training loses a checkpoint that was written."""

import errno
import json
import multiprocessing
import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from vissl.config import AttrDict
from vissl.utils import checkpoint
from vissl.utils.checkpoint import CheckpointWriter, get_resume_checkpoint, is_training_finished

import vissl_ext  # noqa: F401  (the shims)
from plugins.tools.bad_images import LIST
from plugins.tools.command import UserError
from vissl_ext import ranks
from vissl_ext.compat.checkpoints import checkpoints, reopen, set_aside, trained_epochs
from vissl_ext.launch import prepare
from vissl_ext.locks import lock

pytestmark = pytest.mark.vissl

FORK = multiprocessing.get_context("fork")


def config_of(epochs: int = 3, **options: Any) -> AttrDict:
    given = {"OVERWRITE_EXISTING": False, "AUTO_RESUME": True, "LATEST_CHECKPOINT_RESUME_FILE_NUM": 1, **options}
    return AttrDict(
        {
            "CHECKPOINT": {"CHECKPOINT_ITER_FREQUENCY": -1, **given},
            "OPTIMIZER": {"num_epochs": epochs},
            "DATA": {"TRAIN": {}},
        }
    )


def write(folder: Path, epoch: int, *, final: bool = False) -> None:
    content = {"epoch": epoch, "weights": torch.full((200, 1000), float(epoch))}
    CheckpointWriter(str(folder), final, "phase", epoch, "disk").save_consolidated_checkpoint(content)


def newest(folder: Path, **options: Any) -> int | None:
    path = get_resume_checkpoint(config_of(**options), str(folder))
    return path and torch.load(path, weights_only=True)["epoch"]


def _write_for_ever(folder: Path, done: Any) -> None:
    for epoch in range(trained_epochs(folder), 10**6):
        write(folder, epoch)
        done.send(epoch)


@pytest.mark.slow
def test_twenty_kills_lose_no_checkpoint(tmp_path: Path) -> None:
    draw, reached = random.Random(0), []
    for _ in range(20):
        ours, theirs = FORK.Pipe(duplex=False)
        process = FORK.Process(target=_write_for_ever, args=(tmp_path, theirs))
        process.start()
        last = ours.recv()  # one epoch at least
        time.sleep(draw.uniform(0, 0.03))
        process.kill()
        process.join()
        while ours.poll():
            last = ours.recv()
        ours.close()
        theirs.close()
        lock(tmp_path, 0)
        assert set_aside(tmp_path) == []
        reached.append(newest(tmp_path))
        assert reached[-1] in (last, last + 1)
    assert reached == sorted(set(reached))
    assert not list(tmp_path.glob("*.tmp"))


def test_resumes_from_the_newest_checkpoint_that_can_be_read(tmp_path: Path) -> None:
    for epoch in range(4):
        write(tmp_path, epoch)
    spoilt = tmp_path / "model_phase3.torch"
    content = bytearray(spoilt.read_bytes())
    content[len(content) // 2] ^= 1  # one bit of the weights
    spoilt.write_bytes(content)
    (tmp_path / "model_phase2.torch").write_bytes(bytes(5000))
    assert set_aside(tmp_path) == ["model_phase2.torch", "model_phase3.torch"]
    assert newest(tmp_path) == 1


def test_a_full_disk_raises_an_error_and_keeps_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 0)

    class Full:
        def __init__(self, file: Any) -> None:
            self.file, self.room = file, 50_000

        def write(self, part: Any) -> int:
            self.room -= len(part)
            if self.room < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.file.write(part)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    save = torch.save
    monkeypatch.setattr(torch, "save", lambda content, file: save(content, Full(file)))
    message = f"{tmp_path}/model_phase1.torch cannot be written: No space left on device; free space on the disk, then "
    with pytest.raises(
        UserError, match=f"^{re.escape(message)}run the same command again to resume from the last checkpoint$"
    ):
        write(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.torch", "model_phase0.torch"]
    assert newest(tmp_path) == 0


def test_files_of_a_user_are_not_changed(tmp_path: Path) -> None:
    for name in ("my-favourite.ckpt", "my-favourite.torch", "best_model_final.torch", "model_phase1.old.torch"):
        (tmp_path / name).write_bytes(b"PK not one of torch")
    (tmp_path / "checkpoint.torch").write_bytes(b"kept by hand")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert checkpoint.has_final_checkpoint(str(tmp_path)), "mended upstream"
    assert not is_training_finished(config_of(), checkpoint_folder=str(tmp_path))
    assert newest(tmp_path) is None
    write(tmp_path, 0)
    assert set_aside(tmp_path) == []
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert newest(tmp_path) == 0


def test_a_training_ends_after_its_epochs_and_continues_with_more(tmp_path: Path) -> None:
    write(tmp_path, 1)
    write(tmp_path, 2, final=True)
    for epochs, finished in ((2, True), (3, True), (4, False)):
        assert is_training_finished(config_of(epochs), checkpoint_folder=str(tmp_path)) is finished
    assert not is_training_finished(config_of(3, OVERWRITE_EXISTING=True), checkpoint_folder=str(tmp_path))
    assert newest(tmp_path, OVERWRITE_EXISTING=True) == 1
    assert is_training_finished(config_of(4, AUTO_RESUME=False), checkpoint_folder=str(tmp_path))
    assert (reopen(tmp_path), reopen(tmp_path)) == (3, 0)
    assert [path.name for path in checkpoints(tmp_path)] == ["model_phase2.torch", "model_phase1.torch"]
    assert torch.load(tmp_path / "checkpoint.torch", weights_only=True)["epoch"] == newest(tmp_path) == 2
    assert newest(tmp_path, LATEST_CHECKPOINT_RESUME_FILE_NUM=2) == 1
    assert is_training_finished(config_of(3), checkpoint_folder=str(tmp_path))


def _hold(folder: Path, begun: Any) -> None:
    lock(folder, 0)
    begun.send(None)
    signal.pause()


def test_a_second_launcher_raises_an_error_until_the_first_has_ended(few_digits: Path, tmp_path: Path) -> None:
    argv = ["config=pretrain/isoloss/digits", f"config.DATA.TRAIN.DATA_PATHS=[{few_digits}/train]"]
    argv.append(f"config.CHECKPOINT.DIR={tmp_path}")
    ours, theirs = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_hold, args=(tmp_path, theirs))
    process.start()
    ours.recv()
    try:
        refused = rf"another run \(process {process.pid} on [^)]+\) writes into {re.escape(str(tmp_path))}; wait"
        with pytest.raises(UserError, match=refused):
            prepare(argv, [])
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
        lock(tmp_path, 1)  # another machine of the same training
    finally:
        process.kill()
        process.join()
    prepare(argv, [])


def _start(pids: Any) -> None:
    child = FORK.Process(target=_follow)
    child.start()
    pids.send(child.pid)
    signal.pause()


def _follow() -> None:
    ranks.catalog.register = lambda config: None
    ranks._vissl_worker = lambda *_: time.sleep(600)
    ranks.worker(0, AttrDict({"MACHINE": {"DEVICE": "gpu"}}))


def test_a_rank_ends_with_the_process_that_started_it() -> None:
    """torch.multiprocessing is not used, because Python drops its SIGINT during a finalizer."""
    ours, theirs = FORK.Pipe(duplex=False)
    parent = FORK.Process(target=_start, args=(theirs,))
    parent.start()
    child = ours.recv()
    os.kill(child, 0)
    parent.kill()
    parent.join()
    for _ in range(30_000):
        try:
            state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":  # nobody may be there to take its status
            return
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    raise AssertionError("it outlived its parent by five minutes")


@pytest.mark.slow
def test_a_finished_training_continues_with_more_epochs(
    few_digits: Path, tmp_path: Path, launches: Callable, watched: ModuleType
) -> None:
    def job(epochs: int) -> dict[str, Any]:
        argv = [
            *("config=pretrain/isoloss/digits", *watched.TINY, f"config.OPTIMIZER.num_epochs={epochs}"),
            *("config.DATA.TRAIN.BATCHSIZE_PER_REPLICA=16", "config.CHECKPOINT.CHECKPOINT_FREQUENCY=9"),
            *("config.LOSS.isoloss.proj_hidden_dim=12", "config.LOSS.isoloss.proj_output_dim=8"),
            *("config.DATA.TRAIN.DATA_LIMIT=32", f"config.CHECKPOINT.DIR={tmp_path}"),
        ]
        return {"argv": argv, "folder": str(few_digits.parents[1]), "watch": True}

    first, same, more, less = launches([job(2), job(2), job(4), job(3)])
    assert [result["status"] for result in (first, same, more, less)] == [0] * 4, more["output"][-3000:]
    message = "the training is finished after {} epochs; increase config.OPTIMIZER.num_epochs to continue it"
    assert message.format(2) in same["output"].splitlines()
    assert message.format(4) in less["output"].splitlines()
    assert (
        "config.OPTIMIZER.num_epochs was 2 and is now 4: from here on the learning rate and other schedules follow"
        in more["output"]
    )
    assert "resumed after 4 of 8 iterations" in more["output"]
    names = ["model_final_checkpoint_phase3.torch", "model_phase1.torch", "model_phase0.torch"]
    assert [path.name for path in checkpoints(tmp_path)] == names
    assert torch.load(checkpoints(tmp_path)[0], weights_only=False)["iteration"] == 8
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["epoch", "0", "1", "2", "3"]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_training_on_a_full_disk_ends_with_a_one_line_error(
    ranks: int, few_digits: Path, tmp_path: Path, launches: Callable, watched: ModuleType
) -> None:
    """The disk is full where a file would be larger than the system allows."""
    argv = [
        *("config=pretrain/byol/digits", *watched.TINY, "config.OPTIMIZER.num_epochs=2"),
        *("config.DATA.TRAIN.BATCHSIZE_PER_REPLICA=16", f"config.DISTRIBUTED.NUM_PROC_PER_NODE={ranks}"),
        *("config.LOSS.byol.proj_hidden_dim=32", "config.DATA.TRAIN.DATA_LIMIT=32"),
        *("config.CHECKPOINT.CHECKPOINT_FREQUENCY=1", f"config.CHECKPOINT.DIR={tmp_path}"),
    ]
    job = {"argv": argv, "folder": str(few_digits.parents[1]), "watch": True}
    (full,) = launches([{**job, "largest_file": 200_000}])
    assert full["status"] == 2 and not full["left"], full["output"][-3000:]
    message = (
        f"error: {tmp_path}/model_phase0.torch cannot be written: File too large; free space on the disk, then run the "
        "same command again to start from the beginning, since there is no checkpoint yet"
    )
    assert message in full["output"].splitlines(), full["output"]
    assert "Traceback" not in full["output"]
    assert checkpoints(tmp_path) == []


@pytest.mark.slow
def test_an_image_that_cannot_be_read_is_named_and_counted_once(
    few_digits: Path, tmp_path: Path, launches: Callable, watched: ModuleType
) -> None:
    """The folder has no classes, worker processes load the images, and the run has two epochs, then three."""
    images = tmp_path / "images"
    images.mkdir()
    for path in sorted(few_digits.glob("train/*/*.png"))[:16]:
        (images / f"{path.parent.name}-{path.name}").write_bytes(path.read_bytes())
    torn, empty = sorted(images.iterdir())[:2]
    content = torn.read_bytes()
    torn.write_bytes(content[:-40])
    empty.write_bytes(b"")
    argv = [
        *("config=pretrain/ssl_ey/digits", *watched.TINY, "config.OPTIMIZER.num_epochs=2"),
        *(f"config.DATA.TRAIN.DATA_PATHS=[{images}]", "config.DATA.TRAIN.BATCHSIZE_PER_REPLICA=8"),
        *("config.LOSS.ssl_ey.proj_hidden_dim=12", "config.LOSS.ssl_ey.proj_output_dim=4"),
        *("config.DATA.NUM_DATALOADER_WORKERS=2", "config.MULTI_PROCESSING_METHOD=fork"),
        *("config.LOG_FREQUENCY=1", f"config.CHECKPOINT.DIR={tmp_path}/run"),
    ]
    (result,) = launches([{"argv": argv, "folder": str(tmp_path), "watch": True}])
    assert result["status"] == 0, result["output"][-3000:]
    named = sorted(line for line in result["output"].splitlines() if "cannot be read" in line)
    assert [line.partition(" cannot be read as an image: ")[0] for line in named] == [str(torn), str(empty)]
    assert all(line.endswith("; it is replaced by a grey image or by another image of the training") for line in named)
    torn.write_bytes(content)
    argv[argv.index("config.OPTIMIZER.num_epochs=2")] = "config.OPTIMIZER.num_epochs=3"
    (resumed,) = launches([{"argv": argv, "folder": str(tmp_path), "watch": True}])
    assert resumed["status"] == 0 and "resumed after " in resumed["output"], resumed["output"][-3000:]
    counted = (
        "2 images could not be read: replaced by grey images or other images of the training; "
        f"list: {tmp_path}/run/{LIST}"
    )
    for output in (result["output"], resumed["output"]):
        assert output.splitlines().count(counted) == 1, output
    assert (tmp_path / "run" / LIST).read_text().splitlines() == [str(torn), str(empty)]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["bad_images"] == 2
