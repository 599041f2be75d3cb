"""Losses that VISSL also has: the same values and gradients on one process. PIRL is in tests/losses/test_pirl.py."""

from typing import Any

import pytest
import torch
from classy_vision.generic import distributed_util
from torch import Tensor
from torch.nn.functional import normalize
from vissl.config import AttrDict
from vissl.losses.barlow_twins_loss import BarlowTwinsCriterion
from vissl.losses.dino_loss import DINOLoss as VisslDINO
from vissl.losses.moco_loss import MoCoLoss
from vissl.losses.simclr_info_nce_loss import SimclrInfoNCELoss
from vissl.losses.swav_loss import SwAVLoss

from plugins.losses import DINOLoss, barlow_twins_loss, moco_loss, simclr_loss, swav_loss
from plugins.testing import assert_same_loss, toy_views
from vissl_ext.registry import register

register()
pytestmark = pytest.mark.vissl


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the device as VISSL's trainer does, which these tests do not use."""
    monkeypatch.setattr(distributed_util, "_cuda_device_index", distributed_util._CPU_DEVICE_INDEX)


def _views(count: int, seed: int = 0) -> list[Tensor]:
    return [view.float().requires_grad_() for view in toy_views(6, 5, views=count, seed=seed)]


def test_simclr() -> None:
    buffers = {"world_size": 1, "embedding_dim": 5, "effective_batch_size": 12}
    theirs = SimclrInfoNCELoss(AttrDict({"temperature": 0.1, "buffer_params": buffers}))
    assert_same_loss(lambda *z: simclr_loss(z, temperature=0.1), lambda *z: theirs(torch.cat(z), None), _views(2))


def test_barlow_twins() -> None:
    """VISSL's loss is multiplied by scale_loss, and standardises the rows of both views together."""
    theirs = BarlowTwinsCriterion(lambda_=0.01, scale_loss=0.024, embedding_dim=5)
    first, second = _views(2)
    same = 0.024 * barlow_twins_loss(first, first.flip(0), lambd=0.01)  # two views with the same mean and variance
    torch.testing.assert_close(same, theirs(torch.cat([first, first.flip(0)])), rtol=1e-5, atol=1e-6)
    ours = 0.024 * barlow_twins_loss(first, 3 + 2 * second, lambd=0.01)
    torch.testing.assert_close(ours, 0.024 * barlow_twins_loss(first, second, lambd=0.01), rtol=1e-4, atol=1e-6)
    assert theirs(torch.cat([first, 3 + 2 * second])).item() > 1.2 * theirs(torch.cat([first, second])).item()


def test_moco(monkeypatch: pytest.MonkeyPatch) -> None:
    """VISSL's loss writes the keys before it computes the loss, whose logits use a copy of the queue."""
    monkeypatch.setattr("vissl.losses.moco_loss.concat_all_gather", lambda keys: keys)
    query, key = _views(2)
    theirs = MoCoLoss(AttrDict({"embedding_dim": 5, "queue_size": 12, "momentum": 0.999, "temperature": 0.2}))
    theirs.key, queue = normalize(key.detach(), dim=1), theirs.queue.T.clone()
    assert_same_loss(lambda q: moco_loss(q, key, queue, temperature=0.2), theirs, [query])


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("queued", [False, True])
def test_swav(queued: bool, double: bool) -> None:
    """Two of four crops have codes, alone or with the scores of a queue; theirs is float32 in both precisions."""
    scores = [normalize(view.detach(), dim=1).requires_grad_() for view in _views(4)]
    options: dict[str, Any] = {
        **{"temperature": 0.1, "crops_for_assign": [0, 1], "num_crops": 4, "num_iters": 3, "epsilon": 0.05},
        **{"use_double_precision": double, "num_prototypes": [5], "embedding_dim": 8, "output_dir": ""},
        **{"temp_hard_assignment_iters": 0, "normalize_last_layer": True},
        "queue": {"start_iter": 0, "queue_length": 9 * queued, "local_queue_length": 9 * queued},
    }
    theirs = SwAVLoss(AttrDict(options))
    queue = list(theirs.swav_criterion.local_queue0) if queued else None
    embeddings = torch.zeros(24, 8)
    assert_same_loss(
        lambda *s: swav_loss(s, queue_scores=queue), lambda *s: theirs([embeddings, torch.cat(s)], None), scores
    )


def test_dino_for_two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vissl.losses.dino_loss.dist.all_reduce", lambda tensor: None)  # it needs a process group
    options = {"output_dim": 5, "student_temp": 0.1, "num_crops": 4, "crops_for_teacher": [0, 1], "ema_center": 0.9}
    ours, theirs = DINOLoss(5, tau_teacher=0.05), VisslDINO(AttrDict(options))
    theirs.teacher_temp = 0.05
    for seed in range(2):
        teacher = [view.detach() for view in _views(2, seed + 5)]
        theirs.teacher_output = torch.cat(teacher)
        assert_same_loss(
            lambda *s, teacher=teacher: ours(s, teacher).loss, lambda *s: theirs([torch.cat(s)]), _views(4, seed)
        )
        torch.testing.assert_close(ours.center, theirs.center.flatten(), rtol=1e-5, atol=1e-6)
