"""The state of a method is the same on all processes after three steps of main_pretrain, and so is the quality."""

import csv
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plugins.methods import METHODS
from plugins.testing import NARROW, RankPool, read_yaml_fast, record_quality, recorded_quality, tiny_backbone

pytestmark = [pytest.mark.solo, pytest.mark.slow, pytest.mark.ddp]
PROCESSES = 2
CONFIGS = Path(__file__).parents[2] / "configs" / "solo" / "digits"
LOGS_QUALITY = "isoloss"
SMALL = {
    **NARROW,
    **{"proj_hidden_dim": 16, "proj_output_dim": 8, "pred_hidden_dim": 8, "n_classes": 16, "log_eigvals": "true"},
}


def _kept(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, buffers and counters, without BatchNorm's running statistics, which differ between processes."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state.update({name: buffer.clone() for name, buffer in model.named_buffers()})  # those that are not saved, too
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if type(value) in (int, float):
                state[f"{name}.{key} (plain)"] = torch.tensor(float(value))
    return {name: value for name, value in state.items() if not name.endswith(("running_mean", "running_var"))}


def _pretrain(comm: Any, rank: int, size: int, digits: str, out: str) -> dict[str, dict[str, Tensor]]:
    from hydra import compose, initialize_config_dir

    from solo_ext import logs
    from solo_ext.architectures import ARCHITECTURES
    from solo_ext.compat import pl
    from solo_ext.main_pretrain import pretrain

    rows = Path(out, "rows")
    rows.mkdir(exist_ok=True)
    record_quality(rows)

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            assert trainer.world_size == size
            if trainer.global_step == 3:
                found[module.spec.name] = _kept(module)

    read_yaml_fast()
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "GROUP_RANK": 0}
    place.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=1, TORCHELASTIC_RUN_ID="test")  # the group is there already
    before, usual, found = dict(os.environ), logs.callbacks, {}
    os.environ.update({name: str(value) for name, value in place.items()})
    ARCHITECTURES["tiny"] = tiny_backbone
    logs.callbacks = lambda cfg: [*usual(cfg), Watch()]
    try:
        for method, spec in METHODS.items():
            small = [f"++method_kwargs.{key}={value}" for key, value in SMALL.items() if key in spec.options]
            if method == LOGS_QUALITY:
                small.append("++method_kwargs.log_quality=features")
            quick = (f"++devices={size}", "++strategy=ddp", "++max_epochs=1", "++limit_val_batches=0", "optimizer.lr=1")
            quick = (*quick, f"data.train_path={digits}/train", f"data.val_path={digits}/val", "optimizer.batch_size=8")
            more = (
                f"++checkpoint.dir={out}",
                "++checkpoint.version=v",
                "backbone.name=tiny",
                "++limit_train_batches=3",
            )
            with initialize_config_dir(str(CONFIGS), version_base="1.2"):
                cfg = compose(method, [*quick, *more, *small])
            pretrain(cfg)
        return found
    finally:
        ARCHITECTURES.pop("tiny")
        logs.callbacks = usual
        os.environ.clear()
        os.environ.update(before)


def test_what_a_method_keeps_is_the_same_on_all_processes(digits, tmp_path):
    given = [(rank, PROCESSES, str(digits), str(tmp_path)) for rank in range(PROCESSES)]
    with RankPool(PROCESSES, timeout=600) as pool:
        found = pool.run(_pretrain, given)
    assert found[0].keys() == METHODS.keys()
    for method, first in found[0].items():
        assert any(name.startswith("momentum_backbone") for name in first) == METHODS[method].teacher
        for other in found[1:]:
            assert other[method].keys() == first.keys()
            differ = [name for name, value in first.items() if not torch.equal(value, other[method][name])]
            assert not differ, (method, differ)
    (wanted,) = recorded_quality(tmp_path / "rows")
    (file,) = (tmp_path / LOGS_QUALITY).rglob("metrics.csv")
    with file.open() as lines:
        logged = [row for row in csv.DictReader(lines) if row.get("quality/features/rankme")]
    assert len(logged) == 1 and wanted.keys() <= logged[0].keys()
    for name, value in wanted.items():
        assert float(logged[0][name]) == pytest.approx(value, rel=1e-5), name
