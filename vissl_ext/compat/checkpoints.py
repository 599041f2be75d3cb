"""Checkpoints that are whole or not there, and the end of a training that more epochs move on.

classy_vision/generic/util.py:352 writes into the final name, and vissl/utils/checkpoint.py:443 takes the existence of
``model_final_*.torch`` for the end of a training: one that is killed while it writes can neither resume nor start anew,
one whose epochs are raised does not go on, and any file of a user's with ``model_final`` in its name ends it.
vissl/utils/checkpoint.py:143 links to a path relative to the working directory, not to the link. Where checkpoints are
written every few iterations too, vissl/utils/checkpoint.py:576 looks for no others; where there are none of those that
it looks for, vissl/utils/checkpoint.py:624 names the file ``None``.
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
GOES_ON = "the same command goes on from the last checkpoint"


def activate() -> None:
    """Write checkpoints under another name first; resume from the newest; end a training after its epochs."""
    from vissl.utils import checkpoint

    mends = (
        ("get_checkpoint_resume_files", _newest),
        ("get_resume_checkpoint", _there),
        ("is_training_finished", _finished),
    )
    for name, mended in mends:
        stock = getattr(checkpoint, name)
        if hasattr(stock, "__wrapped__"):
            continue
        for module in (checkpoint, sys.modules.get("vissl.utils.distributed_launcher")):
            if module is not None and hasattr(module, name):
                setattr(module, name, wraps(stock)(partial(mended, stock)))
    checkpoint.CheckpointWriter._save = _save
    checkpoint.CheckpointWriter._create_symbolic_link = _link


def checkpoints(folder: Path, *, iterations: bool = True, final: bool = True) -> list[Path]:
    """The checkpoints that VISSL has written into a folder, the newest first; no file of another name is one.

    Args:
        folder: of the run.
        iterations: with those written in the midst of an epoch.
        final: with that of the end.
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
    """What to do when a run's folder cannot be written to, as the end of a sentence."""
    return f"make room there, then {resume_hint(folder)}"


def resume_hint(folder: Path) -> str:
    """What the same command does in the folder of a run that did not finish."""
    return GOES_ON if checkpoints(folder) else "the same command begins anew, as there is no checkpoint yet"


def _link(self: Any, checkpoint_name: str) -> None:
    link_latest(Path(self.checkpoint_folder), checkpoint_name)


def link_latest(folder: Path, name: str) -> None:
    """Let checkpoint.torch in a folder be a link to a checkpoint there. A file of the user's is left alone."""
    link = folder / "checkpoint.torch"
    if link.exists() and not link.is_symlink():
        return
    begun = folder / f".{link.name}.{os.getpid()}.tmp"
    begun.unlink(missing_ok=True)
    begun.symlink_to(name)
    begun.replace(link)


def _newest(
    find: Callable[..., str | None],
    checkpoint_folder: str,
    config: Any,
    skip_final: bool = False,
    latest_checkpoint_resume_num: int = 1,
) -> str | None:
    """The checkpoint of an epoch or, where they are asked for, of an iteration, whichever was written last.

    Without CHECKPOINT_ITER_FREQUENCY that of an iteration is what VISSL leaves of a training that diverged.
    """
    every = config.CHECKPOINT.CHECKPOINT_ITER_FREQUENCY
    found = checkpoints(Path(checkpoint_folder), iterations=every > 0, final=not skip_final)
    return found[min(max(latest_checkpoint_resume_num, 1), len(found)) - 1].name if found else None


def _there(find: Callable[..., str | None], cfg: Any, checkpoint_folder: str) -> str | None:
    """The checkpoint to resume from, if there is one."""
    path = find(cfg, checkpoint_folder)
    return path if path is not None and Path(path).is_file() else None


def _finished(finished: Callable[..., bool], cfg: Any, checkpoint_folder: str) -> bool:
    """Whether the epochs of the configuration are trained, instead of those of the time when the training ended."""
    folder, options = Path(checkpoint_folder), cfg["CHECKPOINT"]
    if options["OVERWRITE_EXISTING"]:
        return False
    if not options["AUTO_RESUME"]:
        return any("final" in path.name for path in checkpoints(folder))
    return trained_epochs(folder) >= epochs(cfg)


def epochs(cfg: Any) -> int:
    """How many epochs, in VISSL's sense of phases, a configuration asks for."""
    return int(cfg["OPTIMIZER"]["num_epochs"] * cfg["DATA"]["TRAIN"].get("TRAIN_PHASES_PER_EPOCH", 1))


def trained_epochs(folder: Path) -> int:
    """How many epochs the checkpoints of a folder have behind them."""
    return max((_number(path) + 1 for path in checkpoints(folder, iterations=False)), default=0)


def reopen(folder: Path) -> int:
    """Make the checkpoint of a training's end one like those before it: the training goes on from there.

    Returns:
        The epochs after which it had ended; 0 where it had not.
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
    """Rename checkpoints that cannot be read, so that the newest one before them is resumed from.

    Args:
        folder: of the run.

    Returns:
        Their former names; the new ones begin with ``torn_`` and are none that VISSL takes for checkpoints.
    """
    broken, found = [], False
    for path in checkpoints(folder):
        if _whole(path, every_byte=not found):  # of the one that is resumed from
            found = True
        else:
            path.replace(path.with_name(torn_name(path.name)))
            broken.append(path.name)
    link = folder / "checkpoint.torch"
    if link.is_symlink() and not link.exists():
        link.unlink()
    return sorted(broken)


def torn_name(name: str) -> str:
    """What a half-written checkpoint is called from then on; VISSL looks for ``model_`` anywhere in a name."""
    return f"torn_{name.replace('model_', '')}.broken"


def _whole(path: Path, every_byte: bool) -> bool:
    """Whether a file of torch.save can be read: its directory of parts, at the end, and their check sums.

    One of the former format, which has neither, is taken as it is.
    """
    with path.open("rb") as file:
        start = file.read(2)
    if start == b"\x80\x02":
        return True
    try:
        with zipfile.ZipFile(path) as parts:
            return not every_byte or parts.testzip() is None
    except (zipfile.BadZipFile, EOFError):
        return False
