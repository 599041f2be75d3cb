"""The files of a run that is killed, stopped or started twice, or whose disk is full."""

import csv
import errno
import json
import os
import random
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from plugins.tools.process import locked_folder
from solo_ext.checkpoint import find_checkpoint, read_checkpoint

pytestmark = [pytest.mark.solo, pytest.mark.slow]


@pytest.fixture
def run(new_run, tmp_path):
    return new_run(tmp_path / "runs")


def test_twenty_kills_lose_no_run(run):
    """SIGKILL at random moments: the newest checkpoint can be read, and the records hold all of its epochs."""
    moments = random.Random(0)
    more = ("max_epochs=1000", "auto_resume.enabled=true", "++method_kwargs.log_eigvals=true", "++limit_val_batches=0")
    reached = -1
    for kill in range(20):
        process = run.start(*more)
        run.wait_for(process, f"*-ep={reached + 1}.ckpt")
        time.sleep(moments.uniform(0, 0.25))
        os.kill(process.pid, signal.SIGKILL)
        process.wait(120)
        newest = find_checkpoint(run.folder)
        epochs = int(newest.stem.rpartition("=")[2])
        assert read_checkpoint(newest)["epoch"] == epochs > reached, f"kill {kill}"
        reached = epochs
        assert json.loads((run.folder / "args.json").read_text())["max_epochs"] == 1000
    text = run(*more, f"max_epochs={reached + 2}")
    assert f"resuming after epoch {reached + 1} of {reached + 2}" in text and "skipped" not in text
    assert [path.name for path in run.folder.glob(".*")] == [".lock"], "temporary files of the killed are gone"
    for name in ("metrics.csv", "eigenvalues.csv"):
        with (run.folder / name).open(newline="") as file:
            epochs = [int(row["epoch"]) for row in csv.DictReader(file) if row["epoch"]]
        assert sorted(set(epochs)) == list(range(reached + 2)) and epochs == sorted(epochs), name


def test_the_newest_readable_checkpoint_is_resumed(run):
    run("max_epochs=2", "++checkpoint.keep_prev=true")
    newest, older = (run.folder / f"isoloss-digits-v-ep={epoch}.ckpt" for epoch in (1, 0))
    newest.write_bytes(newest.read_bytes()[:-5000])
    text = run("max_epochs=2", "auto_resume.enabled=true")
    assert text.count("skipped: ") == 1 and f"skipped: {newest} cannot be read as a checkpoint" in text
    assert f"resuming after epoch 1 of 2 from {older}" in text
    read_checkpoint(newest)


def _small_disk(folder: Path, size: int) -> bool:
    """Mount a file system of that many bytes; whether that is allowed here."""
    folder.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    return subprocess.run(options, capture_output=True, check=False).returncode == 0


def test_a_full_disk_keeps_the_checkpoint_of_before(new_run, tmp_path):
    """A separate file system of the size of 1.5 checkpoints; for an ordinary user a limit of file size."""
    whole = new_run(tmp_path / "whole")
    whole("max_epochs=1")
    size = find_checkpoint(whole.folder).stat().st_size
    mounted = _small_disk(tmp_path / "small", size * 3 // 2 + 200_000)
    try:
        run = new_run(tmp_path / "small")
        run("max_epochs=1")
        first = find_checkpoint(run.folder)
        content = first.read_bytes()
        if mounted:
            (tmp_path / "small" / "filler").write_bytes(
                bytes(os.statvfs(tmp_path / "small").f_bavail * 4096 - size // 2)
            )
            run.log = tmp_path / "log"  # on a disk that is not full
        else:
            resource.prlimit(run.start("--help").pid, resource.RLIMIT_FSIZE, (size // 2, size // 2))
        process = run.start("max_epochs=3", "auto_resume.enabled=true")
        if not mounted:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size // 2, size // 2))
        assert process.wait(300) == 2, run.log.read_text()
        (error,) = run.said("stopped by ")
        reason = os.strerror(errno.ENOSPC if mounted else errno.EFBIG)
        assert "cannot be written" in error and reason in error, error
        assert find_checkpoint(run.folder) == first and first.read_bytes() == content
    finally:
        if mounted:
            subprocess.run(["umount", str(tmp_path / "small")], check=True)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_ends_with_a_status_and_says_how_to_go_on(number, status, run):
    process = run.start("max_epochs=1000")
    run.wait_for(process, "*-ep=1.ckpt")
    os.kill(process.pid, number)
    assert process.wait(120) == status, run.log.read_text()
    (error,) = run.said("stopped by ")
    newest = find_checkpoint(run.folder)
    assert error == (
        f"stopped by {number.name} before the end; add \"++resume_from_checkpoint='{newest}'\" to the command to resume"
    )
    done = int(newest.stem.rpartition("=")[2]) + 1
    more = (f"++resume_from_checkpoint='{newest}'", f"max_epochs={done + 1}")
    assert f"resuming after epoch {done}" in run(*more)


@pytest.mark.ddp
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_process_of_two_outlives_the_first(number, run):
    """SIGTERM: status 143 and one line. SIGKILL: the second process sees that the first is gone."""
    argv = [*("auto_resume.enabled=true", "++devices=2", "++strategy=ddp", "max_epochs=1000")]
    process = run.start(*argv)
    run.wait_for(process, "*-ep=0.ckpt")
    children = _children(process.pid)
    assert children
    os.kill(process.pid, number)
    assert process.wait(120) == (143 if number == signal.SIGTERM else -9), run.log.read_text()
    if number == signal.SIGTERM:
        (error,) = run.said("stopped by ")
        newest = find_checkpoint(run.folder)
        assert error == f"stopped by SIGTERM before the end; run the same command again to resume from {newest}"
    deadline = time.monotonic() + 120
    while alive := [pid for pid in children if _runs(pid)]:
        assert time.monotonic() < deadline, f"{alive} still run"
        time.sleep(0.1)


def _children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_saving_removes_only_what_the_run_wrote(run):
    run("max_epochs=2", "++checkpoint.keep_prev=true")
    favourite = run.folder / "my-favourite.ckpt"
    favourite.write_bytes((run.folder / "isoloss-digits-v-ep=0.ckpt").read_bytes())
    os.utime(favourite, (0, 0))
    run("max_epochs=4", "auto_resume.enabled=true")
    kept = {f"isoloss-digits-v-ep={epoch}.ckpt" for epoch in (0, 1, 3)}
    assert {path.name for path in run.folder.glob("*.ckpt")} == {*kept, favourite.name}
    run("max_epochs=5", "auto_resume.enabled=true")
    kept = {*kept, "isoloss-digits-v-ep=4.ckpt"} - {"isoloss-digits-v-ep=3.ckpt"}
    assert {path.name for path in run.folder.glob("*.ckpt")} == {*kept, favourite.name}


def test_another_run_in_the_folder_is_named(run):
    """Anything that changes images, objective or optimisation; a run may be made longer."""
    run("max_epochs=1", "auto_resume.enabled=true")
    shares = ("data.fraction", "++data.fraction=0.5", "-1", "0.5")
    for name, other, theirs, ours in (
        shares,
        (
            "data.train_path",
            f"data.train_path={run.digits / 'train'}",
            str(run.digits / "val"),
            str(run.digits / "train"),
        ),
        ("optimizer.batch_size", "optimizer.batch_size=8", "16", "8"),
        ("gradient_clip_val", "++gradient_clip_val=1.5", "None", "1.5"),
    ):
        run("max_epochs=2", "auto_resume.enabled=true", other, status=2)
        (error,) = run.said("stopped by ")
        assert (
            f"{run.folder} contains a run with other settings: {name} is {theirs} there, and {ours} in this run"
            in error
        )
    # a run of before these entries were recorded
    args = json.loads((run.folder / "args.json").read_text())
    del args["identity"]["data"], args["identity"]["gradient_clip_val"]
    args["identity"]["custom_data"] = None
    (run.folder / "args.json").write_text(json.dumps(args))
    run("max_epochs=2", "auto_resume.enabled=true", shares[1], status=2)
    assert "data.fraction is -1 there, and 0.5 in this run" in run.log.read_text()
    assert "resuming after epoch 1 of 2" in run("max_epochs=2", "auto_resume.enabled=true")
    assert "nothing left to train" in run("max_epochs=2", "auto_resume.enabled=true")


def test_a_summary_counts_the_epochs_before(run):
    """Linear evaluation: the best accuracy, the time and the metrics of a run that was resumed after its last epoch."""
    run("max_epochs=0")
    more = (f"pretrained_feature_extractor={run.folder}", "++auto_resume.enabled=true")
    run(*more, "max_epochs=3", kind="linear", config="linear")
    folder = run.out / "linear" / "v"
    first = json.loads((folder / "linear.json").read_text())
    checkpoint = find_checkpoint(folder)
    state = torch.load(checkpoint, weights_only=True)
    state["callbacks"]["BestAccuracy"]["acc1"] = 99.5
    state["callbacks"]["Totals"]["seconds"] = 1e6
    torch.save(state, checkpoint)
    (folder / "linear.json").unlink()  # killed before it was written
    for epochs in (3, 4):
        run(*more, f"max_epochs={epochs}", kind="linear", config="linear")
        second = json.loads((folder / "linear.json").read_text())
        assert second["best_acc1"] == 99.5 and second["seconds"] > 1e6
        assert epochs == 4 or second["acc1"] == first["acc1"]


def test_a_run_in_progress_is_not_started_twice(run, new_run):
    process = run.start("max_epochs=1000", "auto_resume.enabled=true")
    run.wait_for(process, "*-ep=0.ckpt")
    second = new_run(run.out)
    second.log = run.out / "second"
    second("max_epochs=1000", "auto_resume.enabled=true", status=2)
    (error,) = second.said()
    assert f"another run (process {process.pid} on " in error
    assert f"writes into {run.folder}; wait until it has ended" in error
    os.kill(process.pid, signal.SIGKILL)
    process.wait(120)
    with locked_folder(run.folder):  # freed by the death
        pass
