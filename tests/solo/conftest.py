"""Digits, configurations and runs that the solo-learn tests share."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from plugins.methods import METHODS
from solo_ext.compat import CHECKOUT, GENERATION, host_release

ROOT = Path(__file__).parents[2]
collect_ignore = ["tiny_program.py"]  # it registers a network; the search for doctests would import it
CONFIGS = ROOT / "configs" / "solo" / "digits"


def pytest_report_header() -> str:
    """Say which solo-learn is tested: a process holds one of the two only."""
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
        widths = {"proj_hidden_dim": 32, "proj_output_dim": 16, "n_classes": 16}
        known = METHODS[name].options if name in METHODS else ("proj_hidden_dim", "proj_output_dim")
        small = [f"++method_kwargs.{key}={value}" for key, value in widths.items() if key in known]
        with initialize_config_dir(str(CONFIGS), version_base="1.2"):
            linear = name.startswith(("linear", "supervised"))
            return hydra_compose(name, [*quick, *([] if linear else small), *overrides])

    return build
