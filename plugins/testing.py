"""Helpers of the tests: a pool of ranks, the comparison with the joined batch, and toy batches.

A test with several processes uses the fixture ``ranks`` (a RankPool, started once per session) and the marker ``ddp``.
The functions that run on the ranks are at the top level of the test file; their first argument is the Collective::

    def _doubled(comm, rows):
        return comm.sum(rows) * 2

    @pytest.mark.ddp
    def test_sum(ranks):
        first, second = ranks.run(_doubled, [(torch.ones(3),), (torch.zeros(3),)])  # ranks 0 and 1; three tuples: all

:func:`assert_joined` checks the distributed convention of a loss::

    def _step(comm, model, x0, x1):
        return ssl_ey_loss(model(x0), model(x1), comm=comm)

    @pytest.mark.ddp
    def test_ranks(ranks):
        assert_joined(ranks, _step, toy_views(9, 5), counts=(4, 5))

A failure on a rank is raised in the test, with the traceback of the rank. Each rank imports the test file once, so
import frameworks inside functions.
"""

import gc
import importlib.util
import io
import multiprocessing
import os
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import cache
from multiprocessing import connection
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from plugins.distributed import LOCAL, WORLD, Collective
from plugins.methods import METHODS
from plugins.metrics import Quality
from plugins.spec import MethodSpec

POOL_SIZE = 3
_FRAMEWORKS = ("solo_ext.registry", "lightly_ext.lightning", "vissl_ext.ranks")
"""Modules that import a framework, with what keeps it from being imported mended."""


class RankError(AssertionError):
    """A function failed on a rank, or did not return in time. The message contains the traceback of the rank."""


class RankPool:
    """Processes of one process group that wait for functions to run.

    They are started on first use by a fork server that has imported torch and the frameworks that this process uses,
    and restarted after a timeout.

    Args:
        size: number of processes.
        timeout: timeout of a call in seconds.
        backend: "gloo" or "nccl". With "nccl" the current device of rank r is GPU r.
    """

    def __init__(self, size: int = POOL_SIZE, *, timeout: float = 120, backend: str = "gloo") -> None:
        self.size = size
        self.timeout = timeout
        self.backend = backend
        self._processes: list[Any] = []
        self._pipes: list[connection.Connection] = []
        self._folder: tempfile.TemporaryDirectory | None = None

    def run(self, function: Callable[..., Any], arguments: Sequence[tuple]) -> list[Any]:
        """Call ``function(comm, *arguments[r])`` on rank r, for as many ranks as there are arguments.

        Args:
            function: a function at the top level of its file.
            arguments: one tuple per rank; the objects are copied. Functions in them must be at the top level, too.

        Returns:
            The result of each rank, in rank order.

        Raises:
            RankError: the function raised on a rank, or a rank did not return in time.
        """
        if not 1 <= len(arguments) <= self.size:
            raise ValueError(f"arguments must be for 1 to {self.size} ranks, got {len(arguments)}")
        self._start()
        pipes = self._pipes[: len(arguments)]
        for pipe, of_rank in zip(pipes, arguments, strict=True):
            pipe.send_bytes(_dumps((len(arguments), function, of_rank)))
        replies: dict[int, tuple[str | None, Any]] = {}
        patience = self.timeout
        while len(replies) < len(pipes):
            waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in replies}
            ready = set(connection.wait(list(waiting), patience))
            for pipe, rank in waiting.items():
                if pipe not in ready:
                    continue
                try:
                    replies[rank] = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    replies[rank] = ("the process died", None)
                if replies[rank][0] is not None:
                    patience = 5  # the other ranks may be blocked in a collective with this one
            if not ready:
                break
        failures = [f"rank {rank}: {error}" for rank, (error, _) in sorted(replies.items()) if error is not None]
        missing = [rank for rank in range(len(pipes)) if rank not in replies]
        if missing or any(error == "the process died" for error, _ in replies.values()):
            failures.append(f"ranks {missing} did not return")
            self.close(kill=True)
        if failures:
            raise RankError("\n".join(failures))
        return [replies[rank][1] for rank in range(len(pipes))]

    def close(self, *, kill: bool = False) -> None:
        """End the processes. The next ``run`` starts new ones."""
        for pipe in self._pipes:
            if not kill:
                pipe.send_bytes(b"")
            pipe.close()
        for process in self._processes:
            if kill:
                process.kill()
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
        self._processes, self._pipes = [], []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def __enter__(self) -> "RankPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        if self._processes:
            return
        methods = multiprocessing.get_all_start_methods()
        context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        # imported once instead of once per rank; another framework than the tests of this process use would cost time
        frameworks = [name for name in _FRAMEWORKS if name in sys.modules]
        context.set_forkserver_preload(["torch", "pytest", "hypothesis", *frameworks])
        self._folder = tempfile.TemporaryDirectory(prefix="ranks")
        rendezvous = (Path(self._folder.name) / "rendezvous").as_uri()
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, rank, self.size, rendezvous, self.timeout, self.backend), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)


def _serve(pipe: connection.Connection, rank: int, size: int, rendezvous: str, timeout: float, backend: str) -> None:
    """Main function of a rank: join the group, then run functions until the pool closes."""
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # otherwise gloo resolves the host name, which can be slow
    torch.set_num_threads(1)
    gc.freeze()  # a collection would copy the pages of the fork server
    limit = timedelta(seconds=timeout)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=rendezvous, rank=rank, world_size=size, timeout=limit)
    groups = {n: dist.new_group(list(range(n)), timeout=limit) for n in range(2, size)}
    comms = {1: LOCAL, **{n: Collective(group) for n, group in groups.items()}, size: WORLD}
    while True:
        try:
            message = pipe.recv_bytes()
        except EOFError:
            return  # the session has ended, and with it the other ranks: the group cannot be destroyed
        if not message:
            break
        try:
            count, function, arguments = pickle.loads(message)
            reply = pickle.dumps((None, function(comms[count], *arguments)))
        except BaseException:
            reply = pickle.dumps((traceback.format_exc(), None))
        pipe.send_bytes(reply)
    dist.destroy_process_group()


class _Pickler(pickle.Pickler):
    """Pickle functions and classes of test files by path, because test files cannot be imported by name."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, FunctionType | type):
            path = _path_if_not_importable(obj.__module__)
            if path is not None:
                return _load, (obj.__module__, path, obj.__qualname__)
        return NotImplemented


def _dumps(message: Any) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(message)
    return buffer.getvalue()


@cache
def _path_if_not_importable(module: str) -> str | None:
    path = getattr(sys.modules.get(module), "__file__", None)
    if path is None:
        return None
    roots = {str(Path(entry or ".").resolve()) for entry in sys.path}
    package = Path(path).resolve().parent
    while (package / "__init__.py").exists():
        package = package.parent
    return None if str(package) in roots and _is_found(module, path) else path


def _is_found(module: str, path: str) -> bool:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return False
    return spec is not None and spec.origin is not None and Path(spec.origin).resolve() == Path(path).resolve()


def _load(module: str, path: str, qualname: str) -> Any:
    loaded = sys.modules.get(module)
    if loaded is None or getattr(loaded, "__file__", None) != path:
        spec = importlib.util.spec_from_file_location(module, path)
        assert spec is not None and spec.loader is not None
        loaded = sys.modules[module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
    for name in qualname.split("."):
        loaded = getattr(loaded, name)
    return loaded


def assert_joined(
    ranks: RankPool,
    step: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    counts: Sequence[int],
    *,
    build: Callable[..., nn.Module] | None = None,
    rtol: float = 1e-10,
    atol: float = 1e-12,
) -> None:
    """Assert that the loss of each rank and the mean of the gradients equal those of the joined batch.

    Args:
        ranks: the pool of processes.
        step: ``(comm, model, *inputs) → loss``, at the top level of its file.
        inputs: the joined batch; the first axis of each tensor are the rows.
        counts: number of rows of each rank; they may differ.
        build: ``() → model``, the same at each call, at the top level of its file; None builds a small float64 MLP for
            the width of the first input.
        rtol: relative tolerance.
        atol: absolute tolerance.
    """
    assert sum(counts) == len(inputs[0]), "counts must add up to the rows of the inputs"
    loss, gradients = _one_step(LOCAL, step, build, *inputs)
    parts = zip(*(tensor.split(list(counts)) for tensor in inputs), strict=True)
    results = ranks.run(_one_step, [(step, build, *part) for part in parts])
    for rank, (rank_loss, _) in enumerate(results):
        torch.testing.assert_close(rank_loss, loss, rtol=rtol, atol=atol, msg=lambda m, r=rank: f"loss, rank {r}: {m}")
    for name, gradient in gradients.items():
        mean = torch.stack([of_rank[name] for _, of_rank in results]).mean(0)
        torch.testing.assert_close(mean, gradient, rtol=rtol, atol=atol, msg=lambda m, n=name: f"gradient of {n}: {m}")


def assert_same_loss(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
    """Assert that two float32 losses have the same value and the same gradients.

    Args:
        ours: a loss of the inputs.
        theirs: another implementation.
        inputs: tensors that require gradients.
    """
    one, other = ours(*inputs), theirs(*inputs)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    for mine, wanted in zip(torch.autograd.grad(one, inputs), torch.autograd.grad(other, inputs), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-3, atol=1e-5)


def _one_step(
    comm: Collective, step: Callable[..., Tensor], build: Callable[..., nn.Module] | None, *inputs: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    model = toy_mlp(inputs[0].shape[-1]) if build is None else build()
    loss = step(comm, model, *inputs)
    loss.backward()
    zeros = torch.zeros_like
    return loss.detach(), {n: zeros(p) if p.grad is None else p.grad for n, p in model.named_parameters()}


def record_quality(folder: Path) -> None:
    """Let this process and its forks write the views of each update of :class:`plugins.metrics.Quality` to a folder."""
    usual, epochs = Quality.update, []

    def update(self: Quality, views: Sequence[Tensor]) -> None:
        usual(self, views)
        if self not in epochs:
            epochs.append(self)
        name = f"{epochs.index(self)}_{os.getpid()}_{self.moments.count}.pt"
        torch.save([view.detach().clone() for view in views], folder / name)

    Quality.update = update


def recorded_quality(folder: Path) -> list[dict[str, float]]:
    """Compute the quality of the features of each epoch, from the rows that all processes have written to a folder."""
    epochs: dict[int, Quality] = {}
    for file in folder.glob("*.pt"):
        epochs.setdefault(int(file.name.split("_")[0]), Quality()).update(torch.load(file))
    return [
        {f"quality/features/{name}": value.item() for name, value in epochs[number].values()._asdict().items()}
        for number in sorted(epochs)
    ]


def toy_mlp(width: int, output: int = 4, *, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Build a small MLP without batch norm, with the same weights at each call.

    >>> toy_mlp(5)(torch.zeros(2, 5, dtype=torch.float64)).shape
    torch.Size([2, 4])
    """
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(width, 6), nn.Tanh(), nn.Linear(6, output)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=dtype) / 2)
    return model


def toy_views(
    rows: int, width: int, *, views: int = 2, seed: int = 0, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Generate correlated views of random rows. Their mean drifts, so that consecutive parts have different means.

    >>> [view.shape for view in toy_views(6, 3)]
    [torch.Size([6, 3]), torch.Size([6, 3])]
    """
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(rows, width, generator=generator, dtype=dtype)
    common += torch.linspace(-2, 3, rows, dtype=dtype).unsqueeze(1)
    return [common + 0.5 * torch.randn(rows, width, generator=generator, dtype=dtype) for _ in range(views)]


def waves(scale: float, rows: int, width: int) -> Tensor:
    """Compute a float64 matrix for golden numbers by the formula sin(s i j + 0.3 s) + 0.25 cos(1.7 i + s j).

    >>> round(waves(1.0, 1, 1).item(), 6)  # sin(1.3) + 0.25 cos(2.7)
    0.73754
    """
    i = torch.arange(1, rows + 1, dtype=torch.float64).unsqueeze(1)
    j = torch.arange(1, width + 1, dtype=torch.float64)
    return torch.sin(scale * i * j + 0.3 * scale) + 0.25 * torch.cos(1.7 * i + scale * j)


NARROW = {
    **{"num_prototypes": 6, "bottleneck_dim": 6, "queue_size": 24, "queue_epoch": 0, "num_clusters": 6},
    **{"n_clusters": 6, "n_heads": 2, "num_clusterings": 2, "context_hidden_dim": 8},
    **{"freeze_prototypes_steps": 0, "freeze_last_layer": 0},
}
"""Small values of options that some methods have, for tests that build every method; nothing waits for an epoch."""
OF_IMAGES = [name for name, spec in METHODS.items() if not spec.stacks]
"""Methods without stacks of patches, for tests with one or two views of random images and their positions."""
OF_VIEWS = [name for name in OF_IMAGES if not METHODS[name].indexed]
"""Methods that compare views and have no memory of images, for tests with two views of random images."""
OF_FEATURES = [name for name in OF_VIEWS if not METHODS[name].taps(METHODS[name].resolve({}))]
"""Those of OF_VIEWS that need no feature maps, for tests whose backbones have none."""


def view_count(spec: MethodSpec) -> int:
    """Return a number of views that a method accepts, without stacks: two, unless it needs another number."""
    return 2 if spec.views is None else spec.views


def toy_stacks(
    spec: MethodSpec,
    options: Mapping[str, Any],
    rows: int,
    *shape: int,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Generate the stacks of patches that a method compares, of random patches ``[rows, P, *shape]``.

    P is the number that the options say, or four if any number is allowed.

    >>> toy_stacks(METHODS["byol"], {}, 2, 3, 8, 8)
    []
    """
    wanted, generator = spec.patches(options), torch.Generator().manual_seed(seed)
    count = 4 if wanted is None else wanted.count
    return [torch.randn(rows, count, *shape, generator=generator, dtype=dtype) for _ in range(spec.stacks)]


DIFFICULT = ("normal", "large", "small", "constant", "zero", "duplicated", "rank_deficient")


def difficult_views(kind: str, rows: int, width: int, *, seed: int = 0) -> list[Tensor]:
    """Generate two float32 views on which every loss must be finite; ``kind`` is one of DIFFICULT.

    >>> difficult_views("constant", 2, 2)[0]
    tensor([[3., 3.],
            [3., 3.]])
    """
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(rows, width, generator=generator) for _ in range(2))
    return {
        "normal": lambda: [a, b],
        "large": lambda: [a * 100, b * 100],
        "small": lambda: [a * 1e-4, b * 1e-4],
        "constant": lambda: [torch.full_like(a, 3), torch.full_like(b, 3)],
        "zero": lambda: [torch.zeros_like(a), torch.zeros_like(b)],
        "duplicated": lambda: [a[:1].expand_as(a).clone(), b[:1].expand_as(b).clone()],
        "rank_deficient": lambda: [a[:, :1] * a[:1], b[:, :1] * b[:1]],
    }[kind]()


def devices() -> list[str]:
    """List the devices to test on: the CPU, and CUDA if available.

    >>> devices()[0]
    'cpu'
    """
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def toy_maps(
    rows: int, channels: Sequence[int], *, views: int = 2, seed: int = 0, dtype: torch.dtype = torch.float64
) -> list[tuple[Tensor, ...]]:
    """Generate random feature maps of some views; those of ``channels[i]`` channels have i + 2 pixels a side.

    >>> [map_.shape for map_ in toy_maps(6, [4, 8])[0]]
    [torch.Size([6, 4, 2, 2]), torch.Size([6, 8, 3, 3])]
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, width, number + 2, number + 2) for number, width in enumerate(channels)]
    return [tuple(torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes) for _ in range(views)]


def toy_backbone() -> nn.Sequential:
    """Build a convolution, batch norm, ReLU and pooling: ``[B, 3, H, W]`` → ``[B, 8, 1, 1]``.

    Like a ResNet it has modules ``layer3`` and ``layer4``, for methods that compare feature maps.

    >>> toy_backbone()(torch.zeros(2, 3, 16, 16)).shape
    torch.Size([2, 8, 1, 1])
    """
    network = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8))
    network.add_module("layer3", nn.ReLU())
    network.add_module("layer4", nn.Identity())
    network.add_module("avgpool", nn.AdaptiveAvgPool2d(1))
    return network


class _Features(nn.Sequential):
    num_features = 32


def tiny_backbone(*names: Any, **options: Any) -> nn.Module:
    """Build a convolution, batch norm and pooling: ``[B, 3, H, W]`` → ``[B, 32]``; all arguments are ignored.

    Like a ResNet it has modules ``layer3`` and ``layer4``, for methods that compare feature maps.

    >>> tiny_backbone()(torch.zeros(2, 3, 16, 16)).shape
    torch.Size([2, 32])
    """
    network = _Features()
    network.add_module("conv1", nn.Conv2d(3, 8, 3, stride=2, bias=False))
    network.add_module("bn1", nn.BatchNorm2d(8))
    network.add_module("relu", nn.ReLU())
    for name in ("layer3", "layer4"):
        network.add_module(name, nn.Identity())
    network.add_module("avgpool", nn.AdaptiveAvgPool2d(2))
    network.add_module("flatten", nn.Flatten())
    return network


def spoil(path: Path) -> Path:
    """Replace an image file by a truncated JPEG file with the same position in its folder.

    Args:
        path: a PNG file.

    Returns:
        The path of the new file.
    """
    from PIL import Image

    broken = path.with_suffix(".jpg")
    with Image.open(path) as image:
        image.convert("RGB").save(broken, "JPEG")
    path.unlink()
    broken.write_bytes(broken.read_bytes()[:-200])
    return broken


def composed(arguments: Sequence[str], module: str = "main_pretrain") -> Any:
    """Compose the configuration that a command of a suite trains with in solo-learn.

    Args:
        arguments: of ``python``: ``-m solo_ext.MODULE --config-path FOLDER --config-name NAME OVERRIDE ...``.
        module: the name that MODULE must have.

    Returns:
        Hydra's configuration, with interpolations resolved.
    """
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    flag, command, path, folder, name, config, *overrides = arguments
    assert (flag, command, path, name) == ("-m", f"solo_ext.{module}", "--config-path", "--config-name")
    with initialize_config_dir(os.path.abspath(folder), version_base="1.2"):
        cfg = compose(config, overrides)
    OmegaConf.resolve(cfg)
    return cfg


def read_yaml_fast() -> None:
    """Let Hydra read YAML with libyaml, which takes a tenth of the time, and parse each text once."""
    import yaml
    from omegaconf import OmegaConf

    yaml.SafeLoader = yaml.CSafeLoader
    OmegaConf.load = parsed_once(OmegaConf.load)  # pyright: ignore[reportAttributeAccessIssue]


def parsed_once(load: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a function like ``OmegaConf.load`` that parses each text once, and returns a new copy at each call.

    Args:
        load: takes the path of a file or an open file.
    """
    pickles: dict[str | bytes, bytes] = {}

    def copied(file: Any) -> Any:
        is_path = isinstance(file, str | Path)
        text = Path(file).read_bytes() if is_path else file.read()
        if text not in pickles:
            if not is_path:
                file.seek(0)
            pickles[text] = pickle.dumps(load(file))
        return pickle.loads(pickles[text])  # takes a tenth of the time of a parsed file

    return copied
