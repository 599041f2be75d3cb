"""Checkpoints that are whole or not there.

classy_vision/generic/util.py:352 writes into the final name, and vissl/utils/checkpoint.py:443 takes the existence of
``model_final_*.torch`` for the end of a training: one that is killed while it writes can neither resume nor start anew.
vissl/utils/checkpoint.py:143 links to a path relative to the working directory, not to the link. Where checkpoints are
written every few iterations too, vissl/utils/checkpoint.py:576 looks for no others; where there are none of those that
it looks for, vissl/utils/checkpoint.py:624 names the file ``None``.
"""

import os
import socket
import sys
import zipfile
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

_BEGUN = ".writing-"


def activate() -> None:
    """Write checkpoints under another name first; resume from the newest."""
    from vissl.utils import checkpoint

    for name, mended in (("get_checkpoint_resume_files", _newest), ("get_resume_checkpoint", _there)):
        stock = getattr(checkpoint, name)
        if hasattr(stock, "__wrapped__"):
            continue
        for module in (checkpoint, sys.modules.get("vissl.utils.distributed_launcher")):
            if module is not None and hasattr(module, name):
                setattr(module, name, wraps(stock)(partial(mended, stock)))
    checkpoint.CheckpointWriter._save = _save
    checkpoint.CheckpointWriter._create_symbolic_link = _link


def _save(self: Any, name: str, content: Any) -> None:
    import torch

    folder = Path(self.checkpoint_folder)
    folder.mkdir(parents=True, exist_ok=True)
    # the name is none that VISSL looks for
    begun = folder / _begun()
    try:
        with begun.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        begun.replace(folder / name)
    finally:
        begun.unlink(missing_ok=True)


def _begun() -> str:
    """The name under which this process writes; several may write into a folder, from several machines too."""
    return f"{_BEGUN}{socket.gethostname()}-{os.getpid()}"


def _abandoned(path: Path) -> bool:
    """Whether what a process has begun to write is left over: it ran here, and runs no longer."""
    host, _, process = path.name.removeprefix(_BEGUN).rpartition("-")
    if host != socket.gethostname() or not process.isdigit():
        return False
    if int(process) == os.getpid():
        return True  # of a process that had our number before
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def _link(self: Any, checkpoint_name: str) -> None:
    folder = Path(self.checkpoint_folder)
    begun = folder / _begun()
    begun.unlink(missing_ok=True)
    begun.symlink_to(checkpoint_name)
    begun.replace(folder / "checkpoint.torch")


def _newest(find: Callable[..., str | None], checkpoint_folder: str, config: Any, **options: Any) -> str | None:
    """The checkpoint of an epoch or of an iteration, whichever was written last."""
    epochs = type(config)(config)
    epochs.CHECKPOINT = type(config)({**config.CHECKPOINT, "CHECKPOINT_ITER_FREQUENCY": -1})
    found = {find(checkpoint_folder, each, **options) for each in (config, epochs)} - {None}
    return max(found, key=lambda name: (Path(checkpoint_folder) / name).stat().st_mtime_ns, default=None)


def _there(find: Callable[..., str | None], cfg: Any, checkpoint_folder: str) -> str | None:
    """The checkpoint to resume from, if there is one."""
    path = find(cfg, checkpoint_folder)
    return path if path is not None and Path(path).is_file() else None


def set_aside(folder: Path) -> list[str]:
    """Rename checkpoints that a killed process has left half written, so that the one before is resumed from.

    What processes of this machine that are gone had begun to write is deleted.

    Args:
        folder: of the run.

    Returns:
        Their former names; the new ones begin with ``torn_`` and are none that VISSL takes for checkpoints.
    """
    broken = []
    for path in sorted(folder.glob("*.torch")):
        if path.is_file() and not path.is_symlink() and not _whole(path):
            path.replace(path.with_name(torn_name(path.name)))
            broken.append(path.name)
    link = folder / "checkpoint.torch"
    if link.is_symlink() and not link.exists():
        link.unlink()
    for path in filter(_abandoned, folder.glob(f"{_BEGUN}*")):
        path.unlink(missing_ok=True)
    return broken


def torn_name(name: str) -> str:
    """What a half-written checkpoint is called from then on; VISSL looks for ``model_`` anywhere in a name."""
    return f"torn_{name.replace('model_', '')}.broken"


def _whole(path: Path) -> bool:
    """A file of torch's present format ends in a directory of its parts; one of the former format is taken as it is."""
    with path.open("rb") as file:
        start = file.read(2)
    return zipfile.is_zipfile(path) if start in (b"PK", b"") else True
