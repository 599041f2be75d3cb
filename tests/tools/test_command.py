"""Functions that all commands share."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from plugins.checks import check_finite
from plugins.tools.command import Parser, exit_on_user_error


def test_a_line_is_one_write() -> None:
    """Unbuffered output is included: a signal or another process could interrupt two writes."""
    code = (
        "import sys, io\n"
        "class Raw(io.RawIOBase):\n"
        "    def writable(self): return True\n"
        "    def write(self, data): seen.append(bytes(data)); return len(data)\n"
        "seen = []\n"
        "from plugins.tools.command import print_on_rank_zero\n"
        "sys.stdout = io.TextIOWrapper(Raw(), write_through=True)\n"
        "print_on_rank_zero('epoch 1/2')\n"
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


def test_a_tilde_is_the_home_folder_in_every_path_of_a_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The shell replaces it in ``--out ~/x``, but not in ``--out=~/x``."""
    monkeypatch.setenv("HOME", str(tmp_path))
    parser = Parser("python -m plugins.tools.data")
    parser.add_argument("places", nargs="*", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--name")
    found = parser.parse_args(["~/a", "b/~", "--out=~/x", "--name=~"])
    assert (found.places, found.out, found.name) == ([tmp_path / "a", Path("b/~")], tmp_path / "x", "~")
    assert parser.parse_args(["--out=~nobody-of-this-name/x"]).out == Path("~nobody-of-this-name/x")
