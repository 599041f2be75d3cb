"""LARC without apex: steps worked out by hand, and a slow float64 reference of apex's formula."""

import copy
import math

import numpy as np
import pytest
import torch
from classy_vision.optim import build_optimizer
from vissl.config import AttrDict

from vissl_ext.larc import LARC, PlainLARC, needs_plain_larc
from vissl_ext.registry import register

register()
pytestmark = pytest.mark.vissl


def stepped(value: list[float], gradient: list[float], **kwargs: float) -> torch.Tensor:
    p = torch.nn.Parameter(torch.tensor(value, dtype=torch.float64))
    optimizer = LARC([p], **kwargs)
    p.grad = torch.tensor(gradient, dtype=torch.float64)
    optimizer.step()
    assert optimizer.param_groups[0]["weight_decay"] == kwargs.get("weight_decay", 0.0)
    return p.detach()


def test_scales_by_the_trust_ratio() -> None:
    """‖p‖ = 5, ‖g‖ = 2: local = 0.1 · 5 / 2 = 0.25, the step is 1 · 0.25 · (0, 2)."""
    got = stepped([3.0, 4.0], [0.0, 2.0], lr=1.0, trust_coefficient=0.1, clip=False, eps=0.0)
    assert got.tolist() == pytest.approx([3.0, 3.5], abs=1e-12)


def test_decays_inside_the_ratio() -> None:
    """λ = 0.2: local = 0.1 · 5 / (2 + 0.2 · 5) = 1/6, g + λ p = (0.6, 2.8)."""
    got = stepped([3.0, 4.0], [0.0, 2.0], lr=1.0, weight_decay=0.2, trust_coefficient=0.1, clip=False, eps=0.0)
    assert got.tolist() == pytest.approx([3.0 - 0.1, 4.0 - 2.8 / 6], abs=1e-12)


@pytest.mark.parametrize(("lr", "factor"), [(0.5, 0.5), (0.125, 1.0)])
def test_clips_at_the_learning_rate(lr: float, factor: float) -> None:
    """local = 0.25: half of lr = 0.5, and above lr = 0.125, where plain SGD remains."""
    got = stepped([3.0, 4.0], [0.0, 2.0], lr=lr, trust_coefficient=0.1, clip=True, eps=0.0)
    assert got.tolist() == pytest.approx([3.0, 4.0 - lr * factor * 2.0], abs=1e-12)


def test_zero_norms_leave_the_gradient_undecayed() -> None:
    """As apex: if a norm is 0, the gradient is unchanged, without weight decay."""
    assert stepped([0.0, 0.0], [1.0, 2.0], lr=0.5, weight_decay=0.1).tolist() == [-0.5, -1.0]
    assert stepped([3.0, 4.0], [0.0, 0.0], lr=0.5, weight_decay=0.1).tolist() == [3.0, 4.0]


def test_exclusion_is_of_parameters_with_one_axis() -> None:
    bias = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
    optimizer = LARC(
        [bias, weight], lr=1.0, weight_decay=0.5, trust_coefficient=0.1, clip=False, eps=0.0, exclude_bias_and_norm=True
    )
    bias.grad, weight.grad = torch.tensor([0.0, 2.0]), torch.tensor([[0.0, 2.0]])
    optimizer.step()
    assert bias.tolist() == [3.0, 2.0]
    # local = 0.1 · 5 / (2 + 0.5 · 5) = 1/9 of (1.5, 4)
    assert weight[0].tolist() == pytest.approx([3.0 - 1.5 / 9, 4.0 - 4.0 / 9])


def _reference_larc(value, gradients, *, lr, momentum, decay, trust, eps, clip, nesterov):
    p, velocity = np.array(value), None
    for g in gradients:
        p_norm, g_norm = math.sqrt((p**2).sum()), math.sqrt((g**2).sum())
        if p_norm != 0 and g_norm != 0:
            local = trust * p_norm / (g_norm + p_norm * decay + eps)
            if clip:
                local = min(local / lr, 1.0)
            g = (g + decay * p) * local
        velocity = g if velocity is None else momentum * velocity + g
        p = p - lr * (g + momentum * velocity if nesterov else velocity)
    return p


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("nesterov", [True, False])
def test_many_steps_equal_the_reference(clip: bool, nesterov: bool) -> None:
    rng = np.random.default_rng(0)
    value, gradients = rng.normal(size=(4, 3)), rng.normal(size=(10, 4, 3)) * 10.0 ** rng.integers(-3, 3, (10, 1, 1))
    p = torch.nn.Parameter(torch.tensor(value))
    optimizer = LARC(
        [p], lr=0.3, momentum=0.9, weight_decay=1e-2, nesterov=nesterov, trust_coefficient=0.02, clip=clip, eps=1e-8
    )
    for gradient in gradients:
        p.grad = torch.tensor(gradient)
        optimizer.step()
    expected = _reference_larc(
        value, gradients, lr=0.3, momentum=0.9, decay=1e-2, trust=0.02, eps=1e-8, clip=clip, nesterov=nesterov
    )
    np.testing.assert_allclose(p.detach().numpy(), expected, rtol=1e-12, atol=1e-14)


def optimizer_config(**changes):
    larc = {"clip": False, "eps": 1e-8, "trust_coefficient": 0.001}
    config = {"name": "sgd", "use_larc": True, "larc_config": larc, "momentum": 0.9, "nesterov": False}
    return AttrDict({**config, "weight_decay": 1e-4, **changes})


def test_takes_the_place_of_apex() -> None:
    """Without apex, VISSL's optimiser of the same section cannot be prepared."""
    config = optimizer_config()
    p = torch.nn.Parameter(torch.randn(3, 2))
    stock = build_optimizer(optimizer_config())
    with pytest.raises(RuntimeError, match="Apex needed for LARC"):
        stock.prepare([{"params": [p]}])
    assert needs_plain_larc(config)
    optimizer = PlainLARC.from_config(config)
    optimizer.set_param_groups([p], lr=0.1, weight_decay=1e-4)
    assert isinstance(optimizer, PlainLARC)
    assert isinstance(optimizer.optimizer, LARC)
    assert optimizer.optimizer.trust_coefficient == 0.001
    assert not needs_plain_larc(optimizer_config(use_larc=False))
    assert not needs_plain_larc(optimizer_config(name="adamw"))


def test_resumes_to_the_bit() -> None:
    """The state is that of SGD, which apex's LARC also writes to checkpoints."""

    def make(value: torch.Tensor) -> tuple[torch.nn.Parameter, LARC]:
        p = torch.nn.Parameter(value.clone())
        return p, LARC([p], lr=0.3, momentum=0.9, weight_decay=1e-2)

    torch.manual_seed(0)
    gradients = torch.randn(6, 4, 3)
    p, optimizer = make(torch.randn(4, 3))
    for index, gradient in enumerate(gradients):
        if index == 3:
            q, other = make(p.detach())
            other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            assert set(optimizer.state_dict()["state"][0]) == {"momentum_buffer"}
        p.grad = gradient.clone()
        optimizer.step()
        if index >= 3:
            q.grad = gradient.clone()
            other.step()
    assert torch.equal(p, q)
