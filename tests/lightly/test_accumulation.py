"""Accumulated gradients: a step of the optimizer counts once, in a plain loop and under Lightning."""

import pytest
import torch
from torch import Tensor, nn

from lightly_ext import lightning, models
from lightly_ext.names import CLASS_NAMES
from plugins.distributed import LOCAL
from plugins.heads import Heads, TwoBranchHead
from plugins.methods import METHODS
from plugins.testing import NARROW, OF_FEATURES, assert_joined, toy_mlp, toy_views
from plugins.tools.command import UserError

pytestmark = pytest.mark.lightly

NAMES = {spec.name: name for name, spec in CLASS_NAMES.items()}
EXACT = {"rtol": 1e-12, "atol": 1e-12}
WARMUPS = {"dissl": {"warmup_beta_iter": 5}, "mec": {"warmup_iter": 5}}
COUNTING = ["dissl", "mec", "isoloss", "directcopy", "ssl_ey"]


def has_two_branches(method: str) -> bool:
    spec = METHODS[method]
    with torch.device("meta"):
        return isinstance(spec.head(6, spec.resolve({})), TwoBranchHead)


def parts(method: str) -> dict:
    """A model of vectors instead of images, without batch norm."""
    given: dict = {"projection_head": toy_mlp(6, 4), "input_dim": 6, **WARMUPS.get(method, {})}
    if has_two_branches(method):
        given["projection_head"] = TwoBranchHead(Heads(teacher=toy_mlp(6, 4), student=toy_mlp(6, 4)), 6)
    if "pred_hidden_dim" in METHODS[method].options:
        given["prediction_head"] = toy_mlp(4, 4)
    if method == "ssl_ey":
        given["log_eigvals"] = True
    memory = {"queue_size", "queue_epoch", "freeze_last_layer", "freeze_prototypes_steps"} & set(
        METHODS[method].options
    )
    given |= {key: NARROW[key] for key in memory}
    torch.manual_seed(0)
    return given


def built(method: str, **options: object) -> models.MethodModel:
    torch.manual_seed(0)
    model = vars(models)[NAMES[method]](toy_mlp(5, 6), **parts(method), **options).double()
    model.start_epoch(0)
    return model


def split(views: list[Tensor], count: int) -> list[list[Tensor]]:
    return [list(part) for part in zip(*(view.chunk(count) for view in views), strict=True)]


def same_state(one: nn.Module, other: nn.Module) -> None:
    state = other.state_dict()
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, state[name], **EXACT, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("method", COUNTING)
def test_a_plain_loop_counts_steps(method: str) -> None:
    """Without a teacher the loop calls ``before_step`` to mark the start of a step."""
    whole, accumulated = built(method), built(method)
    for seed in range(3):
        views = toy_views(8, 5, seed=seed)
        whole.loss(views)
        whole.update_momentum(0.9)
        if not METHODS[method].teacher:
            accumulated.before_step()
        for part in split(views, 4):
            accumulated.loss(part)
        accumulated.update_momentum(0.9)
    same_state(accumulated, whole)


def test_a_plain_loop_without_a_teacher_need_not_say_anything() -> None:
    model = built("mec", teacher=False)
    for _ in range(3):
        model.loss(toy_views(8, 5))
    assert int(model.objective.clock.steps) == 3


def trained(method: str, batches: list, of_module: dict | None = None, **options: object) -> nn.Module:
    """Return the model after an epoch of Lightning; with the default options no weight changes."""
    import pytorch_lightning  # not on the ranks

    torch.manual_seed(0)
    of_module = {"lr": 0.0, "optimizer": "sgd", "warmup_epochs": 0, **parts(method), **(of_module or {})}
    module = perturbed(lightning.__getattr__(NAMES[method])(8, 4, toy_mlp(5, 6), **of_module).double())
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    host = pytorch_lightning.Trainer(**{"devices": 1, **options}, max_epochs=1, accelerator="cpu", **quiet)
    host.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    return module


@pytest.mark.parametrize("method", COUNTING)
def test_lightning_counts_steps(method: str) -> None:
    """The last of three steps has two micro-batches only."""
    steps = [toy_views(rows, 5, seed=rows) for rows in (16, 12, 8)]
    labels = torch.zeros(16, dtype=torch.int64)
    whole = trained(method, [(views, labels[: len(views[0])]) for views in steps])
    micro = [part for views in steps for part in split(views, len(views[0]) // 4)]
    micro = [*split(steps[0], 4), *split(steps[1], 4), *split(steps[2], 2)]
    accumulated = trained(method, [(views, labels[: len(views[0])]) for views in micro], accumulate_grad_batches=4)
    same_state(accumulated.objective, whole.objective)
    if method in ("isoloss", "directcopy"):
        same_state(accumulated.prediction_head, whole.prediction_head)
    assert int(accumulated.objective.clock.steps) == 3
    clock = accumulated.objective.clock
    assert (clock.total, clock.steps_per_epoch) == (3, 3)


# ---------------------------------------------------------------------------------------------------- the joined loss


def perturbed(model: nn.Module) -> nn.Module:
    """Change the weights of the teacher, so that it differs from the student."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("teacher_"):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", OF_FEATURES)
def test_the_joined_loss_is_that_of_one_batch(method: str) -> None:
    whole, joined = perturbed(built(method)), perturbed(built(method))
    for seed in range(2):
        views = toy_views(9, 5, seed=seed)
        loss = whole.loss(views)
        loss.backward()
        other = joined.joined_loss([*split([view[:6] for view in views], 3), [view[6:] for view in views]])
        other.backward()
        torch.testing.assert_close(other, loss, rtol=1e-10, atol=1e-12)
        whole.update_momentum(0.9)
        joined.update_momentum(0.9)
    torch.testing.assert_close(gradients(joined), gradients(whole), rtol=1e-10, atol=1e-12)
    same_state(joined, whole)


def normed(method: str, dropout: float = 0.0) -> models.MethodModel:
    """Return a model with batch norm in backbone, heads and teacher."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(dropout))
    small = {**NARROW, "proj_hidden_dim": 12, "proj_output_dim": 4, "pred_hidden_dim": 10, "n_classes": 8}
    small = {key: value for key, value in small.items() if key in METHODS[method].options}
    model = perturbed(vars(models)[NAMES[method]](backbone, input_dim=6, **small).double())
    model.start_epoch(0)
    return model


@pytest.mark.parametrize("method", OF_FEATURES)
def test_with_batch_norm_it_is_that_of_the_same_embeddings(method: str) -> None:
    views = toy_views(12, 5)
    whole, joined = normed(method), normed(method)
    micro = split(views, 3)
    encoded = [whole._encode(part)[1] for part in micro]
    targets = [whole._targets(part) for part in micro]
    z = [torch.cat(list(rows)) for rows in zip(*(e.z for e in encoded), strict=True)]
    p = z if whole.prediction_head is None else whole._predict(z)
    target = [torch.cat(list(rows)) for rows in zip(*(e.target if t is None else t for e, t in zip(encoded, targets, strict=True)), strict=True)]  # fmt: skip # noqa: E501
    from plugins.spec import Embeddings

    loss = whole.terms(Embeddings(z, p, target)).loss
    loss.backward()
    other = joined.joined_loss(micro)
    other.backward()
    torch.testing.assert_close(other, loss, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradients(joined), gradients(whole), rtol=1e-9, atol=1e-12)
    for model in (whole, joined):  # what moves at the end of a step, such as DINO's centre
        model.objective.after_step()
    state = whole.state_dict()
    for name, value in joined.state_dict().items():
        if not name.startswith("objective.etf"):
            torch.testing.assert_close(value, state[name], rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_dropout_is_the_same_in_both_passes() -> None:
    """The joined loss of one micro-batch is its loss, and the random numbers after it are the same."""
    views, losses = toy_views(8, 5), []
    for joined in (False, True):
        model = normed("simsiam", dropout=0.5)
        torch.manual_seed(1)
        loss = model.joined_loss([views]) if joined else model.loss(views)
        drawn = torch.rand(1)
        loss.backward()
        losses.append((loss.detach(), drawn, gradients(model)))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-10, atol=1e-12)


def test_a_scaled_joined_loss_has_scaled_gradients() -> None:
    whole, joined = built("byol"), built("byol")
    views = toy_views(8, 5)
    whole.loss(views).backward()
    (1024 * joined.joined_loss(split(views, 2), scale=1024.0)).backward()
    for name, gradient in gradients(whole).items():
        torch.testing.assert_close(gradients(joined)[name] / 1024, gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", ["byol", "dissl"])
def test_in_half_precision_every_parameter_has_its_gradient(method: str) -> None:
    """Autocast keeps half-precision copies of the weights: those of the first pass must not serve the second."""
    whole, joined = built(method).float(), built(method).float()
    views = [view.float() for view in toy_views(8, 5)]
    with torch.autocast("cpu", torch.bfloat16):
        loss, other = whole.loss(views), joined.joined_loss(split(views, 2))
    loss.backward()
    other.backward()
    assert set(gradients(joined)) == set(gradients(whole))
    for name, gradient in gradients(whole).items():
        torch.testing.assert_close(gradients(joined)[name], gradient, rtol=0.1, atol=0.02 * float(gradient.abs().max()))


def test_without_gradient_it_is_a_number() -> None:
    model, views = built("byol").eval(), toy_views(8, 5)
    with torch.no_grad():
        torch.testing.assert_close(model(split(views, 2)), model(views))


def test_what_cannot_be_joined_is_a_sentence() -> None:
    model = built("byol")
    with pytest.raises(ValueError, match="at least one micro-batch, got none"):
        model.joined_loss([])
    model = built("dissl")
    views = toy_views(8, 5, views=3)
    with pytest.raises(ValueError, match="as many views, got 2 and 3"):
        model.joined_loss([views, views[:2]])
    model = built("ssl_ey")
    nn.utils.parametrizations.spectral_norm(model.backbone[0])
    with pytest.raises(ValueError, match=r"the network changes .*_u each time"):
        model.joined_loss(split(toy_views(8, 5), 2))


def micro_batches(*counts: int) -> tuple[list, list]:
    """Batches of some micro-batches of four rows each, whole and split up."""
    steps = [toy_views(4 * count, 5, seed=seed) for seed, count in enumerate(counts)]
    labels = torch.arange(64) % 4
    whole = [(views, labels[: len(views[0])]) for views in steps]
    split = [
        ([rows[i : i + 4] for rows in views], y[i : i + 4]) for views, y in whole for i in range(0, len(views[0]), 4)
    ]
    return whole, split


@pytest.mark.parametrize("method", OF_FEATURES)
def test_lightning_trains_on_the_joined_batch(method: str) -> None:
    """Three steps, of 4, 4 and 2 micro-batches, with momentum and decay."""
    whole, split = micro_batches(4, 4, 2)
    options = {"lr": 3.0, "weight_decay": 0.1}
    one = trained(method, whole, options)
    other = trained(method, split, {**options, "accumulate": "joined"}, accumulate_grad_batches=4)
    state = one.state_dict()
    for name, value in other.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    start = trained(method, whole).state_dict()
    assert not torch.equal(state["backbone.0.weight"], start["backbone.0.weight"])


def test_lightning_scales_the_gradients_of_all_micro_batches() -> None:
    """A GradScaler of 1024; the numbers are float64 all the same."""
    from pytorch_lightning.plugins.precision import MixedPrecision

    whole, split = micro_batches(4, 4, 2)
    options = {"lr": 3.0, "accumulate": "joined"}
    one = trained("byol", whole, options).state_dict()
    scaled = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    other = trained("byol", split, options, accumulate_grad_batches=4, plugins=[scaled]).state_dict()
    torch.testing.assert_close(other, one, rtol=1e-7, atol=1e-7)


def _joined_step(comm, model, *views):
    from torch.nn.parallel import DistributedDataParallel

    micro = [[view[:1] for view in views], [view[1:] for view in views]]
    if comm.size == 1:
        return model.joined_loss(micro)
    wrapped = DistributedDataParallel(model)
    wrapped(micro).backward()  # a step before
    model.zero_grad()
    fresh = _Build(model.spec.name)()
    model.load_state_dict(fresh.state_dict())  # and another step
    return wrapped(micro)


class _Build:
    """A model of a method; picklable, to be sent to the ranks."""

    def __init__(self, method: str) -> None:
        self.method = method

    def __call__(self) -> models.MethodModel:
        return perturbed(built(self.method))


@pytest.mark.ddp
@pytest.mark.parametrize("method", OF_FEATURES)
def test_ranks_have_the_gradients_of_the_joined_batch(ranks, method: str) -> None:
    assert_joined(ranks, _joined_step, toy_views(12, 5), counts=(3, 4, 5), build=_Build(method))


def _trained_joined(comm, method, micro):
    from torch.nn.parallel import DistributedDataParallel

    model = _Build(method)()
    wrapped = DistributedDataParallel(model) if comm.size > 1 else model
    optimizer = torch.optim.SGD(model.training_parameters(), lr=0.1)
    for _ in range(2):
        wrapped(micro).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_momentum(0.9)
    return model.state_dict()


@pytest.mark.ddp
@pytest.mark.parametrize("method", ["byol", "isoloss", "dissl"])
def test_training_on_ranks_is_training_on_the_joined_batch(ranks, method: str) -> None:
    """Each rank steps with the reduced gradient of all its micro-batches."""
    views = toy_views(12, 5)
    expected = _trained_joined(LOCAL, method, [views])
    parts = [[view.split([3, 4, 5])[rank] for view in views] for rank in range(3)]
    given = [(method, [[view[:1] for view in part], [view[1:] for view in part]]) for part in parts]
    for state in ranks.run(_trained_joined, given):
        for name, value in state.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


# ------------------------------------------------------------------------------------------------------ schedules


def schedule(batches: object, warmup_epochs: float | None = 2, **options: object) -> tuple[int, int, int]:
    """Steps of the warm-up and of the schedule, and those that were made."""
    import pytorch_lightning

    module = lightning.BYOL(4, 4, toy_mlp(5, 6), optimizer="sgd", warmup_epochs=warmup_epochs, **parts("byol")).double()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    host = pytorch_lightning.Trainer(accelerator="cpu", devices=1, **quiet, **options)
    host.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    found = host.lr_scheduler_configs[0].scheduler
    return found.warmup_epochs, found.max_epochs, host.global_step


class _Stream(torch.utils.data.IterableDataset):
    """A data set without a length."""

    def __iter__(self):
        return iter(micro_batches(5)[1])


@pytest.mark.slow
def test_schedules_follow_the_trainers_limits() -> None:
    batches = micro_batches(5)[1]
    assert schedule(batches, max_steps=12) == (10, 12, 12)  # max_epochs is -1: the warm-up was negative
    assert schedule(batches, max_steps=6) == (6, 6, 6)
    assert schedule(batches, max_epochs=3, max_steps=12) == (10, 12, 12)
    assert schedule(batches, max_epochs=3) == (10, 15, 15)
    assert schedule(batches, max_steps=7, accumulate_grad_batches=2) == (6, 7, 7)
    assert schedule(batches, max_epochs=3, accumulate_grad_batches=2) == (6, 9, 9)
    assert schedule(batches, max_steps=9, limit_train_batches=3) == (6, 9, 9)
    assert schedule(batches, max_steps=9, limit_train_batches=3, accumulate_grad_batches=2) == (4, 9, 9)
    assert schedule(_Stream(), 0, max_steps=7) == (0, 7, 7)


@pytest.mark.slow
def test_the_default_warmup_is_ten_epochs_and_at_most_a_tenth_of_the_run() -> None:
    batches = micro_batches(5)[1]
    assert schedule(batches, None, max_steps=40) == (4, 40, 40)
    assert schedule(batches, None, max_epochs=110, limit_train_batches=1) == (10, 110, 110)
    assert schedule(batches, None, max_steps=5) == (0, 5, 5)
    assert schedule(_Stream(), None, max_steps=40) == (4, 40, 40)


def test_a_run_without_an_end_is_a_sentence() -> None:
    with pytest.raises(UserError, match=r"which max_epochs and max_time do not give here; set max_steps"):
        schedule(micro_batches(5)[1], max_time={"minutes": 1})
    with pytest.raises(UserError, match=r"do not give here; set max_steps"):
        schedule(_Stream(), max_epochs=2)
    with pytest.raises(UserError, match="warmup_epochs=2 needs data of a known length; set warmup_epochs=0"):
        schedule(_Stream(), max_steps=7)


def _lightning_rank(comm, method, batches):
    import os

    os.environ.update({"LOCAL_RANK": str(comm.rank), "NODE_RANK": "0", "WORLD_SIZE": str(comm.size)})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"})  # the group is there already
    try:
        options = {"lr": 1.0, "accumulate": "joined"}
        several = {"strategy": "ddp", "devices": comm.size, "use_distributed_sampler": False}
        module = trained(method, batches, options, accumulate_grad_batches=2, **several)
    finally:
        for name in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
    return module.state_dict()


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("method", ["byol", "isoloss", "dissl"])
def test_lightning_on_ranks_trains_on_the_joined_batch(ranks, method: str) -> None:
    """Three steps, the last of one micro-batch; the learning rate follows the number of devices."""
    whole = [(toy_views(12, 5, seed=seed), torch.arange(12) % 4) for seed in range(3)]
    one = trained(method, whole, {"lr": 3.0}).state_dict()
    given: list[list] = [[], [], []]
    for step, (views, labels) in enumerate(whole):
        for rank, mine in enumerate(given):
            rows = slice(4 * rank, 4 * rank + 4)
            part, y = [view[rows] for view in views], labels[rows]
            cuts = [slice(0, 4)] if step == 2 else [slice(0, 2), slice(2, 4)]
            mine += [([view[cut] for view in part], y[cut]) for cut in cuts]
    for state in ranks.run(_lightning_rank, [(method, mine) for mine in given]):
        for name, value in state.items():
            torch.testing.assert_close(value, one[name], rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
