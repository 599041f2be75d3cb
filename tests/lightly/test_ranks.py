"""The state of a method is the same on all processes after three steps, in a Trainer and in a user's loop.

Each process draws different weights and images, as without a seed.
"""

import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plugins.methods import METHODS
from plugins.testing import NARROW, OF_VIEWS, POOL_SIZE, toy_backbone

pytestmark = [pytest.mark.lightly, pytest.mark.slow, pytest.mark.ddp]
SMALL = {
    **NARROW,
    **{"proj_hidden_dim": 12, "proj_output_dim": 8, "pred_hidden_dim": 10, "n_classes": 16, "log_eigvals": True},
}


def _views() -> list[Tensor]:
    return [torch.randn(4, 3, 16, 16) for _ in range(2)]


def _kept(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, buffers and counters, without BatchNorm's running statistics, which differ between processes."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for name, buffer in model.named_buffers():  # those that are not saved, too
        state[name] = buffer.clone()
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if type(value) in (int, float):
                state[f"{name}.{key} (plain)"] = torch.tensor(float(value))
    return {name: value for name, value in state.items() if not name.endswith(("running_mean", "running_var"))}


def _of_views() -> list[tuple[str, Any]]:
    """Return class names and SPECs of the methods without a memory of images."""
    from lightly_ext.names import CLASS_NAMES

    return [(name, spec) for name, spec in CLASS_NAMES.items() if spec.name in OF_VIEWS]


def _loop(comm: Any, rank: int) -> dict[str, dict[str, Tensor]]:
    from torch.nn.parallel import DistributedDataParallel

    from lightly_ext import models

    torch.manual_seed(rank)
    found = {}
    for name, spec in _of_views():
        options = {key: value for key, value in SMALL.items() if key in spec.options}
        model = vars(models)[name](toy_backbone(), input_dim=8, **options)
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        optimizer = torch.optim.SGD(model.training_parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            wrapped(_views()).backward()
            optimizer.step()
            model.update_momentum(0.9)
        found[spec.name] = _kept(model)
    return found


def _trainer(comm: Any, rank: int, size: int) -> dict[str, dict[str, Tensor]]:
    import pytorch_lightning

    from lightly_ext import lightning

    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "GROUP_RANK": 0}
    place.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=1, TORCHELASTIC_RUN_ID="test")  # the group is there already
    before = dict(os.environ)
    os.environ.update({name: str(value) for name, value in place.items()})
    try:
        torch.manual_seed(rank)
        found = {}
        for name, spec in _of_views():
            options = {key: value for key, value in SMALL.items() if key in spec.options}
            more = {"batch_size_per_device": 4, "num_classes": 4, "optimizer": "sgd", "lr": 1.0}
            module = lightning.__getattr__(name)(backbone=toy_backbone(), input_dim=8, **more, **options)
            quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
            trainer = pytorch_lightning.Trainer(
                **dict.fromkeys(quiet, False),
                **{"max_epochs": 1, "accelerator": "cpu", "devices": size, "use_distributed_sampler": False},
                strategy="ddp_find_unused_parameters_true",  # the benchmarks' own
            )
            data = [(_views(), torch.arange(4)) for _ in range(3)]
            trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None))
            assert trainer.global_step == 3 and trainer.world_size == size
            found[spec.name] = _kept(module)
        return found
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.mark.parametrize("kind", ["loop", "trainer"])
def test_what_a_method_keeps_is_the_same_on_all_processes(kind, ranks):
    function, more = {"loop": (_loop, ()), "trainer": (_trainer, (POOL_SIZE,))}[kind]
    found = ranks.run(function, [(rank, *more) for rank in range(POOL_SIZE)])
    assert [*found[0]] == OF_VIEWS
    for method, first in found[0].items():
        assert any(name.startswith("teacher_backbone") for name in first) == METHODS[method].teacher
        for other in found[1:]:
            assert other[method].keys() == first.keys()
            differ = [name for name, value in first.items() if not torch.equal(value, other[method][name])]
            assert not differ, (method, differ)
