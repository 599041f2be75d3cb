"""Digits, configurations and runs that the solo-learn tests share."""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from plugins.experiments.warm import WarmProcess
from plugins.methods import METHODS
from plugins.testing import NARROW, tiny_backbone
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
