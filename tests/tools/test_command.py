"""What all commands share."""

import subprocess
import sys

import pytest
import torch

from plugins.checks import check_finite
from plugins.tools.command import exit_on_user_error


def test_a_line_is_one_write() -> None:
    """Of unbuffered output too: between two writes, a signal or another process could come."""
    code = (
        "import sys, io\n"
        "class Raw(io.RawIOBase):\n"
        "    def writable(self): return True\n"
        "    def write(self, data): seen.append(bytes(data)); return len(data)\n"
        "seen = []\n"
        "from plugins.tools.command import say\n"
        "sys.stdout = io.TextIOWrapper(Raw(), write_through=True)\n"
        "say('epoch 1/2')\n"
        "sys.stderr.write(repr([data for data in seen if data]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == r"[b'epoch 1/2\n']"


def test_a_training_that_diverged_is_one_sentence(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end, exit_on_user_error():
        check_finite("the loss", **{"z of view 1": torch.tensor([torch.inf])})
    said = capsys.readouterr().err
    wanted = (
        "error: training diverged: the loss needs finite numbers, got NaN or inf in z of view 1; lower the learning"
    )
    assert end.value.code == 2 and said.startswith(wanted) and said.count("\n") == 1
