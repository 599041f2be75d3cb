"""Checkpoints that contain code: the weights are read, and no code runs."""

import functools
import os
import pickle
import subprocess
from pathlib import Path

import pytest
import torch

from plugins.tools.unpickle import Placeholder, load_without_code


def constant_rate(get_lr, indexes, rates):
    """A stand-in for solo-learn's static_lr."""
    return [rates[indexes.index(i)] if i in indexes else rate for i, rate in enumerate(get_lr())]


def _trained() -> tuple[torch.nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """A network after three steps, with the schedule that solo-learn gives to SimSiam."""
    torch.manual_seed(0)
    network = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD([{"params": [p]} for p in network.parameters()], lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    schedule.get_lr = functools.partial(constant_rate, get_lr=schedule.get_lr, indexes=[1], rates=[0.3])
    for _ in range(3):
        optimizer.zero_grad()
        network(torch.ones(4, 3)).sum().backward()
        optimizer.step()
        schedule.step()
    return network, optimizer, schedule


def test_weights_come_out_beside_a_schedule_with_code(tmp_path):
    network, optimizer, schedule = _trained()
    saved = {
        "state_dict": network.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [schedule.state_dict()],
        "epoch": 3,
    }
    torch.save(saved, tmp_path / "a.ckpt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "a.ckpt", weights_only=True)
    found, names = load_without_code(tmp_path / "a.ckpt")
    assert "functools.partial" in names and any(name.endswith("constant_rate") for name in names)
    assert found["epoch"] == 3
    assert all(torch.equal(found["state_dict"][key], value) for key, value in network.state_dict().items())
    buffers = [state["momentum_buffer"] for state in optimizer.state_dict()["state"].values()]
    assert all(
        torch.equal(found["optimizer_states"][0]["state"][i]["momentum_buffer"], b) for i, b in enumerate(buffers)
    )
    assert isinstance(found["lr_schedulers"][0]["get_lr"], Placeholder)
    assert found["lr_schedulers"][0]["last_epoch"] == 3


def test_plain_checkpoints_are_read_as_torch_reads_them(tmp_path):
    torch.save({"state_dict": {"w": torch.arange(3.0)}, "sizes": (1, [2, "x"])}, tmp_path / "a.ckpt")
    found, names = load_without_code(tmp_path / "a.ckpt")
    assert names == [] and found["sizes"] == (1, [2, "x"]) and torch.equal(found["state_dict"]["w"], torch.arange(3.0))


class Reduces:
    """Pickles as a call of a function."""

    def __init__(self, function, *args) -> None:
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def _attacks(marker: Path) -> dict[str, object]:
    """Objects whose ordinary unpickling makes the file ``marker``."""
    command = f"touch {marker}"
    return {
        "os": Reduces(os.system, command),
        "subprocess": Reduces(subprocess.check_call, ["touch", str(marker)]),
        "eval": Reduces(eval, f"open({str(marker)!r}, 'w').close()"),
        "open": Reduces(open, str(marker), "w"),
        "partial": Reduces(functools.partial(subprocess.check_call, ["touch", str(marker)])),
        "load": Reduces(pickle.loads, pickle.dumps(Reduces(os.system, command))),
    }


@pytest.mark.parametrize("attack", sorted(_attacks(Path("x"))))
def test_nothing_runs(attack, tmp_path):
    marker, path = tmp_path / "ran", tmp_path / "a.ckpt"
    torch.save({"state_dict": {"w": torch.ones(1)}, "x": _attacks(marker)[attack]}, path)
    try:
        found, names = load_without_code(path)
    except pickle.UnpicklingError:
        refused = True
    else:
        refused = False
        assert names and torch.equal(found["state_dict"]["w"], torch.ones(1))
    assert not marker.exists()
    assert refused == (attack in ("os", "partial"))  # torch never lets os in, nor calls what is no class or function
    torch.load(path, weights_only=False)
    assert marker.exists(), "this attack is none"


def test_what_was_let_in_is_shut_out_again(tmp_path):
    torch.save({"a": functools.partial(max, 1)}, tmp_path / "a.ckpt")
    before = set(torch.serialization.get_safe_globals())
    load_without_code(tmp_path / "a.ckpt")
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "a.ckpt", weights_only=True)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04broken"])
def test_broken_files_raise(content, tmp_path):
    (tmp_path / "a.ckpt").write_bytes(content)
    with pytest.raises((EOFError, RuntimeError, pickle.UnpicklingError)):
        load_without_code(tmp_path / "a.ckpt")


def test_old_files_with_code_are_refused(tmp_path):
    marker, path = tmp_path / "ran", tmp_path / "a.ckpt"
    torch.save({"x": _attacks(marker)["open"]}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(pickle.UnpicklingError):
        load_without_code(path)
    assert not marker.exists()
