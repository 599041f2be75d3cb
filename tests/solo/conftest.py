"""Digits, configurations and runs that the solo-learn tests share."""

import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from PIL import Image

from plugins.experiments.warm import WarmProcess
from plugins.methods import METHODS
from plugins.testing import NARROW, tiny_backbone
from solo_ext import main_pretrain
from solo_ext.architectures import ARCHITECTURES
from solo_ext.compat import CHECKOUT, GENERATION, host_release

ROOT = Path(__file__).parents[2]
collect_ignore = ["tiny_program.py"]  # it registers a network; the search for doctests would import it
CONFIGS = ROOT / "configs" / "solo" / "digits"


def pytest_report_header() -> str:
    """Print which solo-learn is tested: a process can import only one of the two."""
    main = "" if GENERATION == "main" else f"; main is NOT tested in this process: {CHECKOUT} names no checkout of it"
    return f"solo-learn {host_release()}{main}"


@pytest.fixture(scope="session")
def checkout() -> Path:
    """The folder of the checkout of solo-learn's main branch that is tested."""
    if GENERATION != "main":
        pytest.skip(f"NOT TESTED: solo-learn's main branch, since {CHECKOUT} names no checkout of it")
    return Path(os.environ[CHECKOUT])


@pytest.fixture(scope="session")
def digits(thin_digits: Callable[[int, int], Path]) -> Path:
    """The real digits, thinned out: 96 training and 40 validation images."""
    return thin_digits(96, 40)


@pytest.fixture(scope="module")
def tiny() -> Iterator[str]:
    """The override that selects a backbone of one convolution."""
    ARCHITECTURES["tiny"] = tiny_backbone
    yield "backbone.name=tiny"
    del ARCHITECTURES["tiny"]


@pytest.fixture
def compose(digits: Path, tmp_path: Path) -> Callable:
    """compose(name, *overrides) → a configuration of configs/solo/digits on the thinned digits, small and quick."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    def build(name: str, *overrides: str):
        quick = [
            f"data.train_path={digits / 'train'}",
            f"data.val_path={digits / 'val'}",
            f"checkpoint.dir={tmp_path / 'runs'}",
            "optimizer.batch_size=32",
            *("++max_epochs=1", "++check_val_every_n_epoch=1"),
        ]
        widths = {"proj_hidden_dim": 32, "proj_output_dim": 16, "n_classes": 16, **NARROW}
        known = METHODS[name].options if name in METHODS else ("proj_hidden_dim", "proj_output_dim")
        small = [f"++method_kwargs.{key}={value}" for key, value in widths.items() if key in known]
        with initialize_config_dir(str(CONFIGS), version_base="1.2"):
            linear = name.startswith(("linear", "supervised"))
            return hydra_compose(name, [*quick, *([] if linear else small), *overrides])

    return build


class Run:
    """Commands of tiny_program, forked from a process that has imported everything; their output."""

    small = ("backbone.name=tiny", "++method_kwargs.proj_hidden_dim=16", "++method_kwargs.proj_output_dim=8")

    def __init__(self, digits: Path, out: Path) -> None:
        self.digits, self.out, self.log = digits, out, out / "log"
        self.folder = out / "isoloss" / "v"
        out.mkdir(exist_ok=True)

    def start(
        self, *more: str, kind: str = "pretrain", config: str = "isoloss", environment: Mapping[str, str] | None = None
    ) -> WarmProcess:
        """Start ``main_<kind>`` with a configuration of digits; training images are the validation images."""
        argv = [
            *("-m", "tiny_program", "--config-path", str(CONFIGS), "--config-name", config),
            *(f"data.{split}_path={self.digits / 'val'}" for split in ("train", "val")),
            *(f"++checkpoint.dir={self.out}", "optimizer.batch_size=16", "++checkpoint.frequency=1"),
            *("++check_val_every_n_epoch=1", "++checkpoint.version=v"),
            *(self.small[:1] if config.startswith(("linear", "supervised")) else self.small),
            *more,
        ]
        place = ROOT / "tests" / "solo"  # where tiny_program is
        variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join((str(ROOT), str(place)))}
        self.log.write_text("")
        with self.log.open("ab") as log, pytest.MonkeyPatch.context() as patch:
            patch.chdir(place)
            return WarmProcess(argv, log, {**variables, "TINY_PROGRAM": kind, **(environment or {})})

    def __call__(self, *more: str, status: int = 0, **kind: str) -> str:
        """Run a command to its end; return its output."""
        assert self.start(*more, **kind).wait(300) == status, self.log.read_text()
        return self.log.read_text()

    def wait_for(self, process: WarmProcess, pattern: str) -> None:
        """Wait until a file of the run's folder is there."""
        deadline = time.monotonic() + 300
        while not list(self.folder.glob(pattern)):
            assert process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.005)

    def said(self, *beginnings: str) -> list[str]:
        """Return the lines of the output that begin so; there must be no traceback."""
        text = self.log.read_text()
        assert "Traceback" not in text, text
        return [line for line in text.splitlines() if line.startswith(("error: ", *beginnings))]


@pytest.fixture(scope="session")
def new_run(digits: Path) -> Callable[[Path], Run]:
    """new_run(out) → a Run that writes to the folder ``out``."""
    return lambda out: Run(digits, out)


class Ssley:
    """A folder like a checkout of the branch ssley of solo-learn, and the commands of docs/migration.md in it.

    ``scripts`` has our YAML in the form of the branch's; with FORKS_CHECKOUTS it is that of the checkout.
    ``datasets/imagenet-100`` has 240 training images, more than the 200 neighbours of knn.sh, and 30 for validation.
    """

    small = ("accelerator=cpu", "data.num_workers=0", "data.format=image_folder", "optimizer.batch_size=16")

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if root := os.environ.get("FORKS_CHECKOUTS"):
            (folder / "scripts").symlink_to(Path(root, "solo-learn-ssley", "scripts").absolute())
        else:
            self._scripts()
        for split, count in (("train", 24), ("val", 3)):
            for label in range(10):
                place = folder / "datasets" / "imagenet-100" / split / f"n{label:08}"
                place.mkdir(parents=True)
                for index in range(count):
                    Image.effect_noise((32, 32), 20 * label + index).convert("RGB").save(place / f"{index}.png")
        (folder / "datasets" / "imagenet100").symlink_to("imagenet-100")  # ssley.yaml's spelling

    def _scripts(self) -> None:
        def view(crops: int) -> str:
            off = "".join(f", {name}: {{prob: 0}}" for name in ("color_jitter", "grayscale", "gaussian_blur"))
            off += "".join(f", {name}: {{prob: 0.1}}" for name in ("solarization", "equalization", "horizontal_flip"))
            crop = "rrc: {enabled: True, crop_min_scale: 0.2, crop_max_scale: 1.0}"
            return f"  - {{{crop}{off}, crop_size: 224, num_crops: {crops}}}\n"

        common = (
            "defaults: [_self_, {wandb: private.yaml}, {override hydra/hydra_logging: disabled}]\n"
            "hydra: {output_subdir: null, run: {dir: .}}\n"
            "data: {dataset: imagenet100, train_path: %s/train, val_path: %s/val, format: dali, num_workers: 4}\n"
            "backbone: {name: resnet18}\ncheckpoint: {enabled: True, dir: trained_models, frequency: 1}\n"
            "auto_resume: {enabled: True}\nmax_epochs: 400\ndevices: [0]\nsync_batchnorm: True\naccelerator: gpu\n"
            "strategy: ddp\n"
        )
        lars = (
            "optimizer: {name: lars, batch_size: 128, lr: 0.3, classifier_lr: 0.1, weight_decay: 1e-4}\n"
            "scheduler: {name: warmup_cosine}\nprecision: 16-mixed\n"
            "method_kwargs: {proj_hidden_dim: 2048, proj_output_dim: 2048%s}\naugmentations:\n%s"
        )
        linear = (
            "pretrained_feature_extractor: None\noptimizer: {name: sgd, batch_size: 256, lr: 0.3, weight_decay: 0}\n"
            "scheduler: {name: step, lr_decay_steps: [60, 80]}\nprecision: 16\n"
        )
        own, usual = "datasets/imagenet100", "./datasets/imagenet-100"
        ssley, barlow = (lars % ("", view(2)), lars % (", scale_loss: 0.1", 2 * view(1)))
        files = {
            "pretrain/imagenet-100/ssley": f"{common % (own, own)}{ssley}name: ssley-imagenet100\nmethod: ssley\n",
            "pretrain/imagenet-100/barlow": f"{common % (usual, usual)}{barlow}name: barlow\nmethod: barlow_twins\n",
            "linear/imagenet-100/ssley": f"{common % (usual, usual)}{linear}name: a\npretrain_method: ssley\n",
            "linear/imagenet-100/barlow": f"{common % (usual, usual)}{linear}name: b\npretrain_method: barlow_twins\n",
        }
        for name, text in files.items():
            path = self.folder / "scripts" / f"{name}.yaml"
            (path.parent / "wandb").mkdir(parents=True, exist_ok=True)
            (path.parent / "wandb" / "private.yaml").write_text("enabled: True\nentity: None\nproject: solo-learn\n")
            path.write_text(text)

    def words(self, module: str, name: str = "", run: str = "") -> list[str]:
        """Return the words after ``python -m solo_ext.MODULE`` on the page, for a YAML file, or for RUN."""
        page = (ROOT / "docs" / "migration.md").read_text().partition("branch ssley")[2].replace("\\\n", " ")
        (found,) = re.findall(rf"python -m solo_ext\.{module} (.*?{name}\b.*?)(?:`|\n)", page)
        return found.replace("RUN", run).split()

    def __call__(self, main: Callable[[], None], words: list[str]) -> None:
        """Run a command in the folder."""
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.folder)
            patch.setattr(sys, "argv", ["prog", *words])
            patch.setitem(ARCHITECTURES, "tiny", tiny_backbone)
            main()

    def pretrain(self, name: str) -> str:
        """Pre-train with a YAML file for two steps; return the run's folder."""
        few = ["backbone.name=tiny", "max_epochs=1", "++limit_train_batches=2", "++limit_val_batches=1", "devices=1"]
        few += ["method_kwargs.proj_hidden_dim=32", "method_kwargs.proj_output_dim=16", "wandb.enabled=False"]
        few += [f"++augmentations.{number}.crop_size=32" for number in range(2 if name == "barlow" else 1)]
        self(main_pretrain.main, [*self.words("main_pretrain", name), *self.small, *few, "++checkpoint.version=v"])
        (found,) = self.folder.glob(f"trained_models/{name}*/v")
        return str(found)


@pytest.fixture(scope="session")
def ssley(tmp_path_factory: pytest.TempPathFactory) -> Ssley:
    """A folder like a checkout of the branch ssley of solo-learn."""
    return Ssley(tmp_path_factory.mktemp("solo-learn-ssley"))
