"""Half precision, synchronised batch norm, compiled losses and channels_last, on a GPU where there is one.

Each test runs on the CPU as far as it can, by the same function: float16 and batch norm over several processes are not
for CPUs. DALI on a GPU is in test_dali.py, the predictors in tests/predictors.
"""

import csv
import math

import pytest
import torch
from torch import nn

from plugins.distributed import LOCAL, WORLD
from plugins.methods import METHODS
from plugins.spec import Embeddings
from plugins.testing import OF_VIEWS, RankPool, toy_views
from solo_ext.checkpoint import find_checkpoint
from solo_ext.config import parse_pretrain
from solo_ext.launch import seed_everything
from solo_ext.main_pretrain import pretrain
from solo_ext.registry import method_class

pytestmark = pytest.mark.solo
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
PRECISIONS = [
    pytest.param("cpu", "bf16-mixed", id="cpu-bf16"),
    pytest.param("cuda", "bf16-mixed", id="cuda-bf16", marks=pytest.mark.gpu),
    pytest.param("cuda", "16-mixed", id="cuda-16", marks=pytest.mark.gpu),
]

PIXELS = 32
"""torch 2.15 takes uninitialised memory for a weight's gradient, in bfloat16 on a CPU, where a convolution of stride 2
sees one pixel, as ResNet-18's last stage does in images of 16."""


def _require(device: str, count: int = 1) -> None:
    found = torch.cuda.device_count()
    if device == "cuda" and found < count:
        pytest.skip(f"NOT TESTED on a GPU: this needs {count}, there are {found}")


def _on(device: str) -> str:
    return f"accelerator={'gpu' if device == 'cuda' else 'cpu'}"


def _untrained(cfg) -> nn.Module:
    """Return the untrained method of this configuration."""
    cfg = parse_pretrain(cfg)
    seed_everything(cfg.seed)
    return method_class(cfg)(cfg)


def _quiet(model: nn.Module) -> nn.Module:
    """A method that can step without a trainer."""
    model.log_dict = model.log = lambda *args, **kwargs: None
    return model.train()


@pytest.mark.slow
@pytest.mark.parametrize(("device", "precision"), PRECISIONS)
@pytest.mark.parametrize("name", sorted(METHODS))
def test_mixed_precision_trains(name, device, precision, compose, tiny):
    """All that is logged is finite, all parameters move, and what is not learned stays in float32.

    On the CPU one method trains a ResNet, the others one convolution.
    """
    _require(device)
    # float16's loss scale begins so high that the first steps may be left out
    epochs = 3 if precision == "16-mixed" else 1
    options = (_on(device), f"++precision={precision}", f"max_epochs={epochs}", "++checkpoint.version=v")
    options = (*options, tiny) if device == "cpu" and name != "isoloss" else options
    cfg = compose(name, *options, "scheduler.name=none", "optimizer.lr=0.01", "++log_every_n_steps=1")
    if not METHODS[name].only_stacks:  # the size of patches is that of the method's options
        cfg.augmentations[0].crop_size = PIXELS
    before = {key: value.clone() for key, value in _untrained(cfg.copy()).named_parameters()}
    folder = pretrain(cfg)
    state = torch.load(find_checkpoint(folder), weights_only=True)
    assert state["global_step"] == 3 * epochs
    assert ("MixedPrecision" in state) is (precision == "16-mixed")  # the loss scale
    weights = state["state_dict"]
    assert all(value.isfinite().all() for value in weights.values())
    still = {key.removeprefix("momentum_") for key, value in before.items() if torch.equal(weights[key].cpu(), value)}
    # the bias in front of Matrix-SSL's last batch norm
    assert still <= {"projector.6.bias"}
    # a flag is that of DISSL's alarm
    wide = {torch.float64} if name == "corinfomax" else set()  # of the running covariances
    assert {value.dtype for value in weights.values()} <= {torch.float32, torch.int32, torch.int64, torch.bool, *wide}
    moments = [value for key, value in weights.items() if key.rsplit(".", 1)[-1] in ("C", "W")]
    assert bool(moments) == METHODS[name].resolve(cfg.method_kwargs).get("log_eigvals", False)
    assert all(value.abs().sum() > 0 for value in moments)
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["train_ssl_loss_step"]) for row in rows if row["train_ssl_loss_step"]]
    assert len(losses) == 3 * epochs and all(math.isfinite(loss) for loss in losses)


@pytest.mark.slow
@pytest.mark.parametrize(("device", "precision"), PRECISIONS)
def test_mixed_precision_resumes(device, precision, compose):
    """A run that is resumed after the first epoch equals an uninterrupted one: exactly on the CPU, nearly on a GPU."""
    _require(device)

    def train(version, *more):
        options = (_on(device), f"++precision={precision}", "max_epochs=2", f"++checkpoint.version={version}")
        cfg = compose("isoloss", *options, "++checkpoint.keep_prev=true", "++checkpoint.frequency=1", *more)
        cfg.augmentations[0].crop_size = PIXELS
        folder = pretrain(cfg)
        return folder, torch.load(find_checkpoint(folder), weights_only=True, map_location="cpu")

    folder, whole = train("whole")
    first = folder / "isoloss-digits-whole-ep=0.ckpt"
    _, resumed = train("resumed", f"++resume_from_checkpoint='{first}'")
    # the order of a GPU's sums varies
    tolerance = {"rtol": 0, "atol": 0} if device == "cpu" else {"rtol": 0.05, "atol": 5e-3}
    for key, value in whole["state_dict"].items():
        torch.testing.assert_close(resumed["state_dict"][key], value, **tolerance, msg=lambda m, k=key: f"{k}: {m}")
    if precision == "16-mixed":
        scale = torch.load(first, weights_only=True)["MixedPrecision"]
        assert scale["scale"] > 0 and resumed["MixedPrecision"] == whole["MixedPrecision"]


def _gradients(comm, cfg, device, batch, counts):
    """Gradients of one step in float64, as data-parallel training takes them: their mean over the processes."""
    rank = comm.rank
    model = _quiet(_untrained(cfg)).double()
    if device == "cuda":
        device = f"cuda:{rank}"
        if comm.size > 1:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    else:
        # no batch norm over several processes on a CPU: it uses its running statistics
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
    model.to(device)
    index, views, labels = batch
    rows = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    mine = (index[rows].to(device), [view[rows].to(device) for view in views], labels[rows].to(device))
    assert WORLD.size == comm.size  # what the method communicates with
    model.training_step(mine, 0).backward()
    trained = {key: value.grad for key, value in model.named_parameters() if value.requires_grad}
    # the online classifier's loss is that of each process, as in solo-learn
    return {key: (comm.sum(grad) / comm.size).cpu() for key, grad in trained.items() if "classifier" not in key}


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("device", DEVICES)
def test_two_processes_have_the_gradients_of_one(device, compose):
    """The whole step on a divided batch, with synchronised batch norm; 3 and 5 images."""
    _require(device, count=2)
    generator = torch.Generator().manual_seed(1)
    views = [torch.randn(8, 3, 16, 16, generator=generator, dtype=torch.float64) for _ in range(2)]
    batch = (torch.arange(8), views, torch.arange(8) % 10)
    # each process imports solo-learn anew
    with RankPool(2, timeout=600, backend="nccl" if device == "cuda" else "gloo") as pool:
        for name in ("byol", "isoloss", "ssl_ey"):
            cfg = compose(name, "knn_eval.enabled=False", _on(device))
            whole = _gradients(LOCAL, cfg, device, batch, (8,))
            for divided in pool.run(_gradients, [(cfg, device, batch, (3, 5))] * 2):
                assert divided.keys() == whole.keys()
                for key, value in whole.items():
                    torch.testing.assert_close(
                        divided[key], value, rtol=1e-7, atol=1e-10, msg=lambda m, n=name, k=key: f"{n}, {k}: {m}"
                    )


@pytest.mark.slow
@pytest.mark.sample("isoloss-*")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OF_VIEWS)
def test_channels_last_changes_nothing_but_the_order_of_sums(name, device, compose):
    _require(device)
    cfg = compose(name, "knn_eval.enabled=False", _on(device))
    generator = torch.Generator().manual_seed(1)
    views = [torch.randn(8, 3, 16, 16, generator=generator, dtype=torch.float64).to(device) for _ in range(2)]
    batch = (torch.arange(8, device=device), views, torch.arange(8, device=device) % 10)
    losses, gradients = [], []
    for layout in (torch.contiguous_format, torch.channels_last):
        cfg.performance.disable_channel_last = layout == torch.contiguous_format
        model = _quiet(_untrained(cfg)).double().to(device, memory_format=layout)
        assert model.backbone.layer1[0].conv1.weight.is_contiguous(memory_format=layout)
        losses.append(model.training_step(batch, 0))
        losses[-1].backward()
        gradients.append({key: value.grad for key, value in model.named_parameters() if value.requires_grad})
    torch.testing.assert_close(*losses, rtol=1e-9, atol=1e-9)
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key].contiguous(), gradient, rtol=1e-6, atol=1e-9)


@pytest.mark.sample("isoloss-*")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["byol", "isoloss", "simsiam", "ssl_ey"])
def test_losses_compile_to_one_graph(name, device):
    """The loss of a method's SPEC, value and gradient, as eager code has them."""
    _require(device)
    spec = METHODS[name]
    options = spec.resolve({})

    def loss(z0, z1, p0, p1, target0, target1):
        return spec.loss(options, LOCAL)(Embeddings([z0, z1], [p0, p1], [target0, target1])).loss

    # inductor compiles kernels; on the CPU the tests of each loss do
    compiled = torch.compile(loss, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    tensors = [view.to(device) for view in toy_views(32, 16, views=6, dtype=torch.float32)]
    found = []
    for function in (loss, compiled):
        inputs = [tensor.clone().requires_grad_(index < 4) for index, tensor in enumerate(tensors)]
        value = function(*inputs)
        found.append([value, *torch.autograd.grad(value, inputs[:4], allow_unused=True)])
    for eager, other in zip(*found, strict=True):
        assert (eager is None) == (other is None)
        if eager is not None:
            torch.testing.assert_close(other, eager, rtol=1e-4, atol=1e-5)
