"""The generic adapter: the numbers are those of plugins, and solo-learn's steps move what they should."""

import numpy as np
import pytest
import torch

from plugins.distributed import LOCAL
from plugins.heads import TwoBranchHead
from plugins.methods import METHODS
from plugins.objective import encode_views, project
from plugins.sobel import SobelConv2d
from plugins.spec import Embeddings
from plugins.testing import OF_VIEWS, tiny_backbone
from plugins.tools.command import UserError
from solo_ext.checkpoint import load_backbone
from solo_ext.compat import native_methods, pl
from solo_ext.config import parse_pretrain
from solo_ext.data import pretrain_images
from solo_ext.registry import method_class, plugin_methods, register

pytestmark = pytest.mark.solo


@pytest.fixture
def compose(compose, tiny):
    """The same with a backbone of one convolution."""
    return lambda name, *overrides: compose(name, tiny, *overrides)


def _build(cfg, dtype=torch.float32):
    cfg = parse_pretrain(cfg)
    torch.manual_seed(0)
    model = method_class(cfg)(cfg).to(dtype)
    model.log_dict = lambda *args, **kwargs: None
    model.log = lambda *args, **kwargs: None
    return model


def _batch(dtype=torch.float32, rows=8):
    generator = torch.Generator().manual_seed(1)
    views = [torch.randn(rows, 3, 16, 16, generator=generator, dtype=dtype) for _ in range(2)]
    return torch.arange(rows), views, torch.arange(rows) % 10


@pytest.mark.sample("isoloss", "dissl")
@pytest.mark.parametrize("name", OF_VIEWS)
def test_loss_and_gradients_are_those_of_plugins(name, compose):
    plain = ["++method_kwargs.log_eigvals=False"] if "log_eigvals" in METHODS[name].options else []
    model = _build(compose(name, "knn_eval.enabled=False", *plain), torch.float64).train()
    batch = _batch(torch.float64)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    parameters = [p for part in (model.backbone, model.projector) for p in part.parameters() if p.requires_grad]
    total = model.training_step(batch, 0)
    gradients = torch.autograd.grad(total, parameters)

    model.load_state_dict(state)
    feats, maps = encode_views(model.backbone, batch[1], METHODS[name].taps(model.options))
    z = project(model.projector, feats)
    local = [model.projector.project_maps(view) for view in maps if view]
    p = model.predictor.predict(z) if model.predictor is not None else z
    if METHODS[name].teacher:
        with torch.no_grad():
            targets = [model.momentum_projector(model.momentum_backbone(view)) for view in batch[1]]
    elif isinstance(model.projector, TwoBranchHead):
        targets = [model.projector.teacher(f) for f in feats]
    else:
        targets = [v.detach() for v in z]
    loss = METHODS[name].loss(model.options, LOCAL)(Embeddings(z, p, targets, maps=local)).loss
    classifier = sum(torch.nn.functional.cross_entropy(model.classifier(f.detach()), batch[2]) for f in feats) / 2
    torch.testing.assert_close(total, loss + classifier, rtol=1e-12, atol=1e-12)
    for one, other in zip(gradients, torch.autograd.grad(loss, parameters), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["dissl", "cissl"])
def test_small_crops_are_students_alone(name, compose):
    crop = "{rrc:{enabled:true,crop_min_scale:0.1,crop_max_scale:1.0},crop_size:%d,num_crops:%d}"
    sizes = ",".join(crop % size for size in ((16, 2), (8, 3)))
    cfg = compose(name, "knn_eval.enabled=False", f"augmentations=[{sizes}]")
    model = _build(cfg, torch.float64).train()
    assert (model.num_large_crops, model.num_small_crops) == (2, 3)
    indexes, views, labels = _batch(torch.float64)
    crops = [view[:, :, 4:12, 4:12] for view in (*views, views[0].flip(3))]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    total = model.training_step((indexes, [*views, *crops], labels), 0)

    model.load_state_dict(state)
    feats = [model.backbone(view) for view in (*views, *crops)]
    z, targets = [model.projector(f) for f in feats], [model.projector.teacher(f) for f in feats[:2]]
    loss = METHODS[name].loss(model.options, LOCAL)(Embeddings(z, z, targets)).loss
    classifier = sum(torch.nn.functional.cross_entropy(model.classifier(f.detach()), labels) for f in feats[:2]) / 2
    torch.testing.assert_close(total, loss + classifier, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["dissl", "cissl"])
@pytest.mark.parametrize("order", [((8, 3), (16, 2)), ((16, 1), (8, 3), (16, 1))])
def test_small_crops_before_large_views_are_refused(name, order, compose):
    """Without the error they would be used as large views: the loss would be another one, without a warning."""
    crop = "{rrc:{enabled:true,crop_min_scale:0.1,crop_max_scale:1.0},crop_size:%d,num_crops:%d}"
    augmentations = ",".join(crop % view for view in order)
    with pytest.raises(UserError, match="augmentations: large views come first") as error:
        parse_pretrain(compose(name, f"augmentations=[{augmentations}]"))
    assert f"got views of sizes {[size for size, count in order for _ in range(count)]}" in str(error.value)


@pytest.mark.parametrize("name", ["byol", "simsiam"])
def test_our_byol_and_simsiam_are_solo_learns(name, compose):
    ours = _build(compose(name, "knn_eval.enabled=False"), torch.float64).train()
    native = _build(
        compose(name, "knn_eval.enabled=False", "~method_kwargs.log_eigvals", "~method_kwargs.pred_lr_scale"),
        torch.float64,
    ).train()
    assert type(ours) is plugin_methods()[name] and type(native) is native_methods()[name]
    missing, unexpected = native.load_state_dict(ours.state_dict(), strict=False)
    assert all("bias" in key for key in missing)  # a bias that solo-learn freezes and batch norm removes
    assert all(key.startswith("objective.embedding_moment") for key in unexpected)
    for key in missing:
        torch.nn.init.zeros_(native.get_parameter(key))
    losses = [model.training_step(_batch(torch.float64), 0) for model in (ours, native)]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-12)
    for key in ("backbone.conv1.weight", "projector.0.weight", "predictor.0.weight"):
        gradients = [torch.autograd.grad(loss, model.get_parameter(key), retain_graph=True)[0]
                     for loss, model in zip(losses, (ours, native), strict=True)]  # fmt: skip
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["isoloss", "directcopy", "byol"])
def test_t2_evaluation_leaves_the_moment_alone(name, compose):
    model = _build(compose(name, "knn_eval.enabled=False"))
    model.training_step(_batch(), 0)
    before = {key: value.clone() for key, value in model.moment.state_dict().items()}
    assert before["C"].abs().sum() > 0
    model.eval()
    with torch.no_grad():
        model.validation_step((torch.randn(8, 3, 16, 16), torch.arange(8)), 0)
        model(torch.randn(8, 3, 16, 16))
    for key, value in model.moment.state_dict().items():
        assert torch.equal(value, before[key])


def test_t16_no_forward_pass_of_a_teacher_that_is_the_student(compose):
    passes = {}
    for tau in (0.0, 0.99):
        model = _build(compose("isoloss", f"momentum.base_tau={tau}", f"momentum.final_tau={tau}"))
        model.knn_eval = False
        passes[tau] = 0

        def count(*_, tau=tau):
            passes[tau] += 1

        model.momentum_backbone.register_forward_hook(count)
        model.training_step(_batch(), 0)
    assert passes == {0.0: 0, 0.99: 2}


@pytest.mark.parametrize("tau", [0.0, 0.3, 1.0])
def test_the_teacher_moves_in_place_as_solo_learns_does(tau, compose):
    model = _build(compose("isoloss", "knn_eval.enabled=False"), torch.float64)
    model.momentum_updater.cur_tau = tau
    teachers = [teacher for _, module in model.momentum_pairs for teacher in module.parameters()]
    students = [student for module, _ in model.momentum_pairs for student in module.parameters()]
    with torch.no_grad():
        for student in students:
            student.add_(torch.randn_like(student))
    wanted = [tau * teacher + (1 - tau) * student for teacher, student in zip(teachers, students, strict=True)]
    places = [teacher.data_ptr() for teacher in teachers]
    model.update_teacher()
    torch.testing.assert_close(teachers, wanted, rtol=1e-12, atol=1e-12)
    assert places == [teacher.data_ptr() for teacher in teachers]


def test_p9_without_teacher_the_targets_are_the_projections(compose):
    """At τ = 0 the teacher is a copy of the student: with and without its forward pass the loss is the same."""
    overrides = ("momentum.base_tau=0.0", "momentum.final_tau=0.0", "knn_eval.enabled=False")
    model = _build(compose("isoloss", *overrides), torch.float64)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    short = model.training_step(_batch(torch.float64), 0)
    model.load_state_dict(state)
    model.has_teacher = True
    full = model.training_step(_batch(torch.float64), 0)
    torch.testing.assert_close(short, full, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(METHODS))
def test_three_real_steps_move_every_parameter(name, compose):
    from solo_ext.datasets import image_dataset
    from solo_ext.loaders import Images
    from solo_ext.transforms import evaluation_transform, pretrain_transform

    cfg = parse_pretrain(compose(name, "scheduler.name=none", "optimizer.lr=0.01"))
    model = method_class(cfg)(cfg)
    folder = cfg.data.train_path
    train = image_dataset("digits", folder, "pretrain", pretrain_transform(cfg), indexed=True, no_labels=False)
    val = image_dataset("digits", cfg.data.val_path, "val", evaluation_transform("digits"), indexed=False, no_labels=0)
    before = {key: value.clone() for key, value in model.named_parameters()}
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=Images(train, val, cfg, drop_last=True))
    assert trainer.global_step == 3
    still = {
        key.removeprefix("momentum_") for key, value in model.named_parameters() if torch.equal(value, before[key])
    }
    frozen = {key for key, value in model.projector.named_parameters("projector") if not value.requires_grad}
    for _, parameters, hints in model.objective.groups:
        if hints.frozen_steps >= 3 or hints.frozen_epochs:
            frozen |= set(parameters)
    layers = dict(model.projector.named_children())
    cancelled = {  # by the batch norm behind it: its gradient is rounding, which SGD may lose
        f"projector.{name}.bias"
        for name in layers
        if name.isdigit() and isinstance(layers.get(str(int(name) + 1)), torch.nn.BatchNorm1d)
    }
    assert frozen <= still <= frozen | cancelled
    metrics = trainer.callback_metrics
    logged = {"train_ssl_loss_epoch", "train_z_std_epoch", "train_acc1_epoch", "val_acc1", "val_knn_acc1"}
    eigen = {f"eigval_metrics/{s}" for s in ("eigval_min", "eigval_max", "eigval_mean", "eigval_std", "part_ratio")}
    assert logged <= set(metrics)
    assert all(np.isfinite(float(value)) for value in metrics.values())
    if model.log_eigvals:
        assert eigen <= set(metrics)
        assert 1 <= metrics["eigval_metrics/part_ratio"] <= 16


# the registry


def test_unknown_method_lists_the_known(compose):
    with pytest.raises(UserError, match=r"unknown method 'isolos'; choose from .*isoloss.*vicreg"):
        method_class(parse_pretrain(compose("isoloss", "method=isolos")))


def test_misspelt_option_lists_the_known(compose):
    with pytest.raises(UserError, match=r"no option 'alhpa'; known options: alpha, .*dp_alpha"):
        method_class(parse_pretrain(compose("isoloss", "+method_kwargs.alhpa=1")))

    with pytest.raises(UserError, match=r"no option 'roh'; known options: .*; did you mean rho\?$"):
        method_class(parse_pretrain(compose("isoloss", "+method_kwargs.roh=1")))


def test_an_option_of_another_method_is_to_be_removed(compose):
    """This happens if only ``method`` is changed in the configuration of another method."""
    foreign = ("+method_kwargs.pred_hidden_dim=8", "+method_kwargs.temperature=1.0")
    advice = (
        r"other methods have it: remove such options \(.*~method_kwargs.pred_hidden_dim ~method_kwargs.temperature\)$"
    )
    for method in ("isoloss", "vicreg"):
        with pytest.raises(UserError, match=f"method {method} has no option .*; {advice}"):
            method_class(parse_pretrain(compose("ssl_ey", f"method={method}", *foreign)))
    with pytest.raises(UserError, match=r"; other methods have it: remove it \(~method_kwargs.temperature\)$"):
        method_class(parse_pretrain(compose("isoloss", foreign[1])))


def test_names_of_the_forks_are_understood(compose):
    cfg = compose(
        *(
            "directpred",
            "~method_kwargs.rho",
            "~method_kwargs.eps",
            "+method_kwargs.iso=true",
            "+method_kwargs.dp_tau=0.5",
        ),
        *("+method_kwargs.dp_alpha=1", "+method_kwargs.eps_iso=0.25", "+method_kwargs.use_l2=true"),
    )
    options = _build(cfg).options
    wanted = {"iso": True, "rho": 0.5, "alpha": 1.0, "eps": 0.25, "metric": "euclidean"}
    assert {key: options[key] for key in wanted} == wanted
    assert method_class(parse_pretrain(compose("ssl_ey", "method=ssley"))) is plugin_methods()["ssl_ey"]


def test_solo_learn_keeps_its_names_unless_an_option_is_ours(compose):
    plain = parse_pretrain(compose("byol", "~method_kwargs.log_eigvals", "~method_kwargs.pred_lr_scale"))
    assert method_class(plain) is native_methods()["byol"]
    assert method_class(parse_pretrain(compose("byol"))) is plugin_methods()["byol"]


def test_register_is_repeatable_and_refuses_a_taken_name():
    from solo.methods import METHODS as host

    register()
    register()
    assert host["isoloss"] is plugin_methods()["isoloss"]
    assert host["byol"].__module__ == "solo.methods.byol"
    with pytest.raises(ValueError, match=r"'byol' is registered twice: solo\.methods\.byol\.BYOL and "):
        register({"byol": plugin_methods()["byol"]})


def test_predictor_learning_rate_is_scaled_and_simsiams_is_constant(compose):
    for name, static in (("byol", False), ("simsiam", True)):
        model = _build(compose(name, "++method_kwargs.pred_lr_scale=10.0"))
        (group,) = (group for group in model.learnable_params if group["name"] == "predictor")
        assert group["lr"] == pytest.approx(10 * model.lr) and group.get("static_lr", False) is static


def test_a_method_changes_the_backbone_and_evaluations_recognise_it(compose, tmp_path):
    """DeepCluster with the Sobel filter: its networks, those that the kNN and linear evaluation build, and resuming."""
    model = _build(compose("deepcluster", "++method_kwargs.sobel=True")).eval()
    assert isinstance(model.backbone.conv1, SobelConv2d)
    names = {id(parameter) for group in model.learnable_params for parameter in group["params"]}
    assert id(model.backbone.conv1.weight) in names
    path = tmp_path / "sobel.ckpt"
    torch.save({"state_dict": model.state_dict()}, path)
    plain, images = tiny_backbone(), torch.randn(2, 3, 16, 16)
    load_backbone(path, plain)
    assert torch.equal(plain.eval()(images), model(images)["feats"])
    other = _build(compose("deepcluster", "++method_kwargs.sobel=True"))
    other.load_state_dict(model.state_dict())


def test_a_pass_over_the_training_set_has_the_precision_of_the_run(compose):
    """In half precision the images of the pass are converted, as Lightning converts those of the training."""
    cfg = parse_pretrain(compose("sela", "knn_eval.enabled=False"))
    model = method_class(cfg)(cfg)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, precision="bf16-true", **quiet)
    trainer.fit(model, datamodule=pretrain_images(cfg))
    assert model.backbone.conv1.weight.dtype == torch.bfloat16
    assert model.objective.criterion.table.epoch == 0
