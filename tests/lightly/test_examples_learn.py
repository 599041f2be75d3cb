"""Methods learn the digits in the loop of an example script."""

import importlib
import re
from pathlib import Path

import pytest
import torch

from lightly_ext.examples import common
from lightly_ext.names import CLASS_NAMES
from plugins.testing import OF_VIEWS

pytestmark = [pytest.mark.lightly, pytest.mark.usefixtures("narrow_examples")]

NAMES = {spec.name: name for name, spec in CLASS_NAMES.items()}


STEPS = (40, 200)
"""Most methods have learned something after the first number of steps; for the others the test begins anew."""


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted({"isoloss", *OF_VIEWS[1::4]}))
def test_methods_of_each_kind_learn_the_digits_in_200_steps(
    method: str,
    augmented_digits: tuple,
    all_digits: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """The loop of the script; the defaults of all methods are in test_lightning_learns.py."""
    batches, dataset = augmented_digits
    monkeypatch.setattr(common, "views", lambda folder: batches)
    monkeypatch.setattr(common, "dataset", dataset)
    script = importlib.import_module("lightly_ext.examples.plain_pytorch")
    for steps in STEPS:
        script.main(["--method", method, "--data", str(all_digits), "--steps", str(steps)])
        printed = capsys.readouterr().out
        losses = [float(value) for value in re.findall(r"loss (\S+)", printed)]
        assert len(losses) == steps / 20 and torch.tensor(losses).isfinite().all(), printed
        before, after = map(float, re.findall(r"^kNN (?:un)?trained: ([\d.]+)$", printed, re.MULTILINE))
        if after > before + 10:
            return
    pytest.fail(printed)
