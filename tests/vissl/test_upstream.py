"""VISSL's own tests: none fails with us active that passes without.

They need a checkout, of which the tests alone are run, against the installed VISSL.
"""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytestmark = [pytest.mark.vissl, pytest.mark.slow, pytest.mark.timeout(3600)]

CHECKOUT = "VISSL_CHECKOUT"
FILES = [
    "losses",
    "losses_config",
    "mlp",
    "utils_hydra_config",
    "transforms",
    "configs",
    "pca",
    "build_meters",
    "meter_accuracy",
    "meter_build",
    "meter_precision",
    "meter_recall",
    "engine_registry",
    "nested_tensor",
    "model_helpers",
    "data_helpers",
    "activation_statistics",
    "extract_features_utils",
]
"""Those that fit the released wheel, and need neither a GPU nor a network."""


@pytest.fixture
def checkout() -> Path:
    """The folder of a checkout of VISSL."""
    folder = os.environ.get(CHECKOUT)
    if not folder:
        pytest.skip(f"NOT TESTED: VISSL's own tests, since {CHECKOUT} names no checkout of it")
    return Path(folder).resolve()


def outcomes(checkout: Path, report: Path, active: bool) -> dict[str, bool]:
    """Whether each test passed or was left out, by its name."""
    tests = checkout / "tests"
    files = [path.name for path in (tests / f"test_{name}.py" for name in FILES) if path.exists()]
    options = ["--import-mode=importlib", "-c", os.devnull, f"--rootdir={tests}", "-p", "no:cacheprovider"]
    process = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", "-p", "upstream", *options, f"--junitxml={report}", *files],
        cwd=tests,
        env={
            **{key: value for key, value in os.environ.items() if key != "VISSL_EXT_ACTIVE"},
            **({"VISSL_EXT_ACTIVE": "1"} if active else {}),
            "PYTHONPATH": os.pathsep.join([str(tests), str(Path(__file__).parent)]),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert report.exists(), process.stdout[-3000:]
    return {
        f"{case.get('classname')}.{case.get('name')}": not {part.tag for part in case} & {"failure", "error"}
        for case in ElementTree.parse(report).iter("testcase")
    }


def test_no_test_of_vissl_fails_newly(checkout: Path, tmp_path: Path) -> None:
    bare = outcomes(checkout, tmp_path / "bare.xml", active=False)
    ours = outcomes(checkout, tmp_path / "ours.xml", active=True)
    assert bare.keys() == ours.keys() and sum(bare.values()) > 200
    assert [name for name, passed in bare.items() if passed and not ours[name]] == []
