"""Methods that see a stack of patches and no view: what solo-learn's classifier sees, evaluation, export, mistakes."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from plugins.methods import METHODS
from plugins.objective import encode
from plugins.patches import patch_stack
from plugins.testing import toy_stacks
from plugins.tools.command import UserError
from plugins.tools.export import export
from solo_ext import main_linear
from solo_ext.checkpoint import find_checkpoint, load_backbone
from solo_ext.compat import pl
from solo_ext.config import parse_pretrain
from solo_ext.features import extractor, read_run
from solo_ext.registry import method_class
from solo_ext.transforms import evaluation_side, pretrain_transform

pytestmark = pytest.mark.solo

ALONE = [name for name, spec in METHODS.items() if spec.only_stacks]
GRID = "augmentations.0.grid"


def _built(cfg, dtype=torch.float64):
    cfg = parse_pretrain(cfg)
    torch.manual_seed(0)
    model = method_class(cfg)(cfg).to(dtype)
    model.log_dict = model.log = lambda *args, **kwargs: None
    return model


def _stack(model, rows=4, dtype=torch.float64):
    return toy_stacks(model.spec, model.options, rows, 3, 8, 8, dtype=dtype)


@pytest.mark.parametrize("name", ALONE)
def test_the_online_classifier_sees_the_mean_over_the_patches(name, compose, tiny):
    model = _built(compose(name, tiny, "knn_eval.enabled=False")).train()
    stacks, labels = _stack(model), torch.arange(4)
    total = model.training_step((torch.arange(4), stacks, labels), 0)
    mean = encode(model.backbone, stacks[0]).mean(1)
    classifier = nn.functional.cross_entropy(model.classifier(mean), labels)
    seen = []
    model.objective.register_forward_hook(lambda objective, given, terms: seen.append((given[0], terms.loss)))
    torch.testing.assert_close(model.training_step((torch.arange(4), stacks, labels), 0), total)
    ((embeddings, loss),) = seen
    torch.testing.assert_close(total, loss + classifier, rtol=1e-12, atol=1e-12)
    assert len(embeddings.z) == len(embeddings.maps) == 1
    torch.testing.assert_close(embeddings.z[0], model.projector(mean))


@pytest.mark.parametrize("name", ALONE)
def test_evaluation_sees_patches_or_the_whole_image(name, compose, tiny):
    images = torch.randn(3, 3, 20, 20, dtype=torch.float64)
    features = {}
    for seen in ("patches", "image"):
        model = _built(compose(name, tiny, f"++method_kwargs.eval_input={seen}")).eval()
        out = model(images)
        features[seen] = out["feats"]
        torch.testing.assert_close(out["z"], model.projector(out["feats"]))
        torch.testing.assert_close(out["logits"], model.classifier(out["feats"]))
    side, stride = model.options["patch"], model.options["stride"]
    torch.testing.assert_close(features["patches"], encode(model.backbone, patch_stack(images, side, stride)).mean(1))
    torch.testing.assert_close(features["image"], model.backbone(images))
    assert not torch.allclose(features["patches"], features["image"])


@pytest.mark.parametrize("name", ALONE)
def test_joined_batches_have_the_gradients_of_one(name, compose, tiny):
    """Each image is normalised by itself, so that the micro-batches are exactly the parts of the batch."""
    gradients = []
    for parts in (1, 2):
        words = ("knn_eval.enabled=False", "++accumulate=joined", "++method_kwargs.norm=per_sample")
        model = _built(compose(name, tiny, *words, f"++accumulate_grad_batches={parts}")).train()
        model.trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, accumulate_grad_batches=parts)
        model._joins_batches = parts > 1
        stack, labels = _stack(model, 6)[0], torch.arange(6)
        for part, pieces in enumerate(zip(stack.chunk(parts), labels.chunk(parts), strict=True)):
            model._ends_step = part == parts - 1
            loss = model.training_step((torch.arange(6 // parts), [pieces[0]], pieces[1]), part)
            if model._ends_step:
                (loss / parts).backward()
        own = [*model.backbone.named_parameters(), *model.projector.named_parameters()]
        gradients.append({key: parameter.grad for key, parameter in own})
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-8, atol=1e-12, msg=key)


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([f"{GRID}.side=24"], "got stacks of 25 patches of 8 pixels at a distance of 4; change the options or"),
        (
            [f"{GRID}.side=22"],
            "augmentations[0].grid.side must be crop_size plus a multiple of grid.stride, got side 22",
        ),
        ([f"++{GRID}.window=9"], "augmentations[0].grid.window must be at most crop_size = 8, got 9"),
        (["++augmentations.0.rotation=True"], "augmentations[0]: rotation and grid exclude each other"),
        (["method_kwargs.patch=10"], "needs stacks of 16 patches of 10 pixels"),
        (["augmentations.0.num_crops=2"], "needs 1 stack of patches per image, got 2"),
        (["++method_kwargs.skip_rows=3"], "skip_rows must be at most grid - 2 = 2"),
    ],
)
def test_mistakes_are_sentences_before_the_start(name, words, message, compose):
    with pytest.raises((UserError, ValueError)) as error:
        cfg = parse_pretrain(compose(name, *words))
        method_class(cfg)(cfg)
    assert message in str(error.value)


@pytest.mark.parametrize("name", ALONE)
def test_a_view_beside_the_stack_is_refused(name, compose):
    view = "{rrc:{enabled:true,crop_min_scale:0.2,crop_max_scale:1.0},crop_size:16,num_crops:1}"
    grid = "{rrc:{enabled:true,crop_min_scale:0.2,crop_max_scale:1.0},grid:{side:20,stride:4},crop_size:8,num_crops:1}"
    cfg = parse_pretrain(compose(name, f"augmentations=[{view},{grid}]"))
    with pytest.raises(UserError, match="compares patches and needs no view beside them, got 1 large view; remove it"):
        method_class(cfg)


@pytest.mark.parametrize("name", ALONE)
def test_patches_that_share_their_colours_are_warned_of(name, compose):
    cfg = parse_pretrain(compose(name))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method_class(cfg)
    jitter, strengths = "augmentations.0.color_jitter", ("brightness", "contrast", "saturation", "hue")
    for none in ([f"{jitter}.prob=0.0"], [f"{jitter}.{each}=0.0" for each in strengths]):
        cfg = parse_pretrain(compose(name, *none, "augmentations.0.grayscale.prob=0.0"))
        with pytest.warns(UserWarning, match=r"patches of an image share its colours, .* by color_jitter or grayscale"):
            method_class(cfg)


def test_native_methods_and_dali_refuse_grids(compose, monkeypatch):
    grid = "augmentations=[{rrc:{enabled:false},grid:{side:16,stride:4},crop_size:8,num_crops:1}]"
    cfg = parse_pretrain(compose("simclr", grid))
    cfg.method, cfg.method_kwargs = "vicreg", {}
    with pytest.raises(UserError, match="takes no stacks of patches; remove jigsaw, rotation and grid"):
        method_class(cfg)
    monkeypatch.setattr("builtins.__import__", _with_dali(__import__))
    with pytest.raises(
        UserError, match=r"jigsaw, rotation, grid, photometric, .* are not available with DALI; use data"
    ):
        parse_pretrain(compose("simclr", grid, "data.format=dali", "data.dataset=custom"))


def _with_dali(original):
    def load(name, *args, **kwargs):
        return object() if name == "nvidia.dali" else original(name, *args, **kwargs)

    return load


def test_a_grid_is_one_crop_and_each_patch_has_colours_of_its_own(compose):
    from PIL import Image

    cfg = parse_pretrain(compose(ALONE[0]))
    torch.manual_seed(0)
    (stack,) = pretrain_transform(cfg)(Image.new("RGB", (16, 16), (200, 60, 30)))
    assert stack.shape == (16, 3, 8, 8)
    colours = {tuple(round(value, 4) for value in patch.mean((1, 2)).tolist()) for patch in stack}
    assert len(colours) > 10, "an image of one colour has patches of many"
    assert evaluation_side(cfg.augmentations[0], "digits") == 20
    cfg.augmentations[0].rrc.enabled = False
    assert evaluation_side(cfg.augmentations[0], "digits") == 16


@pytest.fixture(scope="module")
def trained(thin_digits, tmp_path_factory):
    """Folder of a run of one epoch with a ResNet-18 that normalises each image by itself, and its configuration."""
    from hydra import compose as compose_hydra
    from hydra import initialize_config_dir

    from solo_ext.launch import config_folder
    from solo_ext.main_pretrain import pretrain

    digits, out = thin_digits(16, 10), tmp_path_factory.mktemp("alone")
    words = [
        *(f"data.train_path={digits / 'train'}", f"data.val_path={digits / 'val'}", f"checkpoint.dir={out}"),
        *("backbone.name=resnet18", "++method_kwargs.norm=per_sample", "++method_kwargs.directions=1"),
        *("max_epochs=1", "check_val_every_n_epoch=1", "optimizer.batch_size=8", "++method_kwargs.num_negatives=16"),
    ]
    with initialize_config_dir(str(config_folder("digits").resolve()), version_base="1.2"):
        cfg = compose_hydra(ALONE[0], words)
    return pretrain(cfg), digits


class _Killed(Exception):
    pass


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(compose, digits, tmp_path, monkeypatch):
    """With drawn negatives, which depend on the step."""
    from solo_ext.main_pretrain import pretrain

    words = ["max_epochs=2", "check_val_every_n_epoch=2", "checkpoint.frequency=1", "optimizer.batch_size=8"]
    words += ["++method_kwargs.num_negatives=16", "++checkpoint.version=run", "++auto_resume.enabled=True"]

    def run(folder):
        return pretrain(compose(ALONE[0], *words, f"++checkpoint.dir={tmp_path / folder}"))

    straight = run("straight")
    cls, started = method_class(parse_pretrain(compose(ALONE[0]))), []

    def killed(self, *args):
        started.append(self.current_epoch)
        if started == [0, 1]:
            raise _Killed
        original(self, *args)

    original = cls.on_train_epoch_start
    monkeypatch.setattr(cls, "on_train_epoch_start", killed)
    with pytest.raises(_Killed):
        run("killed")
    resumed = run("killed")
    assert started == [0, 1, 1]
    states = [torch.load(find_checkpoint(place), weights_only=True)["state_dict"] for place in (straight, resumed)]
    assert states[0].keys() == states[1].keys() and "objective.criterion.cpc.clock.steps" in states[0]
    for key, value in states[0].items():
        assert torch.equal(states[1][key], value), key


@pytest.mark.slow
def test_an_exported_trunk_gives_the_same_features_in_torchvision(trained, tmp_path):
    folder, _ = trained
    run = read_run(Path(folder))
    assert run.patches == (8, 4) and run.crop_size == 20
    export(find_checkpoint(folder), "torchvision", tmp_path / "weights.pt")
    theirs = resnet18(norm_layer=lambda width: nn.GroupNorm(1, width))
    theirs.fc = nn.Identity()
    theirs.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    images = torch.randn(2, 3, 20, 20)
    ours = extractor(run, torch.device("cpu"), projector=False)
    with torch.no_grad():
        expected = encode(theirs.eval(), patch_stack(images, 8, 4)).mean(1)
        torch.testing.assert_close(ours(images)["backbone"], expected)
        method = extractor(run, torch.device("cpu"), projector=True)(images)
        torch.testing.assert_close(method["backbone"], expected)
        assert method["projector"].shape == (2, 64)
        whole = resnet18()
        whole.fc = nn.Identity()
        load_backbone(folder, whole)
        torch.testing.assert_close(whole.eval()(images), theirs(images))


@pytest.mark.slow
def test_a_linear_evaluation_sees_the_patches(trained, tmp_path, monkeypatch):
    from hydra import compose as compose_hydra
    from hydra import initialize_config_dir

    from solo_ext.launch import config_folder

    folder, digits = trained
    seen = []
    monkeypatch.setattr(main_linear, "_mixing", lambda cfg: (None, None))
    original = patch_stack
    monkeypatch.setattr("plugins.patches.patch_stack", lambda *args: seen.append(args[1:]) or original(*args))
    with initialize_config_dir(str(config_folder("digits").resolve()), version_base="1.2"):
        words = [f"pretrained_feature_extractor={folder}", f"checkpoint.dir={tmp_path}", "max_epochs=1"]
        words += [f"data.train_path={digits / 'train'}", f"data.val_path={digits / 'val'}", "backbone.name=resnet18"]
        main_linear.evaluate(compose_hydra("linear", words))
    assert {*seen} == {(8, 4)}
