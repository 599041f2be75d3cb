"""Two processes under VISSL's DistributedDataParallel take the step that one takes on the joined batch.

SyncBatchNorm exists on GPUs only; where there are two of them, they are tested with it. On a CPU BatchNorm's own
statistics would differ between the halves and the whole; its layers use their running statistics here, so that
everything else must be exact.
"""

import csv
import json
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from multiprocessing import forkserver
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vissl.config import AttrDict

from plugins.distributed import Collective
from plugins.methods import METHODS
from plugins.testing import NARROW, RankPool, recorded_quality, spoil, toy_stacks, view_count
from plugins.tools.bad_images import LIST
from plugins.tools.process import LOCK
from vissl_ext import ranks  # the pool's processes inherit it, if it is imported here

pytestmark = [pytest.mark.vissl, pytest.mark.ddp]

SMALL = {
    **NARROW,
    **{"proj_hidden_dim": 12, "proj_output_dim": 8, "pred_hidden_dim": 10, "n_classes": 16, "log_eigvals": True},
}


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
GPU = [
    *("config.MACHINE.DEVICE=gpu", "config.MODEL.SYNC_BN_CONFIG.CONVERT_BN_TO_SYNC_BN=true"),
    *("config.MODEL.SYNC_BN_CONFIG.SYNC_BN_TYPE=pytorch", "config.MODEL.SYNC_BN_CONFIG.GROUP_SIZE=0"),
]


def first_step(
    config: AttrDict, views: list[Tensor], index: Tensor, rank: int | None = None, gpu: bool = False
) -> dict[str, Any]:
    """Loss, gradients and buffers of the head after one step as VISSL takes it; without a rank in this process.

    ``index`` has the positions of the images among ten.
    """
    from classy_vision.generic.distributed_util import (
        init_distributed_data_parallel_model,
        set_cpu_device,
        set_cuda_device_index,
    )

    from vissl_ext.hooks import EMATeacherHook
    from vissl_ext.life_cycle import LifeCycleHook
    from vissl_ext.task import PluginTask

    if gpu:
        set_cuda_device_index(rank or 0)
    task = PluginTask.from_config(deepcopy(config))
    torch.manual_seed(0)
    task.base_model = task._build_model().double().train()
    task.base_loss = task._build_loss()
    layers = [
        module
        for module in (*task.base_model.modules(), *task.base_loss.modules())
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    assert layers and all(isinstance(layer, nn.SyncBatchNorm) is gpu for layer in layers)
    if gpu:
        views = [view.to(task.device) for view in views]
        task.base_model.to(task.device)
        task.base_loss.to(task.device)
    else:
        for layer in layers:
            layer.eval()
    model = task.base_model
    if rank is not None:
        if not gpu:
            set_cpu_device()
        model = init_distributed_data_parallel_model(model, broadcast_buffers=True, find_unused_parameters=True)
    (output,) = model(views)
    sample = {"input": views, "data_idx": [index.repeat(len(views))]}
    step = SimpleNamespace(base_loss=task.base_loss, last_batch=SimpleNamespace(sample=sample))
    task.base_loss.allocate(10)
    for hook in (LifeCycleHook(), EMATeacherHook()):
        hook.on_forward(step)
    loss = task.base_loss(output, torch.zeros(1))
    loss.backward()
    trained = task.base_model.named_parameters()
    found = {
        "loss": loss.detach(),
        **{f"gradient of {name}": value.grad for name, value in trained if value.requires_grad},
        **{name: buffer for name, buffer in task.base_model.heads.named_buffers() if name.endswith((".C", ".W"))},
    }
    return {name: value.cpu() for name, value in found.items()}


def step_of_rank(
    comm: Collective, config: AttrDict, views: list[Tensor], counts: list[int], gpu: bool
) -> dict[str, Any]:
    """The step of one rank on its rows."""
    ours = [part.split(counts)[comm.rank] for part in (*views, torch.arange(10))]
    return first_step(config, ours[:-1], ours[-1], comm.rank, gpu)


@pytest.fixture(scope="module", params=DEVICES)
def two(request: pytest.FixtureRequest, on: Callable) -> Iterator[RankPool]:
    """A pool of two processes, because VISSL uses the default group only."""
    on(request.param, count=2)
    with RankPool(2, timeout=600, backend="nccl" if request.param == "cuda" else "gloo") as pool:
        yield pool


@pytest.mark.parametrize("method", [name for name, spec in METHODS.items() if not spec.indexed])
def test_two_processes_step_as_one(method: str, two: RankPool) -> None:
    from vissl.utils.hydra_config import compose_hydra_configuration, convert_to_attrdict

    gpu = two.backend == "nccl"
    torch.manual_seed(3)
    spec = METHODS[method]
    small = [f"++config.LOSS.{method}.{key}={value}" for key, value in SMALL.items() if key in spec.options]
    cfg = compose_hydra_configuration([f"config=pretrain/{method}/digits", *small, *(GPU if gpu else [])])
    config = convert_to_attrdict(cfg, dump_config=False)[1]  # once: the ranks would take longer for it than for a step
    views = [torch.randn(10, 3, 16, 16, dtype=torch.float64) for _ in range(view_count(spec))]
    if spec.stacks:
        from vissl_ext.methods import method_options

        views += toy_stacks(spec, method_options(method, config.LOSS[method])[0], 10, 3, 8, 8, dtype=torch.float64)
    views[0][:6] += 0.5  # the halves differ in their means
    expected = first_step(config, views, torch.arange(10), gpu=gpu)
    for result in two.run(step_of_rank, [(config, views, [6, 4], gpu)] * 2):
        assert result.keys() == expected.keys()
        for name, value in result.items():
            # W is a root of eigenvalues that may be zero but for rounding
            atol = 1e-5 if name.endswith(".W") else 1e-10
            rtol = 1e-6 if gpu else 1e-8
            torch.testing.assert_close(value, expected[name], rtol=rtol, atol=atol, msg=f"{name} {value}")


def trained(comm: Collective, config: Any, folder: str) -> None:
    """Train as a rank of the launcher does, in the group that is there."""
    sys.path.append(str(Path(__file__).with_name("in_ranks")))  # the pool may be older than the fixture ``watched``
    import watched

    ranks.worker(comm.rank, config, 0, "", "train", None, folder, watched.hooks)


@pytest.mark.parametrize("method", METHODS)
def test_all_processes_hold_the_same(
    method: str, watched: ModuleType, two: RankPool, few_digits: Path, tmp_path: Path
) -> None:
    """Teacher, C and W, counters, moments: at the start of a training, which seeds each differently, and later."""
    from vissl_ext.launch import prepare

    if two.backend == "nccl":
        pytest.skip("NOT TESTED on GPUs: the seeding is the same there")
    small = [f"++config.LOSS.{method}.{key}={value}" for key, value in SMALL.items() if key in METHODS[method].options]
    _, config = prepare(
        [
            *(f"config=pretrain/{method}/digits", *small, *watched.TINY, "config.OPTIMIZER.num_epochs=1"),
            *("config.DISTRIBUTED.NUM_PROC_PER_NODE=2", "config.DATA.TRAIN.BATCHSIZE_PER_REPLICA=16"),
            *(f"config.DATA.TRAIN.DATA_PATHS=[{few_digits}/train]", f"config.CHECKPOINT.DIR={tmp_path}"),
        ],
        [],
    )
    two.run(trained, [(config, str(tmp_path))] * 2)
    differ = json.loads((tmp_path / watched.REPORT).read_text())
    names = differ.pop("names")
    assert differ.pop("clock") == [3, 3]  # steps of the run, and of an epoch
    assert METHODS[method].teacher == any(name.startswith("loss.teacher.") for name in names)
    assert differ == {when: [] for when in ("start", "step 1", "step 2", "step 3")}


def test_data_loaders_have_a_fork_server_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one of multiprocessing keeps the modules that it started with; it may have been started without ours."""
    context, codes = multiprocessing.get_context("forkserver"), []

    def start(*_: Any) -> None:
        process = context.Process(target=exec, args=("import sys\nsys.exit('zipapp' in sys.modules)",))
        process.start()
        process.join(600)
        codes.append(process.exitcode)

    monkeypatch.setattr(ranks, "_PRELOADED", ("zipapp",))
    monkeypatch.setattr(ranks, "_SERVER", forkserver.ForkServer())
    monkeypatch.setattr(ranks, "_vissl_worker", start)
    config = AttrDict({"MACHINE": {"DEVICE": "gpu"}})
    monkeypatch.setattr(ranks.catalog, "register", lambda cfg: None)
    start()
    ranks.worker(0, config)
    start()
    assert codes == [0, 1, 0]
    server = ranks._SERVER._forkserver_pid
    ranks.end_server()
    assert os.waitstatus_to_exitcode(os.waitpid(server, 0)[1]) == -signal.SIGKILL


def test_a_job_of_slurm_locks_the_folder_of_its_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each machine has a separate file."""
    import submitit
    from vissl.utils import distributed_launcher

    called = []
    for name in ("_distributed_worker", "default_hook_generator"):  # put back after the test
        monkeypatch.setattr(distributed_launcher, name, None)
    monkeypatch.setattr(distributed_launcher._ResumableSlurmJob, "__call__", lambda job: called.append(job))
    for node, name in enumerate((LOCK, f"{LOCK}-1")):
        monkeypatch.setattr(submitit, "JobEnvironment", lambda node=node: SimpleNamespace(global_rank=node))
        job = ranks.SlurmJob(engine_name="train", config=AttrDict({"CHECKPOINT": {"DIR": str(tmp_path)}}))
        job()
        assert called[node] is job and (tmp_path / name).read_text().startswith(f"process {os.getpid()} on ")
    assert distributed_launcher._distributed_worker is ranks.worker
    assert distributed_launcher.default_hook_generator is ranks.hooks


def received(comm: Collective, path: str, gpu: bool) -> dict[str, Any]:
    """Return what a rank receives of a file that rank 0 reads."""
    from classy_vision.generic.distributed_util import set_cpu_device, set_cuda_device_index
    from classy_vision.generic.util import load_and_broadcast_checkpoint

    import vissl_ext  # noqa: F401 - patches Classy Vision

    set_cuda_device_index(comm.rank) if gpu else set_cpu_device()
    return load_and_broadcast_checkpoint(path)


def test_a_checkpoint_reaches_all_processes(two: RankPool, tmp_path: Path) -> None:
    content = {"weight": torch.arange(12.0).view(3, 4), "epoch": 3, "name": "isoloss"}
    torch.save(content, tmp_path / "checkpoint.torch")
    for result in two.run(received, [(str(tmp_path / "checkpoint.torch"), two.backend == "nccl")] * 2):
        assert result.keys() == content.keys() and (result["epoch"], result["name"]) == (3, "isoloss")
        assert torch.equal(result["weight"], content["weight"])


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_two_processes_train_from_the_launcher(
    device: str, on: Callable, few_digits: Path, tmp_path: Path, launches: Callable
) -> None:
    """Processes that are started anew, as the launcher does it, train in test_loading.py; these are forked."""
    shutil.copytree(few_digits / "train", tmp_path / "images")
    bad = [str(spoil(sorted((tmp_path / "images" / name).iterdir())[0])) for name in "0369"]
    argv = [
        *("config=pretrain/isoloss/digits", *on(device, count=2), *(GPU[1:3] if device == "cuda" else [])),
        *("config.DISTRIBUTED.NUM_PROC_PER_NODE=2", "config.DATA.TRAIN.BATCHSIZE_PER_REPLICA=16"),
        *("config.LOSS.isoloss.proj_hidden_dim=32", "config.LOSS.isoloss.proj_output_dim=16"),
        *("config.OPTIMIZER.num_epochs=2", f"config.CHECKPOINT.DIR={tmp_path}"),
        *(f"config.DATA.TRAIN.DATA_PATHS=[{tmp_path / 'images'}]", "config.DATA.SKIP_BAD_IMAGES=true"),
        "config.LOSS.isoloss.log_quality=features",
    ]
    (tmp_path / "rows").mkdir()
    place = {"folder": str(few_digits.parents[1]), "rows": str(tmp_path / "rows")}
    (result,) = launches([{"argv": argv, "watch": True, **place}])
    assert result["status"] == 0 and not result["left"], result["output"][-3000:]
    assert (tmp_path / LIST).read_text().splitlines() == bad and not list(tmp_path.glob(f".{LIST}-*"))
    assert result["output"].count("4 images could not be read: ") == 1
    # one of the two prints
    shown = [line.split("  ")[1] for line in result["output"].splitlines() if line.startswith("epoch 1/2")]
    assert shown[0] == "iteration 1/3" and shown[-1].startswith("train loss ")
    assert len(shown) == len(set(shown))
    checkpoint = torch.load(tmp_path / "model_final_checkpoint_phase1.torch", weights_only=False)
    assert checkpoint["iteration"] == 2 * (96 // 32)
    heads = checkpoint["classy_state_dict"]["base_model"]["model"]["heads"]
    assert int(heads["0.predictor.steps"]) == 2 * 6  # one update a view
    if device == "cpu":  # the command is not watched on GPUs
        with (tmp_path / "metrics.csv").open() as lines:
            logged = list(csv.DictReader(lines))
        for row, wanted in zip(logged, recorded_quality(tmp_path / "rows"), strict=True):
            for name, value in wanted.items():
                assert float(row[name]) == pytest.approx(value, rel=1e-5), name


@pytest.mark.slow
def test_a_signal_ends_all_processes(few_digits: Path, tmp_path: Path, launches: Callable, watched: ModuleType) -> None:
    """The signal goes to the launcher or, as from a terminal, to all processes. The launcher reports it."""
    jobs = []
    for count, group, name, fork in (
        (1, True, "SIGINT", False),
        (2, False, "SIGINT", True),
        (2, True, "SIGINT", True),
        (1, False, "SIGTERM", False),
        (2, False, "SIGTERM", True),
        (2, True, "SIGTERM", True),
        (1, False, "SIGKILL", False),
        (2, False, "SIGKILL", False),
    ):
        folder = tmp_path / f"{count}_{group}_{name}"
        argv = [
            *("config=pretrain/byol/digits", f"config.DISTRIBUTED.NUM_PROC_PER_NODE={count}"),
            *("config.DATA.TRAIN.BATCHSIZE_PER_REPLICA=16", "config.OPTIMIZER.num_epochs=500"),
            *("config.LOSS.byol.proj_hidden_dim=32", "config.LOSS.byol.proj_output_dim=16"),
            *("config.CHECKPOINT.CHECKPOINT_FREQUENCY=1", f"config.CHECKPOINT.DIR={folder}"),
            *(["config.DATA.NUM_DATALOADER_WORKERS=1"] if count == 1 else []),
            *(watched.TINY if fork or count == 1 else []),  # it is not registered in a spawned rank
        ]
        when = {"when": str(folder / "model_phase0.torch"), "signal": name, "group": group, "watch": fork}
        jobs.append({"argv": argv, "folder": str(few_digits.parents[1]), **when})
    expected = {"SIGINT": 130, "SIGTERM": 143, "SIGKILL": -9}
    for job, result in zip(jobs, launches(jobs), strict=True):
        assert result["status"] == expected[job["signal"]], (job, result["output"][-3000:])
        if job["signal"] != "SIGKILL":
            stopped = f"stopped by {job['signal']} before the end; "
            lines = [line for line in result["output"].splitlines() if line.startswith("stopped by ")]
            assert lines == [f"{stopped}run the same command again to resume from the last checkpoint"], job
        assert "Traceback" not in result["output"], (job, result["output"])
        assert "resource_tracker" not in result["output"], job
        assert not result["left"], job


@pytest.mark.slow
def test_a_killed_process_is_reported(
    few_digits: Path, tmp_path: Path, launches: Callable, watched: ModuleType
) -> None:
    """The system kills a process like this if memory is short."""
    argv = [
        *("config=pretrain/byol/digits", *watched.TINY, "config.DISTRIBUTED.NUM_PROC_PER_NODE=2"),
        *("config.DATA.TRAIN.BATCHSIZE_PER_REPLICA=16", "config.OPTIMIZER.num_epochs=500"),
        *("config.LOSS.byol.proj_hidden_dim=32", f"config.CHECKPOINT.DIR={tmp_path}"),
    ]
    (result,) = launches([{"argv": argv, "folder": str(few_digits.parents[1]), "watch": True, "kill_rank": 1}])
    assert result["status"] == 128 + 9 and not result["left"], result["output"][-3000:]
    message = (
        "process 1 of the run was killed by SIGKILL; run the same command again to start from the beginning, since "
        "there is no checkpoint yet"
    )
    assert message in result["output"].splitlines(), result["output"]
    assert "resource_tracker" not in result["output"]
    assert "Traceback" not in result["output"]


@pytest.mark.slow
def test_workers_of_the_data_loader_end_with_a_killed_run(
    few_digits: Path, tmp_path: Path, launches: Callable, watched: ModuleType
) -> None:
    """The process is killed after the first of three steps, when the worker waits for the next images to read."""
    argv = [
        *("config=pretrain/byol/digits", *watched.TINY, "config.DATA.NUM_DATALOADER_WORKERS=1"),
        *("config.DATA.TRAIN.BATCHSIZE_PER_REPLICA=32", "config.LOSS.byol.proj_hidden_dim=32"),
        f"config.CHECKPOINT.DIR={tmp_path}",
    ]
    (result,) = launches([{"argv": argv, "folder": str(few_digits.parents[1]), "watch": True, "kill_rank": 0}])
    assert result["status"] == -9, result["output"][-3000:]
    assert not result["left"]
