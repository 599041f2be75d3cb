"""DINO as the authors of DISSL trained it: temperature, head, teacher, one training step."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from plugins.distributed import LOCAL
from plugins.heads import SharedHead
from plugins.losses import teacher_temperature
from plugins.methods import METHODS, VARIANTS
from plugins.tools.command import UserError
from solo_ext.compat import native_methods
from solo_ext.config import parse_pretrain
from solo_ext.registry import method_class

pytestmark = pytest.mark.solo
SPEC = VARIANTS["dino"]
ROOT = Path(__file__).parents[2] / "configs" / "solo"


def _softmax(logits):
    e = np.exp(logits - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def _reference_dino(students, teachers, center, tau_t, tau_s, momentum):
    """The mean of two cross-entropies, the centre moving after each; loss and centre."""
    total = 0.0
    for student, teacher in ((students[0], teachers[1]), (students[1], teachers[0])):
        p, q = _softmax((teacher - center) / tau_t), _softmax(student / tau_s)
        total += -(p * np.log(q)).sum(1).mean() / 2
        center = momentum * center + (1 - momentum) * teacher.mean(0)
    return total, center


def test_the_teachers_temperature_goes_up_in_equal_steps():
    criterion = SPEC.loss(SPEC.resolve({}), LOCAL)
    for epoch, temperature in enumerate([*np.linspace(0.04, 0.07, 50), 0.07, 0.07]):
        assert teacher_temperature(epoch, **criterion.schedule) == pytest.approx(temperature)
    for epochs, temperature in ((0, 0.07), (1, 0.04)):
        criterion = SPEC.loss(SPEC.resolve({"warmup_teacher_temperature_epochs": epochs}), LOCAL)
        assert teacher_temperature(0, **criterion.schedule) == temperature


@pytest.fixture
def configured(digits: Path) -> Callable[..., DictConfig]:
    """configured(*overrides) → the short configuration on digits, complete."""

    def build(*overrides: str) -> DictConfig:
        folders = [f"data.train_path={digits / 'train'}", f"data.val_path={digits / 'val'}"]
        with initialize_config_dir(str(ROOT / "digits" / "short"), version_base="1.2"):
            return parse_pretrain(compose("dino", [*folders, *overrides]))

    return build


def _model(cfg):
    model = method_class(cfg)(cfg)
    model.log_dict = model.log = lambda *what, **how: None
    return model.train()


def _batch(rows=8):
    views = [torch.randn(rows, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    return torch.arange(rows), views, torch.arange(rows) % 10


def test_an_option_of_its_own_tells_it_from_solo_learns(configured):
    assert method_class(configured()).spec is SPEC
    native = "method_kwargs={proj_hidden_dim: 8, proj_output_dim: 4, num_prototypes: 8}"
    cfg = configured("~method_kwargs", f"+{native}")
    assert method_class(cfg) is native_methods()["dino"]
    with pytest.raises(UserError, match=r"dino has no option 'num_prototypes'; known options: center_momentum, "):
        method_class(configured("+method_kwargs.num_prototypes=8"))
    with pytest.raises(UserError, match=r"method dino: center_momentum must be in \[0, 1\], got 2.0"):
        method_class(configured("+method_kwargs.center_momentum=2"))


def test_options_that_solo_learns_dino_has_do_not_choose_it(configured):
    ours = "{proj_hidden_dim: 8, num_prototypes: 8, proj_norm: true}"
    assert method_class(configured("~method_kwargs", f"+method_kwargs={ours}")).spec is METHODS["dino"]
    mixed = "{bottleneck_dim: 8, proj_output_dim: 8, num_prototypes: 8}"
    with pytest.raises(UserError, match=r"dino has no option 'proj_output_dim'.*num_prototypes"):
        method_class(configured("~method_kwargs", f"+method_kwargs={mixed}"))


def test_head_is_the_published_one_and_the_teachers_begins_at_random(configured):
    model = _model(configured())
    assert [type(layer).__name__ for layer in model.projector] == [
        *("Linear", "BatchNorm1d", "GELU", "UnitRows", "Linear", "UnitLinear")
    ]
    assert isinstance(model.projector, SharedHead)
    assert [tuple(model.projector[i].weight.shape) for i in (0, 4, 5)] == [(256, 512), (64, 256), (256, 64)]
    assert all(model.projector[i].bias is None for i in (0, 4, 5))
    for student, teacher in zip(model.backbone.parameters(), model.momentum_backbone.parameters(), strict=True):
        assert torch.equal(student, teacher)
    for layer in (0, 4, 5):
        student, teacher = model.projector[layer].weight, model.momentum_projector[layer].weight
        cosine = torch.nn.functional.cosine_similarity(student.flatten(), teacher.flatten(), dim=0)
        assert abs(cosine) < 0.1 and teacher.std() == pytest.approx(0.02, rel=0.05)
        assert not teacher.requires_grad


@pytest.mark.slow
def test_step_is_the_loss_of_both_views_through_one_batch_norm(configured):
    model = _model(configured()).double()
    indexes, views, labels = _batch()
    views = [view.double() for view in views]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.objective.start_epoch(0)
    total = model.training_step((indexes, views, labels), 0)
    centre = model.objective.criterion.dino.center.clone()

    model.load_state_dict(state)
    feats = [model.backbone(view) for view in views]
    students = model.projector(torch.cat(feats)).chunk(2)
    with torch.no_grad():
        teachers = model.momentum_projector(torch.cat([model.momentum_backbone(view) for view in views])).chunk(2)
    arrays = ([view.detach().numpy() for view in side] for side in (students, teachers))
    expected, moved = _reference_dino(*arrays, np.zeros(256), 0.04, 0.1, 0.9)
    classifier = sum(torch.nn.functional.cross_entropy(model.classifier(f.detach()), labels) for f in feats) / 2
    assert total.item() == pytest.approx(expected + classifier.item(), rel=1e-10)
    np.testing.assert_allclose(centre.numpy(), moved, rtol=1e-9, atol=1e-12)
    assert "objective.criterion.dino.center" in state


@pytest.mark.slow
@pytest.mark.sample("0-True")
@pytest.mark.parametrize(("epoch", "frozen"), [(0, True), (1, False)])
def test_the_last_layer_stays_in_the_first_epoch(configured, epoch, frozen):
    model = _model(configured())
    model.objective.start_epoch(epoch)
    model.training_step(_batch(), 0).backward()
    model.objective.after_backward()
    assert (model.projector[5].weight.grad is None) == frozen
    assert model.projector[4].weight.grad.abs().sum() > 0
    assert model.objective.criterion.dino.tau_teacher == pytest.approx(0.04 if epoch == 0 else 0.07)


@pytest.mark.slow
def test_the_teacher_follows_both_networks_but_not_their_statistics(configured):
    model = _model(configured())
    pairs = [(model.backbone, model.momentum_backbone), (model.projector, model.momentum_projector)]
    before = [[p.clone() for p in teacher.parameters()] for _, teacher in pairs]
    buffers = [[b.clone() for b in teacher.buffers()] for _, teacher in pairs]
    with torch.no_grad():
        for student, _ in pairs:
            for p in student.parameters():
                p.add_(1.0)
    model.momentum_updater.cur_tau = 0.75
    model.update_teacher()
    for (student, teacher), olds, old_buffers in zip(pairs, before, buffers, strict=True):
        for p, q, old in zip(student.parameters(), teacher.parameters(), olds, strict=True):
            torch.testing.assert_close(q, 0.75 * old + 0.25 * p)
        assert all(torch.equal(b, old) for b, old in zip(teacher.buffers(), old_buffers, strict=True))


def test_settings_on_tinyimagenet_are_the_published_ones(digits):
    folders = [f"data.train_path={digits / 'train'}", f"data.val_path={digits / 'val'}"]
    with initialize_config_dir(str(ROOT / "tinyimagenet"), version_base="1.2"):
        cfg = parse_pretrain(compose("dino", [*folders, "++accelerator=cpu"]))
    assert method_class(cfg).spec is SPEC
    assert SPEC.resolve(dict(cfg.method_kwargs)) == SPEC.resolve({}), "the defaults are the published settings"
    assert (cfg.momentum.base_tau, cfg.momentum.final_tau) == (0.996, 1.0)
    with torch.device("meta"):
        head = SPEC.head(512, SPEC.resolve({}))
    assert sum(p.numel() for p in head.parameters()) == 512 * 1024 + 2 * 1024 + 1024 * 256 + 256 * 1000
