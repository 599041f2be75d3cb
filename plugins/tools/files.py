"""Write files atomically: after an interruption, a file has its old or its new content, never a part of it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from plugins.tools.command import UserError


@contextmanager
def atomic(path: Path, mode: str = "wb", **options: Any) -> Iterator[IO[Any]]:
    """Open a temporary file beside ``path`` and rename it to ``path`` at the end of the ``with`` block.

    The temporary file is in the same folder, so the rename works on every file system. The data and the folder's entry
    are flushed to the disk (fsync) before the function returns. If the block raises or the process is killed, ``path``
    still has its former content; a temporary file that a killed process left is named ``.<name>.<pid>.tmp``.

    Args:
        path: the file to write. Its folder is created if it does not exist.
        mode: mode of ``open``: "wb" or "w".
        options: further arguments of ``open``, such as ``newline``.

    Yields:
        The open temporary file.

    Raises:
        UserError: the disk is full, or the file cannot be written for another reason of the operating system.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open(mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        # torch.save raises a RuntimeError while it handles the OSError of a full disk
        reason = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(reason, OSError):
            raise UserError(f"{path} cannot be written: {reason.strerror or reason}") from error
        raise


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk, if the operating system supports it."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
