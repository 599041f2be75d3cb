"""PIRL's head: order of the patches, shared and separate weights, variants, errors."""

import numpy as np
import pytest
import torch

from plugins.heads import PatchHead


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def _linear(layer, x):
    return x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()


def test_equals_the_slow_reference():
    head, features = PatchHead(5, 3, 4).double(), torch.randn(2, 4, 5, dtype=torch.float64)
    patches = [[_linear(head.patch, patch) for patch in stack] for stack in features.numpy()]
    expected = [_linear(head.join, np.concatenate(stack)) for stack in patches]
    np.testing.assert_allclose(head(features).detach().numpy(), expected, rtol=1e-12)
    image = features[:, 0]
    np.testing.assert_allclose(head(image).detach().numpy(), _linear(head.image, image.numpy()), rtol=1e-12)


def test_the_order_of_the_patches_matters_and_that_of_the_images_does_not():
    head, features = PatchHead(5, 3, 4), torch.randn(2, 4, 5)
    assert not torch.allclose(head(features.flip(1)), head(features))
    torch.testing.assert_close(head(features.flip(0)), head(features).flip(0))


@pytest.mark.parametrize("hidden", [None, 7])
def test_images_and_patches_have_weights_of_their_own(hidden):
    head = PatchHead(5, 3, 4, hidden=hidden)
    head(torch.randn(2, 4, 5)).sum().backward()
    assert all((p.grad is None) == name.startswith("image") for name, p in head.named_parameters())
    head.zero_grad()
    head(torch.randn(2, 5)).sum().backward()
    assert all((p.grad is not None) == name.startswith("image") for name, p in head.named_parameters())


def test_published_sizes():
    shapes = {name: tuple(p.shape) for name, p in PatchHead(2048, 128).named_parameters() if p.ndim == 2}
    assert shapes == {"image.weight": (128, 2048), "patch.weight": (128, 2048), "join.weight": (128, 1152)}
    shapes = {name: tuple(p.shape) for name, p in PatchHead(2048, 128, hidden=2048).named_parameters() if p.ndim == 2}
    branch = {"0.weight": (2048, 2048), "2.weight": (128, 2048)}
    wanted = {f"{side}.{name}": shape for side in ("image", "patch") for name, shape in branch.items()}
    assert shapes == {**wanted, "join.weight": (128, 1152)}


def test_batch_norm_sees_all_patches_of_a_batch():
    head, features = PatchHead(5, 3, 4, hidden=7, norm=True).double(), torch.randn(6, 4, 5, dtype=torch.float64)
    rows = head.patch[0](features.flatten(0, 1))
    unit = (rows - rows.mean(0)) / (rows.var(0, unbiased=False) + 1e-5).sqrt()
    expected = head.join(head.patch[3](unit.relu()).view(6, 12))
    torch.testing.assert_close(head(features), expected, rtol=1e-10, atol=1e-12)
    assert head.image[1].num_batches_tracked == 0


def test_a_turned_view_has_a_single_layer():
    head, features = PatchHead(5, 3, 1), torch.randn(2, 1, 5)
    torch.testing.assert_close(head(features), head.patch(features[:, 0]))
    assert {name.split(".")[0] for name, _ in head.named_parameters()} == {"image", "patch"}


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: PatchHead(5, 3, 4)(torch.ones(2, 9, 5)), "[B, 4, 5] of stacks of 4 patches, got shape (2, 9, 5)"),
        (lambda: PatchHead(5, 3, 4)(torch.ones(5)), "got shape (5,)"),
        (lambda: PatchHead(5, 3, 0), "patches must be in [1, inf)"),
        (lambda: PatchHead(5, 3, 4, hidden=0), "hidden must be in [1, inf)"),
    ],
)
def test_mistakes_are_sentences(call, sentence):
    with pytest.raises(ValueError) as error:
        call()
    assert sentence in str(error.value)
