"""solo-learn's methods train through our command, from the unmodified YAML files of its main branch."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from solo_ext import main_pretrain
from solo_ext.checkpoint import find_checkpoint
from solo_ext.compat import CHECKOUT, native_methods
from solo_ext.config import parse_pretrain
from solo_ext.registry import MAIN_ONLY, method_class

pytestmark = pytest.mark.solo
ROOT = Path(__file__).parents[2]
FOLDER = Path("scripts", "pretrain")

SMALL = {"proj_hidden_dim": 64, "proj_output_dim": 32, "pred_hidden_dim": 64, "queue_size": 64}
"""Smaller heads and queues than in the files, where a file gives them."""
FILES = {
    "cifar/all4one.yaml": {},
    "cifar/barlow.yaml": {},
    "cifar/byol.yaml": {},
    "cifar/deepclusterv2.yaml": {"num_prototypes": "[8,8,8]"},
    "cifar/dino.yaml": {"num_prototypes": 64},
    "cifar/mae.yaml": {"decoder_embed_dim": 64, "decoder_depth": 1, "decoder_num_heads": 4},
    "cifar/mocov2plus.yaml": {},
    "cifar/mocov3.yaml": {},
    "cifar/nnbyol.yaml": {},
    "cifar/nnclr.yaml": {},
    "cifar/nnsiam.yaml": {},
    "cifar/ressl.yaml": {},
    "cifar/simclr.yaml": {},
    "cifar/simsiam.yaml": {},
    "cifar/supcon.yaml": {},
    "cifar/swav.yaml": {"num_prototypes": 30, "epoch_queue_starts": 0},
    "cifar/vibcreg.yaml": {},
    "cifar/vicreg.yaml": {},
    "cifar/wmse.yaml": {"proj_output_dim": 8, "whitening_size": 16},
    "cifar-multicrop/swav.yaml": {"num_prototypes": 30},
}
"""Each file, and what else is smaller."""
METHOD = {"barlow": "barlow_twins"}
"""Methods that are not called as their file."""


def _method(file: str) -> str:
    return METHOD.get(Path(file).stem, Path(file).stem)


def _arguments(file: str, checkout: Path, digits: Path, out: Path, *more: str) -> list[str]:
    """The command line: the file, our images of 32 pixels, two small steps on the CPU."""
    text = (checkout / FOLDER / file).read_text()
    small = {**{key: value for key, value in SMALL.items() if f"  {key}:" in text}, **FILES[file]}
    return [
        *("--config-path", str((checkout / FOLDER / file).parent), "--config-name", Path(file).name),
        *("data.dataset=custom", f"data.train_path={digits / 'train'}", f"data.val_path={digits / 'val'}"),
        *("data.num_workers=0", "optimizer.batch_size=32", "max_epochs=1"),
        *("+limit_train_batches=2", "+limit_val_batches=1", "accelerator=cpu", "++strategy=auto", "++precision=32"),
        *("wandb.enabled=False", "auto_resume.enabled=False", f"checkpoint.dir={out}", "++checkpoint.version=v"),
        *(f"method_kwargs.{key}={value}" for key, value in small.items()),
        *more,
    ]


def _check_run(folder: Path, method: str) -> None:
    """Two steps with a finite loss; a checkpoint without code."""
    summary = json.loads((folder / "pretrain.json").read_text())
    losses = [value for name, value in summary["metrics"].items() if "loss" in name]
    assert summary["method"] == method and losses and all(math.isfinite(value) for value in losses)
    checkpoint = torch.load(find_checkpoint(folder), weights_only=True)
    assert checkpoint["global_step"] == 2
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())


def test_no_file_of_the_checkout_is_left_out(checkout):
    there = {str(path.relative_to(checkout / FOLDER)) for path in (checkout / FOLDER / "cifar").glob("*.yaml")}
    assert there == {file for file in FILES if file.startswith("cifar/")}
    assert {_method(file) for file in FILES} == set(native_methods())


def test_every_file_of_the_checkout_is_accepted(checkout, digits):
    """Each method's options, the crops and the trainer's entries of every file that Hydra can find."""
    files = sorted((checkout / FOLDER).glob("*/*.yaml"))
    assert len(files) == 46
    images = ["data.dataset=custom", f"data.train_path={digits / 'train'}", f"data.val_path={digits / 'val'}"]
    for file in files:
        with initialize_config_dir(str(file.parent), version_base="1.2"):
            cfg = compose(file.stem, [*images, "data.format=image_folder", "accelerator=cpu"])
        assert method_class(parse_pretrain(cfg)) is native_methods()[cfg.method], file


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_native_method_trains_from_its_own_file(file, checkout, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main_pretrain", *_arguments(file, checkout, digits, tmp_path)])
    main_pretrain.main()
    _check_run(tmp_path / _method(file) / "v", _method(file))


@pytest.mark.slow
@pytest.mark.parametrize("file", ["cifar/deepclusterv2.yaml", "cifar/swav.yaml"])
def test_a_method_with_a_memory_resumes_to_the_same_weights(file, checkout, digits, tmp_path, monkeypatch):
    """The method creates its buffers when training starts, after a checkpoint is read; initial clusters are random."""
    states = []
    for version in ("whole", "resumed"):
        more = ["++max_epochs=2", f"++checkpoint.version={version}", "++checkpoint.keep_prev=true"]
        if states:
            (first,) = tmp_path.rglob("*-whole-ep=0.ckpt")
            more.append(f"++resume_from_checkpoint='{first}'")
        monkeypatch.setattr(sys, "argv", ["main_pretrain", *_arguments(file, checkout, digits, tmp_path, *more)])
        main_pretrain.main()
        states.append(torch.load(next(tmp_path.rglob(f"*-{version}-ep=1.ckpt")), weights_only=True)["state_dict"])
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


_LOOP = """
import contextlib, io, json, sys, traceback
from solo_ext import main_pretrain
from solo_ext.compat import GENERATION
assert GENERATION == "1.0.2"
runs, ended = json.load(open(sys.argv[1])), {}
for name, argv in runs.items():
    said, sys.argv = io.StringIO(), ["main_pretrain", *argv]
    with contextlib.redirect_stderr(said):
        try:
            main_pretrain.main()
            status = 0
        except SystemExit as stopped:
            status = stopped.code
        except Exception:
            traceback.print_exc()
            status = 1
    ended[name] = (status, said.getvalue())
json.dump(ended, sys.stdout)
"""


@pytest.fixture(scope="module")
def of_1_0_2(checkout, digits, tmp_path_factory):
    """Every file, and what 1.0.2 lacks, in one process with solo-learn 1.0.2: {name: (exit status, standard error)}."""
    out = tmp_path_factory.mktemp("of_1_0_2")
    runs = {file: _arguments(file, checkout, digits, out / file.replace("/", "-")) for file in FILES}
    for backbone in ("convnext_tiny", "poolformer_s12", "wide_resnet28w2"):
        runs[backbone] = _arguments("cifar/byol.yaml", checkout, digits, out / backbone, f"backbone.name={backbone}")
    (out / "runs.json").write_text(json.dumps(runs))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    del environment[CHECKOUT]
    done = subprocess.run(
        [sys.executable, "-c", _LOOP, str(out / "runs.json")],
        env=environment,
        cwd=out,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout.splitlines()[-1])


_OF_1_0_2 = [file for file in FILES if _method(file) not in MAIN_ONLY and file != "cifar-multicrop/swav.yaml"]


@pytest.mark.slow
@pytest.mark.parametrize("file", _OF_1_0_2)
def test_native_method_of_1_0_2_trains_from_mains_file(file, of_1_0_2):
    out, ended = of_1_0_2
    status, said = ended[file]
    assert status == 0, said
    _check_run(out / file.replace("/", "-") / _method(file) / "v", _method(file))


@pytest.mark.slow
def test_1_0_2_says_what_only_main_has(of_1_0_2):
    _, ended = of_1_0_2
    assert len(_OF_1_0_2) == 14
    needs = "needs solo-learn's main branch, but this is solo-learn 1.0.2; set SOLO_LEARN_CHECKOUT to"
    lacking = {file: f"method {_method(file)}" for file in FILES if _method(file) in MAIN_ONLY}
    lacking.update({name: f"backbone {name}" for name in ended if name not in FILES})
    for name, what in lacking.items():
        status, said = ended[name]
        assert status == 2, said
        assert f"error: {what} {needs}" in said and "Traceback" not in said
    status, said = ended["cifar-multicrop/swav.yaml"]
    assert status == 2 and "error: method swav of solo-learn 1.0.2 accepts no small crops" in said
