"""Atomic writing of checkpoints, and continuation of a finished run with more epochs.

classy_vision/generic/util.py:352 writes checkpoints non-atomically, and vissl/utils/checkpoint.py:443 regards a run as
finished if ``model_final_*.torch`` exists. Therefore a run that is killed while it writes can neither resume nor start
again, a finished run does not continue with more epochs, and any user's file with ``model_final`` in its name ends a
run. vissl/utils/checkpoint.py:143 creates a link relative to the working directory instead of to the link. If
checkpoints are also written every few iterations, vissl/utils/checkpoint.py:576 finds no other checkpoints; if it finds
none, vissl/utils/checkpoint.py:624 returns a file with the name ``None``.
"""

import os
import re
import sys
import zipfile
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

from plugins.tools.command import UserError
from plugins.tools.files import atomic

_OURS = re.compile(r"model_(?P<final>final_checkpoint_)?(?P<kind>phase|iteration)(?P<number>\d+)\.torch")
RESUMES = "run the same command again to resume from the last checkpoint"


def activate() -> None:
    """Replace VISSL's functions that write and find checkpoints, and the check whether a run is finished."""
    from vissl.utils import checkpoint

    replacements = (
        ("get_checkpoint_resume_files", _newest),
        ("get_resume_checkpoint", _there),
        ("is_training_finished", _finished),
    )
    for name, replacement in replacements:
        stock = getattr(checkpoint, name)
        if hasattr(stock, "__wrapped__"):
            continue
        for module in (checkpoint, sys.modules.get("vissl.utils.distributed_launcher")):
            if module is not None and hasattr(module, name):
                setattr(module, name, wraps(stock)(partial(replacement, stock)))
    checkpoint.CheckpointWriter._save = _save
    checkpoint.CheckpointWriter._create_symbolic_link = _link


def checkpoints(folder: Path, *, iterations: bool = True, final: bool = True) -> list[Path]:
    """List the checkpoints of a run, the newest first. Files with other names than VISSL's are ignored.

    Args:
        folder: folder of the run.
        iterations: whether to include checkpoints written within an epoch.
        final: whether to include the checkpoint of the end.
    """
    found = [(path, _OURS.fullmatch(path.name)) for path in folder.glob("model_*.torch")]
    kept = [
        path
        for path, name in found
        if name and (iterations or name["kind"] == "phase") and (final or not name["final"]) and path.is_file()
    ]
    return sorted(kept, key=lambda path: path.stat().st_mtime_ns, reverse=True)


def _number(path: Path) -> int:
    return int(re.findall(r"\d+", path.name)[-1])


def _save(self: Any, name: str, content: Any) -> None:
    import torch

    folder = Path(self.checkpoint_folder)
    try:
        with atomic(folder / name) as file:
            torch.save(content, file)
    except UserError as error:
        raise UserError(f"{error}; {room(folder)}") from None


def room(folder: Path) -> str:
    """Return the advice for a run whose disk is full, as the end of an error message."""
    return f"free space on the disk, then {resume_hint(folder)}"


def resume_hint(folder: Path) -> str:
    """Return the advice for an unfinished run, as the end of a message."""
    start = "run the same command again to start from the beginning, since there is no checkpoint yet"
    return RESUMES if checkpoints(folder) else start


def _link(self: Any, checkpoint_name: str) -> None:
    link_latest(Path(self.checkpoint_folder), checkpoint_name)


def link_latest(folder: Path, name: str) -> None:
    """Make checkpoint.torch a symbolic link to a checkpoint in the folder, unless it is a regular file."""
    link = folder / "checkpoint.torch"
    if link.exists() and not link.is_symlink():
        return
    temporary = folder / f".{link.name}.{os.getpid()}.tmp"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(name)
    temporary.replace(link)


def _newest(
    find: Callable[..., str | None],
    checkpoint_folder: str,
    config: Any,
    skip_final: bool = False,
    latest_checkpoint_resume_num: int = 1,
) -> str | None:
    """Return the newest checkpoint, including those of iterations if CHECKPOINT_ITER_FREQUENCY is set.

    Without CHECKPOINT_ITER_FREQUENCY, VISSL writes the checkpoint of an iteration only if the training diverges.
    """
    every = config.CHECKPOINT.CHECKPOINT_ITER_FREQUENCY
    found = checkpoints(Path(checkpoint_folder), iterations=every > 0, final=not skip_final)
    return found[min(max(latest_checkpoint_resume_num, 1), len(found)) - 1].name if found else None


def _there(find: Callable[..., str | None], cfg: Any, checkpoint_folder: str) -> str | None:
    """Return the checkpoint to resume from, or None if it does not exist."""
    path = find(cfg, checkpoint_folder)
    return path if path is not None and Path(path).is_file() else None


def _finished(finished: Callable[..., bool], cfg: Any, checkpoint_folder: str) -> bool:
    """Return whether the checkpoints have as many epochs as the configuration."""
    folder, options = Path(checkpoint_folder), cfg["CHECKPOINT"]
    if options["OVERWRITE_EXISTING"]:
        return False
    if not options["AUTO_RESUME"]:
        return any("final" in path.name for path in checkpoints(folder))
    return trained_epochs(folder) >= epochs(cfg)


def epochs(cfg: Any) -> int:
    """Return the number of epochs of a configuration; VISSL counts training phases."""
    return int(cfg["OPTIMIZER"]["num_epochs"] * cfg["DATA"]["TRAIN"].get("TRAIN_PHASES_PER_EPOCH", 1))


def trained_epochs(folder: Path) -> int:
    """Return the number of epochs after which the newest checkpoint of an epoch was written."""
    return max((_number(path) + 1 for path in checkpoints(folder, iterations=False)), default=0)


def reopen(folder: Path) -> int:
    """Rename the checkpoint of the end of a run to that of an epoch, so that the run can be continued.

    Returns:
        The number of epochs of the finished run; 0 if it was not finished.
    """
    ended = 0
    for path in checkpoints(folder):
        if "final" in path.name:
            name = path.name.replace("final_checkpoint_", "")
            path.replace(path.with_name(name))
            link_latest(folder, name)
            ended = max(ended, _number(path) + 1)
    return ended


def set_aside(folder: Path) -> list[str]:
    """Rename checkpoints that cannot be read, so that the run resumes from the newest readable one.

    Args:
        folder: folder of the run.

    Returns:
        The former names of the renamed files.
    """
    broken, found = [], False
    for path in checkpoints(folder):
        if _is_complete(path, checksums=not found):  # of the checkpoint to resume from
            found = True
        else:
            path.replace(path.with_name(torn_name(path.name)))
            broken.append(path.name)
    link = folder / "checkpoint.torch"
    if link.is_symlink() and not link.exists():
        link.unlink()
    return sorted(broken)


def torn_name(name: str) -> str:
    """Return the new name of an incomplete checkpoint. VISSL finds files with ``model_`` anywhere in the name."""
    return f"torn_{name.replace('model_', '')}.broken"


def _is_complete(path: Path, checksums: bool) -> bool:
    """Return whether a file of torch.save has its directory, which is at the end, and the correct checksums.

    A file in the format before torch 1.6 has neither and counts as complete.
    """
    with path.open("rb") as file:
        start = file.read(2)
    if start == b"\x80\x02":
        return True
    try:
        with zipfile.ZipFile(path) as parts:
            return not checksums or parts.testzip() is None
    except (zipfile.BadZipFile, EOFError):
        return False
