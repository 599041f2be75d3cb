"""RegNetY trunks: torchvision's networks, and SEER's largest dense one."""

import pytest
import torch
from torchvision import models

from plugins.tools.regnet import BLOCKS, regnet_y, small_stem_


def test_names_are_those_of_torchvision_and_256gf():
    names = [name for name in models.list_models(module=models) if name.startswith("regnet_y")]
    assert {*names, "regnet_y_256gf"} == set(BLOCKS)


def test_network_is_that_of_torchvision():
    torch.manual_seed(0)
    ours = regnet_y("regnet_y_400mf", num_classes=7).state_dict()
    torch.manual_seed(0)
    theirs = models.regnet_y_400mf(weights=None, num_classes=7).state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_256gf_has_the_published_size():
    """Output of 10 444 and 1.27 billion parameters (arXiv:2103.01988)."""
    with torch.device("meta"):
        network = regnet_y("regnet_y_256gf", num_classes=1)
        assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 1)
    assert network.fc.in_features == 10444
    count = sum(parameter.numel() for parameter in network.parameters()) - 10445
    assert count == pytest.approx(1272e6, abs=1e6)


def test_stem_for_small_images_halves_once_less():
    with torch.device("meta"):
        network = small_stem_(regnet_y("regnet_y_800mf"))
        assert network.trunk_output(network.stem(torch.zeros(1, 3, 32, 32))).shape[2:] == (2, 2)


def test_weights_are_refused():
    with pytest.raises(ValueError, match="regnet_y_400mf is built without weights, got weights='DEFAULT'"):
        regnet_y("regnet_y_400mf", weights="DEFAULT")
