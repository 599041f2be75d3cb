"""One environment holds all hosts, in the releases that the adapters are for."""

from importlib.metadata import version

import pytest


def test_hosts_are_installed_in_the_releases_that_are_supported():
    assert version("solo-learn") == "1.0.2"
    assert version("vissl") == "0.1.6"
    assert version("lightly").startswith("1.6.")
    assert version("nvidia-dali-cuda120")


@pytest.mark.slow
def test_lightly_and_dali_import():
    import lightly.loss
    import nvidia.dali

    assert lightly.loss.NTXentLoss and nvidia.dali.Pipeline
