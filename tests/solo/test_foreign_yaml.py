"""A YAML file from another person cannot run code."""

import sys
from pathlib import Path

import pytest

from solo_ext.launch import run_hydra

pytestmark = pytest.mark.solo


def run(folder: Path, text: str, *words: str) -> list[object]:
    """Return the configurations with which the task is called for a file with this text."""
    (folder / "evil.yaml").write_text(text)
    sys.argv = ["main_pretrain", "--config-path", str(folder), "--config-name", "evil.yaml", *words]
    got: list[object] = []
    run_hydra(got.append, "usage", "pretrain")
    return got


@pytest.fixture(autouse=True)
def argv(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.chdir(tmp_path)


QUIET = "hydra:\n  output_subdir: null\n  run: {dir: .}\n"
ATTACKS = {
    "tag": "!!python/object/apply:os.system ['touch ran']\n",
    "nested tag": "seed: !!python/object/apply:os.system ['touch ran']\n",
    "callback": "hydra:\n  callbacks:\n    evil: {_target_: subprocess.check_call, _args_: [[touch, ran]]}\n",
    "launcher": "hydra:\n  launcher: {_target_: subprocess.check_call, _args_: [[touch, ran]]}\n",
    "log handler": "hydra:\n  job_logging:\n    handlers:\n      evil: {(): subprocess.Popen, args: [touch, ran]}\n",
    "log class": (
        "hydra:\n  job_logging:\n    handlers:\n      evil: {class: subprocess.Popen, args: [touch, ran]}\n"
        "    root: {handlers: [evil]}\n"
    ),
    "log file": (
        "hydra:\n  job_logging:\n    handlers:\n      file: {filename: ran}\n    formatters: {simple: {format: rm}}\n"
    ),
    "environment": QUIET + "  job: {env_set: {LD_PRELOAD: ./evil.so}}\n",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_runs(attack, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        run(tmp_path, ATTACKS[attack])
    error = capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and "evil" in error


def test_a_file_that_is_composed_in_is_looked_at_too(tmp_path, capsys):
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "a.yaml").write_text(
        "# @package _global_\nhydra:\n  callbacks:\n    x: {_target_: os.system, command: touch ran}\n"
    )
    with pytest.raises(SystemExit):
        run(tmp_path, "defaults: [{part: a}, _self_]\nseed: 1\n")
    assert not (tmp_path / "ran").exists() and "hydra.callbacks.x._target_" in capsys.readouterr().err


@pytest.mark.parametrize("words", [(), ("hydra/job_logging=disabled",), ("hydra/job_logging=none", "++a=[1,2]")])
def test_hydras_own_parts_are_allowed(words, tmp_path):
    (got,) = run(tmp_path, QUIET + "seed: 5\n", *words)
    assert got.seed == 5


def test_a_path_with_an_equals_sign_needs_no_quotes(tmp_path):
    (got,) = run(tmp_path, QUIET + "place: x\n", "place=runs/lr=0.1 new/ep=9.ckpt", "++other=~/a=b")
    assert (got.place, got.other) == ("runs/lr=0.1 new/ep=9.ckpt", "~/a=b")
