"""Both generations of solo-learn train the same network to the same weights, and load each other's checkpoints."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from solo_ext import main_linear, main_pretrain
from solo_ext.checkpoint import find_checkpoint
from solo_ext.compat import CHECKOUT

pytestmark = [pytest.mark.solo, pytest.mark.slow]
ROOT = Path(__file__).parents[2]

# one process, several commands: starting one costs more than they do
_SEVERAL = """
import json, sys
from solo_ext import main_linear, main_pretrain
from solo_ext.compat import GENERATION
assert GENERATION == "1.0.2"
for module, argv in json.loads(sys.argv[1]):
    sys.argv[1:] = argv
    {"pretrain": main_pretrain, "linear": main_linear}[module].main()
"""


def _arguments(digits: Path, out: Path, name: str, *more: str) -> list[str]:
    return [
        *("--config-path", str(ROOT / "configs" / "solo" / "digits"), "--config-name", name),
        *(f"data.train_path={digits / 'train'}", f"data.val_path={digits / 'val'}", f"++checkpoint.dir={out}"),
        *("optimizer.batch_size=32", "++check_val_every_n_epoch=1", "++checkpoint.frequency=1"),
        *("++data.num_workers=0", "++accelerator=cpu", *more),
    ]


def _state(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(find_checkpoint(folder), weights_only=True)["state_dict"]


@pytest.mark.usefixtures("checkout")
@pytest.mark.parametrize("method", ["isoloss", "vicreg"])
def test_a_run_goes_on_in_the_other_generation(method, digits, tmp_path, monkeypatch):
    config = "isoloss"
    extra: list[str] = []
    if method == "vicreg":  # solo-learn's own
        config = "ssl_ey"
        weights = {"sim_loss_weight": 25.0, "var_loss_weight": 25.0, "cov_loss_weight": 1.0}
        extra = ["method=vicreg", "~method_kwargs.log_eigvals"]
        extra += [f"++method_kwargs.{key}={value}" for key, value in weights.items()]

    def arguments(side, version, *more):
        version = f"++checkpoint.version={version}"
        return _arguments(digits, tmp_path / side, config, "max_epochs=2", version, "++checkpoint.keep_prev=true",
                          *extra, *more)  # fmt: skip

    def here(module, argv):
        monkeypatch.setattr(sys, "argv", ["prog", *argv])
        module.main()

    def first(side):
        (found,) = (tmp_path / side / method / "whole").glob("*ep=0.ckpt")
        return found

    here(main_pretrain, arguments("main", "whole"))
    linear = _arguments(digits, tmp_path, "linear", "max_epochs=1")
    there = [
        ("pretrain", arguments("old", "whole")),
        ("pretrain", arguments("old", "resumed", f"++resume_from_checkpoint='{first('main')}'")),
        ("linear", [*linear, f"pretrained_feature_extractor={tmp_path / 'main' / method / 'whole'}",
                    "++checkpoint.version=old"]),
    ]  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if key != CHECKOUT}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-c", _SEVERAL, json.dumps(there)],
        **{"env": environment, "cwd": ROOT, "capture_output": True, "text": True, "timeout": 400},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    here(main_pretrain, arguments("main", "resumed", f"++resume_from_checkpoint='{first('old')}'"))
    here(main_linear, [*linear, f"pretrained_feature_extractor={tmp_path / 'old' / method / 'whole'}",
                       "++checkpoint.version=main"])  # fmt: skip

    states = [_state(tmp_path / side / method / version) for side in ("main", "old") for version in
              ("whole", "resumed")]  # fmt: skip
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        for name, value in states[0].items():
            assert torch.equal(value, state[name]), name
    results = [json.loads((tmp_path / "linear" / side / "linear.json").read_text()) for side in ("old", "main")]
    assert [result["versions"]["solo-learn"] for result in results] == ["1.0.2", "1.0.6"]
    assert results[0]["acc1"] == results[1]["acc1"]
