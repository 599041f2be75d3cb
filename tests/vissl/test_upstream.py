"""VISSL's tests: each one that passes without our patches also passes with them.

They need a checkout, of whose release the tests alone are run, against the installed VISSL.
"""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytestmark = [pytest.mark.vissl, pytest.mark.slow, pytest.mark.timeout(3600)]

CHECKOUT = "VISSL_CHECKOUT"
RELEASE = "v0.1.6"
"""The tag of the tests; later ones import what the wheel lacks."""
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
def suite(tmp_path: Path) -> Path:
    """The release's folder of tests, taken out of a checkout of VISSL."""
    checkout = os.environ.get(CHECKOUT)
    if not checkout:
        pytest.skip(f"NOT TESTED: VISSL's own tests, since {CHECKOUT} names no checkout of it")
    tests = tmp_path / "tests"
    tests.mkdir()
    archive = ["git", "-C", checkout, "archive", f"{RELEASE}:tests"]
    subprocess.run(["tar", "-x", "-C", tests], input=subprocess.check_output(archive), check=True)
    return tests


def outcomes(suite: Path, report: Path, active: bool) -> dict[str, bool]:
    """Whether each test passed or was left out, by its name."""
    files = [f"test_{name}.py" for name in FILES]
    options = ["--import-mode=importlib", "-c", os.devnull, f"--rootdir={suite}", "-p", "no:cacheprovider"]
    process = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", "-p", "upstream", *options, f"--junitxml={report}", *files],
        cwd=suite,
        env={
            **{key: value for key, value in os.environ.items() if key != "VISSL_EXT_ACTIVE"},
            **({"VISSL_EXT_ACTIVE": "1"} if active else {}),
            "PYTHONPATH": os.pathsep.join([str(suite), str(Path(__file__).parent)]),
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


def test_no_test_of_vissl_fails_newly(suite: Path, tmp_path: Path) -> None:
    bare = outcomes(suite, tmp_path / "bare.xml", active=False)
    ours = outcomes(suite, tmp_path / "ours.xml", active=True)
    assert bare.keys() == ours.keys()
    passed = [name for name, good in bare.items() if good]
    print(f"{len(passed)} of {len(bare)} tests of VISSL pass without us, {sum(ours.values())} with us")
    assert len(passed) > 200
    assert [name for name in passed if not ours[name]] == []
