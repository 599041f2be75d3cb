"""Files are complete or absent: after an error, a full disk, or a kill in the middle of writing."""

import errno
import io
import os
import signal
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from plugins.tools.command import UserError
from plugins.tools.files import atomic


def test_replaces_the_file_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    with atomic(path, "w") as file:
        file.write("first")
        assert not path.exists()
        assert file.name.startswith(str(path.parent))  # the same file system
    with atomic(path, "w") as file:
        file.write("second")
        file.flush()
        assert path.read_text() == "first"
    assert path.read_text() == "second"
    assert [entry.name for entry in path.parent.iterdir()] == ["file.txt"]


def test_an_error_within_keeps_the_former_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"former")
    with pytest.raises(ValueError, match="mine"), atomic(path) as file:
        file.write(b"half")
        raise ValueError("mine")
    assert path.read_bytes() == b"former"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_one_sentence_and_keeps_the_former_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"former")
    with pytest.raises(UserError, match=r"file cannot be written: No space left on device"), atomic(path) as file:
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert path.read_bytes() == b"former"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_under_torch_save_is_the_same_sentence(tmp_path: Path) -> None:
    """torch.save raises a second error while it handles that of the disk."""

    class Full(io.BytesIO):
        def write(self, part: Any) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError, match=r"file cannot be written: No space left on device"), atomic(tmp_path / "file"):
        torch.save({"weights": torch.zeros(1000)}, Full())
    assert list(tmp_path.iterdir()) == []


def test_a_kill_in_the_middle_keeps_the_former_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"former")
    child = os.fork()
    if child == 0:
        with atomic(path) as file:
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert path.read_bytes() == b"former"


def test_the_data_are_on_the_disk_before_the_name_and_the_name_before_it_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order, flush, rename = [], os.fsync, Path.replace

    def fsync(handle: int) -> None:
        order.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else f"{os.fstat(handle).st_size} bytes")
        flush(handle)

    def replace(self: Path, target: Path) -> Path:
        order.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    with atomic(tmp_path / "file") as file:
        file.write(b"data")
    assert order == ["4 bytes", "rename", "folder"]
