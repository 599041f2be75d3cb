"""Configurations in the form of DISSL's VISSL fork train unmodified; the YAML here is ours, with the fork's keys.

With VISSL_FORK_CHECKOUT naming a checkout of the fork, its own files are read too: the 39 below pretrain/dstl and
pretrain/cntr, the 14 of pretrain/simclr, the 13 of its linear and MLP probes, and the 25 scripts of bin_final.
"""

import copy
import json
import math
import os
import re
import shlex
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from classy_vision.losses import LOSS_REGISTRY
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from vissl.config import AttrDict
from vissl.data.ssl_transforms import get_transform
from vissl.models import build_model
from vissl.models.base_ssl_model import BaseSSLMultiInputOutputModel
from vissl.models.heads import get_model_head
from vissl.models.heads.mlp import MLP
from vissl.models.trunks.resnext import ResNeXt
from vissl.utils import hydra_config

from plugins.losses import cissl_loss, dissl_loss
from plugins.tools.command import UserError
from vissl_ext.dissl_losses import DstlISSLLoss
from vissl_ext.launch import prepare
from vissl_ext.model import GroupedModel, OptionMLP
from vissl_ext.registry import register
from vissl_ext.task import PluginTask
from vissl_ext.transforms import ImgTensor2RGBA, ImgTensorMask, WarmupRandomApply
from vissl_ext.trunks import ConvNeXtTrunk, WideResNeXt

register()
pytestmark = pytest.mark.vissl

CHECKOUT = "VISSL_FORK_CHECKOUT"
_LINEAR = '"use_relu": False, "use_bn": True, "use_bias": False, "skip_last_layer_relu_bn": False'
_HIDDEN = _LINEAR.replace('"use_relu": False', '"use_relu": True')
_LAST = '["mlp", {"dims": [16, 20], "use_relu": False, "use_bn": False, "use_bias": True}]'

_TOP = """# @package _global_
config:
  VERBOSE: False
  LOG_FREQUENCY: 1
  TEST_ONLY: False
  TEST_MODEL: False
  SEED_VALUE: 0
  MULTI_PROCESSING_METHOD: forkserver
  HOOKS:
    PERF_STATS:
      MONITOR_PERF_STATS: True
      ROLLING_BTIME_FREQ: 313
  TRAINER:
    TRAIN_STEP_NAME: standard_train_step
  METERS:
    name: ""
  OPTIMIZER:
    name: sgd
    use_zero: False
    use_larc: True
    larc_config:
      clip: False
      trust_coefficient: 0.001
      eps: 0.00000001
    weight_decay: 0.000001
    momentum: 0.9
    nesterov: False
    num_epochs: 2
    regularize_bn: True
    regularize_bias: True
    param_schedulers:
      lr:
        auto_lr_scaling:
          auto_scale: true
          base_value: 0.3
          base_lr_batch_size: 256
        name: composite
        schedulers:
          - name: linear
            start_value: 0.001
            end_value: 4.8
          - name: cosine
            start_value: 4.8
            end_value: 0.0000
        update_interval: step
        interval_scaling: [rescaled, fixed]
        lengths: [0.1, 0.9]
  DISTRIBUTED:
    BACKEND: nccl
    NUM_NODES: 2
    NUM_PROC_PER_NODE: 4
    INIT_METHOD: tcp
    NCCL_DEBUG: True
  MACHINE:
    DEVICE: gpu
  CHECKPOINT:
    AUTO_RESUME: True
    CHECKPOINT_FREQUENCY: 1
    CHECKPOINT_ITER_FREQUENCY: -1
  SLURM:
    NAME: "small"
    MEM_GB: 128
    USE_SLURM: False
  DATA:
    NUM_DATALOADER_WORKERS: 0
    TRAIN:
      DATA_SOURCES: [ disk_folder ]
      DATASET_NAMES: [ imagenet1k_folder ]
      DATA_PATHS: [ "datasets/digits/train" ]
      BATCHSIZE_PER_REPLICA: 32
      LABEL_TYPE: sample_index
      MMAP_MODE: True
      COPY_TO_LOCAL_DISK: False
      COPY_DESTINATION_DIR: /tmp/imagenet1k/
      DROP_LAST: True
"""
_DSTL = f"""
      COLLATE_FUNCTION: multicrop_collator
      TRANSFORMS:
        - name: ImgPilToMultiCrop
          total_num_crops: 4
          size_crops: [ 32, 16 ]
          num_crops: [ 2, 2 ]
          crop_scales: [ [ 0.3, 1 ], [ 0.05, 0.3 ] ]
        - name: RandomHorizontalFlip
          p: 0.5
        - name: ImgPilColorDistortion
          strength: 0.5
        - name: ImgPilMultiCropRandomApply
          transforms: [ {{ "name": "ImgPilGaussianBlur", "p": 1., "radius_min": 0.1, "radius_max": 2.0 }} ]
          prob: [ 1., 0.1, 0.5, 0.5 ]
          warmup_epochs: 4
        - name: ToTensor
        - name: Normalize
          mean: [ 0.485, 0.456, 0.406 ]
          std: [ 0.229, 0.224, 0.225 ]
        - name: ImgTensorMask
          prob_mask: [ 0.30, 0.30, 0, 0 ]
          patch_size: 8
          warmup_epochs: 100
  MODEL:
    INPUT_TYPE: "rgba"
    MULTI_RES_SPLIT_CROPS: [ [ 0, 1 ], [ 0, null ] ]
    CUDA_CACHE:
      CLEAR_CUDA_CACHE: False
      CLEAR_FREQ: 2000
    TRUNK:
      NAME: resnet
      RESNETS:
        DEPTH: 50
        Z_DIM_OLD_TMP_NEW : [2048, 16, 4096]
    HEAD:
      PARAMS: [
        [
          ["mlp", {{"dims": [4096, 16], {_HIDDEN}, "is_JL_init": False}}],
          ["mlp", {{"dims": [16, 24, 16], {_HIDDEN}, "is_residual": True, "is_JL_init": False}}],
          {_LAST},
        ],
        [
          ["mlp", {{"dims": [4096, 16], {_LINEAR}, "is_JL_init": False}}],
          {_LAST},
        ],
      ]
    SYNC_BN_CONFIG:
      CONVERT_BN_TO_SYNC_BN: True
      SYNC_BN_TYPE: pytorch
      GROUP_SIZE: -1
    AMP_PARAMS:
      USE_AMP: True
      AMP_TYPE: "pytorch"
  LOSS:
    name: dstl_issl_loss
    dstl_issl_loss:
      n_Mx: 16384
      temperature_assign: 0.7
      temperature_pred: 1
      num_crops: 2
      crops_for_teacher: [ 0, 1 ]
      beta_pM_unif: 2.3
      beta_H_MlZ: 0.6
      warmup_beta_CE_iter: 1000
"""
_CNTR = f"""
      COLLATE_FUNCTION: simclr_collator
      TRANSFORMS:
        - name: ImgReplicatePil
          num_times: 2
        - name: RandomResizedCrop
          size: 32
        - name: ToTensor
  MODEL:
    TRUNK:
      NAME: resnet
      OUT_FEATURE_KEYS: ["flatten","flatten"]
      RESNETS:
        DEPTH: 50
    HEAD:
      PARAMS: [
        [
          ["mlp", {{"dims": [2048, 24, 24], {_HIDDEN}}}],
          ["mlp", {{"dims": [24, 8], {_LINEAR}, "is_JL_init": True}}],
        ],
        [
          ["mlp", {{"dims": [2048, 8], {_LINEAR}, "is_JL_init": True}}],
        ]
      ]
      NON_TRAINABLE_PARAMS: [ "heads.1.0.norm.bias","heads.0.1.clf.1.bias" ]
  LOSS:
    name: cntr_issl_loss
    cntr_issl_loss:
      temperature: 0.1
      buffer_params:
        embedding_dim: 128
    simple_cntr_issl_loss:
      temperature: 0.1
      buffer_params:
        embedding_dim: 128
"""
_SIMCLR = f"""
      COLLATE_FUNCTION: simclr_collator
      TRANSFORMS:
        - name: ImgReplicatePil
          num_times: 2
        - name: RandomResizedCrop
          size: 32
        - name: ToTensor
  MODEL:
    TRUNK:
      NAME: resnet
      RESNETS:
        DEPTH: 50
    HEAD:
      PARAMS: [
        ["mlp", {{"dims": [2048, 24, 24], {_HIDDEN}}}],
        ["mlp", {{"dims": [24, 8], {_LINEAR}}}],
      ]
      NON_TRAINABLE_PARAMS: [ "heads.1.clf.1.bias" ]
    SYNC_BN_CONFIG:
      CONVERT_BN_TO_SYNC_BN: True
      SYNC_BN_TYPE: pytorch
      GROUP_SIZE: -1
  LOSS:
    name: simclr_info_nce_loss
    simclr_info_nce_loss:
      temperature: 0.1
      buffer_params:
        embedding_dim: 8
"""
_PROBE = """# @package _global_
config:
  TEST_MODEL: True
  SEED_VALUE: 1
  MULTI_PROCESSING_METHOD: forkserver
  DATA:
    NUM_DATALOADER_WORKERS: 0
    TRAIN:
      DATA_SOURCES: [disk_folder]
      LABEL_SOURCES: [disk_folder]
      DATASET_NAMES: [imagenet1k_folder]
      DATA_PATHS: ["datasets/digits/train"]
      BATCHSIZE_PER_REPLICA: 48
      TRANSFORMS: [{name: ToTensor}, {name: ImgTensor2RGBA}]
      MMAP_MODE: True
      COPY_TO_LOCAL_DISK: False
      COPY_DESTINATION_DIR: /tmp/imagenet1k/
    TEST:
      DATA_SOURCES: [disk_folder]
      LABEL_SOURCES: [disk_folder]
      DATASET_NAMES: [imagenet1k_folder]
      DATA_PATHS: ["datasets/digits/val"]
      BATCHSIZE_PER_REPLICA: 40
      TRANSFORMS: [{name: ToTensor}, {name: ImgTensor2RGBA}]
      MMAP_MODE: True
      COPY_TO_LOCAL_DISK: False
      COPY_DESTINATION_DIR: /tmp/imagenet1k/
  METERS:
    name: accuracy_list_meter
    accuracy_list_meter: {num_meters: 5, topk_values: [1, 5]}
  TRAINER: {TRAIN_STEP_NAME: standard_train_step}
  MODEL:
    INPUT_TYPE: rgba
    FEATURE_EVAL_SETTINGS:
      EVAL_MODE_ON: True
      FREEZE_TRUNK_ONLY: True
      SHOULD_FLATTEN_FEATS: False
      LINEAR_EVAL_FEAT_POOL_OPS_MAP: [["res5avg", ["Identity", []]], ["res5avg", ["Identity", []]]]
    TRUNK:
      NAME: resnet
      RESNETS: {DEPTH: 50, IS_SKIP_RESIZER: False, Z_DIM_OLD_TMP_NEW: [2048, 16, 4096]}
    HEAD:
      PARAMS: [["eval_mlp", {"in_channels": 4096, "dims": [4096, 10]}], ["mlp", {"dims": [4096, 10]}]]
    WEIGHTS_INIT:
      PARAMS_FILE: "specify the model weights"
      STATE_DICT_KEY_NAME: classy_state_dict
    SYNC_BN_CONFIG: {CONVERT_BN_TO_SYNC_BN: True, SYNC_BN_TYPE: pytorch, GROUP_SIZE: -1}
    AMP_PARAMS: {USE_AMP: True, AMP_TYPE: pytorch}
  LOSS:
    name: cross_entropy_multiple_output_single_target
    cross_entropy_multiple_output_single_target: {ignore_index: -1}
  OPTIMIZER:
    name: sgd
    weight_decay: 0.0005
    momentum: 0.9
    num_epochs: 2
    nesterov: True
    regularize_bn: False
    regularize_bias: True
    param_schedulers:
      lr:
        auto_lr_scaling: {auto_scale: true, base_value: 0.01, base_lr_batch_size: 256}
        name: multistep
        values: [0.01, 0.001]
        milestones: [1]
        update_interval: epoch
  DISTRIBUTED: {BACKEND: nccl, NUM_NODES: 1, NUM_PROC_PER_NODE: 8, INIT_METHOD: tcp, RUN_ID: auto}
  MACHINE: {DEVICE: gpu}
  CHECKPOINT: {DIR: ".", AUTO_RESUME: True, CHECKPOINT_FREQUENCY: 5}
  SLURM: {NAME: probe, MEM_GB: 128, USE_SLURM: False}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A --config-dir with our three files."""
    root = tmp_path_factory.mktemp("fork")
    texts = {"pretrain/small/dstl": _TOP + _DSTL, "pretrain/small/cntr": _TOP + _CNTR, "benchmark/small/probe": _PROBE}
    for name, text in texts.items():
        path = root / "config" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture
def prepared(folder: Path, few_digits: Path, tmp_path: Path) -> Callable[..., Any]:
    """prepared(name, *overrides) → what the launcher makes of a file and hands to the ranks."""

    def run(name: str, *overrides: str, at: Path = folder) -> Any:
        words = [
            *(f"config={name}", f"config.DATA.TRAIN.DATA_PATHS=[{few_digits / 'train'}]", "config.MACHINE.DEVICE=cpu"),
            *("config.SLURM.USE_SLURM=false", f"config.CHECKPOINT.DIR={tmp_path / 'run'}", *overrides),
        ]
        return prepare(words, [str(at)])[1]

    return run


def built(config: Any) -> Any:
    """Task, with model and loss as ``prepare`` builds them."""
    task = PluginTask.from_config(config)
    torch.manual_seed(0)
    task.base_model = task._build_model()
    task.base_loss = task._build_loss()
    return task


def _fork_files(count: int, *patterns: str) -> list[Any]:
    root = os.environ.get(CHECKOUT)
    if not root:
        why = f"NOT TESTED: the fork's own files, since {CHECKOUT} names no checkout of it"
        return [pytest.param(None, marks=pytest.mark.skip(reason=why))]
    top = Path(root) / "configs" / "config"
    found = sorted(path for pattern in patterns for path in top.glob(pattern))
    assert len(found) == count, f"{root} holds {len(found)} of the fork's {count} files {patterns}"
    return [pytest.param(path, id=path.stem) for path in found]


@pytest.mark.parametrize(
    "path",
    _fork_files(
        13,
        "benchmark/linear_image_classification/imagenet1k/eval_resnet_in1k_*.yaml",
        "benchmark/linear_image_classification/*/eval_resnet_transfer_*.yaml",
    ),
)
def test_probes_of_the_fork_pass_the_checks_and_build(path: Path, prepared: Callable, few_digits: Path) -> None:
    weights = few_digits.parent / "weights.torch"
    torch.save({"classy_state_dict": {"base_model": {"model": {"trunk": {}, "heads": {}}}}}, weights)
    name = path.relative_to(path.parents[3]).with_suffix("")
    overrides = [
        f"config.MODEL.WEIGHTS_INIT.PARAMS_FILE={weights}",
        f"config.DATA.TEST.DATA_PATHS=[{few_digits / 'val'}]",
    ]
    config = prepared(str(name), *overrides, at=path.parents[4])
    with torch.device("meta"):
        model = build_model(config.MODEL, config.OPTIMIZER).eval()
        channels = 4 if config.MODEL.INPUT_TYPE == "rgba" else 3
        outputs = model(torch.randn(2, channels, 224, 224))
    given = [head[1]["dims"][-1] for head in config.MODEL.HEAD.PARAMS]
    assert [tuple(output.shape) for output in outputs] == [(2, classes) for classes in given]
    assert not any(parameter.requires_grad for parameter in model.trunk.parameters())
    assert all(parameter.requires_grad for parameter in model.heads.parameters())


@pytest.mark.slow
def test_a_probe_of_a_pretrained_trunk(folder: Path, few_digits: Path, tmp_path: Path, launch: Callable) -> None:
    """Both of the fork's probes train on a trunk of this test's pre-training, four channels and 4096 features."""
    common = ["config.DISTRIBUTED.NUM_NODES=1", "config.DISTRIBUTED.NUM_PROC_PER_NODE=1", "--config-dir", str(folder)]
    common += ["config.DATA.TRAIN.DATA_LIMIT=16", "config.DATA.TRAIN.BATCHSIZE_PER_REPLICA=8"]
    train = f"config.DATA.TRAIN.DATA_PATHS=[{few_digits / 'train'}]"
    first, second = tmp_path / "pretrain", tmp_path / "probe"
    launch(
        "config=pretrain/small/dstl", train, "config.OPTIMIZER.num_epochs=1", f"config.CHECKPOINT.DIR={first}", *common
    )
    launch(
        *("config=benchmark/small/probe", train, f"config.DATA.TEST.DATA_PATHS=[{few_digits / 'val'}]"),
        *(f"config.MODEL.WEIGHTS_INIT.PARAMS_FILE={first / 'checkpoint.torch'}", f"config.CHECKPOINT.DIR={second}"),
        *(*common, "config.DATA.TEST.DATA_LIMIT=16", "config.DATA.TEST.BATCHSIZE_PER_REPLICA=8"),
    )
    before, after = (
        torch.load(at / "checkpoint.torch", weights_only=False)["classy_state_dict"]["base_model"]["model"]
        for at in (first, second)
    )
    compared = [name for name in before["trunk"] if "num_batches_tracked" not in name]
    assert len(compared) > 200
    for name in compared:
        assert torch.equal(after["trunk"][f"base_model.{name}"], before["trunk"][name]), name
    rows = [json.loads(line) for line in (second / "metrics.json").read_text().splitlines()]
    top = [row["test_accuracy_list_meter"]["top_1"] for row in rows if "test_accuracy_list_meter" in row]
    assert [len(row["res5avg"]) for row in top] == [2, 2]  # epochs, each with the accuracy of both probes


@pytest.mark.parametrize(
    "path", _fork_files(53, "pretrain/dstl/*.yaml", "pretrain/cntr/*.yaml", "pretrain/simclr/*.yaml")
)
def test_files_of_the_fork_pass_the_checks_and_build(path: Path, prepared: Callable) -> None:
    name = f"pretrain/{path.parent.name}/{path.stem}"
    if path.stem == "dissl_e100_d8192_m4b6s_r030":  # the file holds two configurations, one below the other
        with pytest.raises(UserError, match="found duplicate key config"):
            prepared(name, at=path.parents[3])
        return
    config = prepared(name, at=path.parents[3])
    lr = config.OPTIMIZER.param_schedulers.lr
    assert [part["name"] for part in lr.schedulers] == ["linear", "cosine"]
    starts = {"simclr_resnet": 0.6, "simclr_headv2": 0.6}
    assert lr.schedulers[0]["start_value"] == starts.get(path.stem, 1e-5 if "convnext" in path.stem else 0.001)
    with torch.device("meta"):
        model = build_model(config.MODEL, config.OPTIMIZER)
        channels = 4 if config.MODEL.INPUT_TYPE == "rgba" else 3
        views = [torch.randn(2, channels, 64, 64) for _ in range(2)]
        batch = views if config.DATA.TRAIN.COLLATE_FUNCTION == "multicrop_collator" else torch.cat(views)
        outputs = model(batch)
    if config.LOSS.name == "simclr_info_nce_loss":  # VISSL's own, of one head
        width = config.LOSS.simclr_info_nce_loss.buffer_params.embedding_dim
        assert [output.shape for output in outputs] == [(4, width)]
        return
    teacher, student = outputs
    assert isinstance(PluginTask.from_config(config)._build_loss(), LOSS_REGISTRY[config.LOSS.name])
    assert len(teacher) == len(student) == 4
    assert teacher.shape[1] == student.shape[1] == model.heads[0][-1].clf[0].out_features


_PAGE = (Path(__file__).parents[2] / "docs" / "migration.md").read_text().partition("### The scripts of bin_final")[2]
_SCRIPTS = {row.split("`")[1]: row for row in re.findall(r"^\| `\w+\.sh.*$", _PAGE.partition("\n## ")[0], re.MULTILINE)}
"""A script of bin_final with its arguments → its row of the page."""


def _command_of_the_page(row: str) -> dict[str, str]:
    """The options of the page's command with the values of a row."""
    (block,) = re.findall(r"config=pretrain/dstl/.*?\n```", _PAGE.replace("\\\n", " "), re.DOTALL)
    options = dict(word.split("=", 1) for word in block.removesuffix("```").split())
    cells = [cell.strip().strip("`") for cell in row.strip("|").split("|")]
    file, server, gpus, batch, workers, memory, folder = cells[1:8]
    values = {"NUM_PROC_PER_NODE": gpus, "TRAIN.BATCHSIZE_PER_REPLICA": batch, "WORKERS": workers, "MEM_GB": memory}
    for ending, value in values.items():
        (key,) = (key for key in options if key.endswith(ending))
        options[key] = value
    options["config"] = file.replace("LINEAR", "benchmark/linear_image_classification")
    options |= {"+config/server": server, "config.SLURM.LOG_FOLDER": folder}
    options["config.CHECKPOINT.DIR"] = f"{folder}/checkpoints"
    options |= {f"config.{key}": value for key, value in (word.strip("`").split("=", 1) for word in cells[8].split())}
    return options


def _command_of_the_script(path: Path, arguments: list[str]) -> dict[str, str]:
    """The options with which a script of bin_final starts VISSL; its arguments are the page's placeholders."""
    text = re.sub(r"^ *#.*\n", "", path.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    variables = dict(re.findall(r"^(\w+)=(\S+)$", text, re.MULTILINE))
    variables |= {str(place): argument for place, argument in enumerate(arguments, 1)}
    (line,) = re.findall(r"^\./dev/launch_slurm\.sh (.*)$", text, re.MULTILINE)
    while "$" in line:
        line = re.sub(r"\$(\w+)", lambda name: variables[name[1]], line)
    folder, *words = shlex.split(line.rstrip("\\ "))
    more = {"USE_SLURM": "true", "LOG_FOLDER": folder}  # launch_slurm.sh adds them
    options = dict(word.split("=", 1) for word in words) | {f"config.SLURM.{key}": more[key] for key in more}
    return {**options, "config.CHECKPOINT.DIR": f"{folder}/checkpoints"}


@pytest.mark.slow
@pytest.mark.parametrize("path", _fork_files(25, "../../bin_final/*.sh"))
def test_scripts_of_the_fork(path: Path, few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page has the options of each script, and ours accepts them, on the digits and without the cluster."""
    if path.stem.startswith("all_transfer"):
        assert f"`{path.name}`" in _PAGE
        return
    (typed,) = (name for name in _SCRIPTS if name.split()[0] == path.name)
    options, script = _command_of_the_page(_SCRIPTS[typed]), _command_of_the_script(path, typed.split()[1:])
    own = ("DATA_PATHS", "PORT_ID", "SLURM.NAME", "IS_NOWARMUP")
    assert {key: value for key, value in options.items() if not key.endswith(own)} == {
        key: value for key, value in script.items() if not key.endswith(own)
    }
    weights = tmp_path / "weights.torch"
    torch.save({"classy_state_dict": {"base_model": {"model": {"trunk": {}, "heads": {}}}}}, weights)
    given = {"MODEL": "dissl_e100_d2048_m2", "SUFFIX": "_z8" if path.stem == "augeval" else "hi"}
    options = {key: re.sub("MODEL|SUFFIX", lambda name: given[name[0]], value) for key, value in options.items()}
    options["config.SLURM.USE_SLURM"] = "false"
    if options["+config/server"] == "sphinx1_2gpu":
        del options["+config/server"]
    for split, folder in (("TRAIN", "train"), ("TEST", "val")):
        options[f"config.DATA.{split}.DATA_PATHS"] = f"[{few_digits / folder}]"
    if "config.MODEL.WEIGHTS_INIT.PARAMS_FILE" in options:
        options["config.MODEL.WEIGHTS_INIT.PARAMS_FILE"] = str(weights)
    monkeypatch.chdir(tmp_path)
    config = prepare([f"{key}={value}" for key, value in options.items()], [str(path.parents[1] / "configs")])[1]
    assert int(options["config.DATA.TRAIN.BATCHSIZE_PER_REPLICA"]) == config.DATA.TRAIN.BATCHSIZE_PER_REPLICA


@pytest.mark.slow
def test_the_trunk_convnext_is_torchvisions(prepared: Callable) -> None:
    """Weights of torchvision's ConvNeXt, which is written independently of timm's, give the same features."""
    depths, dims = [1, 2, 3, 1], [8, 16, 24, 64]
    shape = f"config.MODEL.TRUNK.CONVNEXT={{DEPTH: {depths}, DIMS: {dims}}}"
    rgb = prepared("pretrain/small/dstl", "config.MODEL.TRUNK.NAME=convnext", shape, "config.MODEL.INPUT_TYPE=rgb")
    trunk = ConvNeXtTrunk(rgb.MODEL, "convnext").double()
    settings = [CNBlockConfig(*sizes) for sizes in zip(dims, [*dims[1:], None], depths, strict=True)]
    theirs = ConvNeXt(settings, num_classes=1, layer_scale=1e-6).double()
    for part in theirs.parameters():
        torch.nn.init.normal_(part, std=0.3)
    of_block = {"layer_scale": "gamma", "0": "conv_dw", "2": "norm", "3": "mlp.fc1", "5": "mlp.fc2"}
    weights = {}
    for name, value in theirs.state_dict().items():
        first, place, *rest = name.split(".")
        if first == "classifier":
            renamed = f"head.norm.{rest[0]}" if place == "0" else None
        elif place == "0":
            renamed = f"stem.{'.'.join(rest)}"
        elif int(place) % 2 == 0:
            renamed = f"stages.{int(place) // 2}.downsample.{'.'.join(rest)}"
        else:
            block, *inner = rest
            kind = of_block[inner[1] if inner[0] == "block" else inner[0]]
            renamed = ".".join([f"stages.{int(place) // 2}.blocks.{block}.{kind}", *inner[2:]])
        if renamed is not None:
            weights[renamed] = value.flatten() if renamed.endswith("gamma") else value
    trunk.network.load_state_dict(weights)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    (features,) = trunk(images)
    expected = theirs.classifier[0](theirs.avgpool(theirs.features(images))).flatten(1)
    assert features.shape == (2, 64)
    torch.testing.assert_close(features, expected)


@pytest.mark.slow
def test_convnext_is_trained_with_four_channels(prepared: Callable) -> None:
    shape = "config.MODEL.TRUNK.CONVNEXT={DEPTH: [1, 1, 1, 1], DIMS: [8, 8, 8, 64]}"
    heads = "config.MODEL.HEAD.PARAMS=[[mlp,{dims:[64,20]}],[mlp,{dims:[64,20]}]]"
    config = prepared("pretrain/small/dstl", "config.MODEL.TRUNK.NAME=convnext", shape, heads)
    task = built(config)
    views = [torch.randn(4, 4, size, size) for size in (64, 64, 32, 32)]
    task.base_loss(task.base_model.train()(views), None).backward()
    missed = [
        name
        for name, part in task.base_model.trunk.named_parameters()
        if part.grad is None or not part.grad.abs().sum() > 0
    ]
    assert not missed


@pytest.mark.sample("{DIMS*")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{DEPTHS: [1, 1, 1, 1]}", "'DEPTHS' is unknown, did you mean 'DEPTH'"),
        ("{DEPTH: [1, 1, 1]}", "DEPTH must be a list of four integers above 0"),
        ("{DIMS: [8, 8, 8, 0]}", "DIMS must be a list of four integers above 0"),
        ("{DROP_PATH_RATE: 1}", r"DROP_PATH_RATE must be in \[0, 1\), got 1"),
    ],
)
def test_invalid_options_of_convnext_raise_an_error(given: str, message: str, prepared: Callable) -> None:
    with pytest.raises(UserError, match=message):
        prepared("pretrain/small/dstl", "config.MODEL.TRUNK.NAME=convnext", f"config.MODEL.TRUNK.CONVNEXT={given}")


@pytest.mark.slow
def test_heads_see_groups_of_resolutions_and_the_loss_is_that_of_plugins(prepared: Callable) -> None:
    """Two steps of training, with the weights of the β warm-up at k = 1 and 2."""
    task = built(prepared("pretrain/small/dstl"))
    model, loss = task.base_model.double().train(), task.base_loss
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    runs: list[Any] = []
    model.trunk.register_forward_hook(lambda module, given, output: runs.append(given[0].shape))
    for step in (1, 2):
        large = [torch.randn(4, 4, 32, 32, dtype=torch.float64) for _ in range(2)]
        small = [torch.randn(4, 4, 16, 16, dtype=torch.float64) for _ in range(2)]
        alone = copy.deepcopy(model)
        output = model([*large, *small])
        assert [tuple(part.shape) for part in output] == [(8, 20), (16, 20)]

        features = [alone.trunk(torch.cat(crops), [])[0] for crops in (large, small)]
        teacher, student = alone.heads[0](features[0]), alone.heads[1](torch.cat(features))
        way = (1 + step) / 1000
        expected = dissl_loss(
            list(teacher.chunk(2)),
            list(student.chunk(4)),
            lambda_maximality=2.3,
            beta_det_inv=2.3 + (0.6 - 2.3) * way,
            tau_teacher=0.7,
            tau_student=1.0,
        )
        value = loss(output, None)
        torch.testing.assert_close(value, expected)
        optimizer.zero_grad()
        value.backward()
        expected.backward()
        for (name, ours), theirs in zip(model.named_parameters(), alone.parameters(), strict=True):
            # the weights of a warm-up are float32
            assert (ours.grad - theirs.grad).abs().max() <= 1e-5 * theirs.grad.abs().max() + 1e-9, name
        optimizer.step()
        assert loss.num_iteration.tolist() == [step]
        assert {"loss", "distillation", "H_M", "H_Mlz"} <= set(loss.metrics)
    # once for each resolution; the copy runs its hook too
    assert runs[:2] == [(8, 4, 32, 32), (8, 4, 16, 16)]
    assert len(runs) == 8
    assert model.trunk._feature_blocks["conv1"].in_channels == 4


@pytest.mark.slow
@pytest.mark.sample("cntr_issl_loss")
@pytest.mark.parametrize("name", ["cntr_issl_loss", "simple_cntr_issl_loss"])
def test_two_features_have_a_head_each(name: str, prepared: Callable) -> None:
    task = built(prepared("pretrain/small/cntr", f"config.LOSS.name={name}"))
    model = task.base_model.train()
    images = torch.randn(8, 3, 32, 32)
    alone = copy.deepcopy(model)
    teacher, student = model(images)
    (features,) = alone.trunk(images, [])
    torch.testing.assert_close(teacher, alone.heads[0](features))
    torch.testing.assert_close(student, alone.heads[1](features))
    positives = "other" if name.startswith("simple") else "all"
    expected = cissl_loss(list(student.chunk(2)), list(teacher.chunk(2)), temperature=0.1, positives=positives)
    torch.testing.assert_close(task.base_loss([teacher, student], None), expected)


def test_the_first_head_can_have_the_features_of_before_the_block(prepared: Callable) -> None:
    widths = ["config.MODEL.TRUNK.RESNETS.Z_DIM_OLD_TMP_NEW=[2048,8,4096]"]
    heads = "[[mlp,{dims:[2048,8]}],[mlp,{dims:[4096,8]}]]"
    switch = "config.MODEL.TRUNK.RESNETS.IS_SKIP_RESIZER=true"
    task = built(prepared("pretrain/small/cntr", *widths, switch, f"config.MODEL.HEAD.PARAMS={heads}"))
    model = task.base_model.eval()
    images = torch.randn(2, 3, 32, 32)
    blocks = model.trunk._feature_blocks
    x = images
    for name in ("conv1", "bn1", "conv1_relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
        x = blocks[name](x)
    narrow, wide = x.mean((2, 3)), blocks["resizer"](x).mean((2, 3))
    outputs = model(images)
    torch.testing.assert_close(outputs[0], model.heads[0](narrow))
    torch.testing.assert_close(outputs[1], model.heads[1](wide))


@pytest.mark.slow
def test_a_resumed_run_goes_on_in_its_warm_up(folder: Path, few_digits: Path, launches: Callable) -> None:
    """24 images, 3 steps an epoch; the launcher's own command."""
    words = ["config=pretrain/small/dstl", "--config-dir", str(folder), "config.MACHINE.DEVICE=cpu"]
    words += ["config.CHECKPOINT.DIR=runs/fork", "config.DISTRIBUTED.BACKEND=gloo"]
    words += ["config.DATA.TRAIN.DATA_LIMIT=24", "config.DATA.TRAIN.BATCHSIZE_PER_REPLICA=8"]
    for epochs in (1, 2):
        job = {"argv": [*words, f"config.OPTIMIZER.num_epochs={epochs}"], "folder": str(few_digits.parents[1])}
        if epochs == 2:
            (few_digits.parents[1] / "runs" / "fork" / "model_final_checkpoint_phase0.torch").rename(
                few_digits.parents[1] / "runs" / "fork" / "model_phase0.torch"
            )
        (result,) = launches([job])
        assert result["status"] == 0, result["output"][-6000:]
        saved = few_digits.parents[1] / "runs" / "fork" / f"model_final_checkpoint_phase{epochs - 1}.torch"
        state = torch.load(saved, weights_only=True)["classy_state_dict"]
        assert {name: value.tolist() for name, value in state["loss"].items()} == {
            "num_iteration": [3 * epochs],
            "alarm.rung": False,
        }
    rows = (few_digits.parents[1] / "runs" / "fork" / "metrics.csv").read_text().splitlines()
    assert len(rows) == 3
    assert {"H_M", "H_Mlz", "distillation", "invariance"} <= set(rows[0].split(","))


@pytest.mark.slow
def test_the_warm_up_of_the_learning_rate_is_kept(prepared: Callable) -> None:
    """VISSL deletes it where there is one machine: its schedule is then the cosine alone."""
    assert [part["name"] for part in _lr(prepared("pretrain/small/dstl")).schedulers] == ["linear", "cosine"]
    stock = "pretrain/simclr/simclr_8node_resnet"
    apex = "config.MODEL.SYNC_BN_CONFIG.SYNC_BN_TYPE=pytorch"
    assert _lr(prepared(stock, apex)).name == "cosine"
    kept = "config.OPTIMIZER.param_schedulers.lr.auto_lr_scaling.keep_warmup=true"
    assert _lr(prepared(stock, apex, kept)).name == "composite"

    config = prepared("pretrain/small/dstl")
    schedule = hydra_config.resolve_linear_schedule.__wrapped__(config, _lr(config))
    assert schedule.name == "cosine"


@pytest.mark.slow
def test_simclr_of_the_forks_folder_is_warmed_up_as_written(folder: Path, tmp_path: Path, prepared: Callable) -> None:
    """Its loss is VISSL's; the fork's files are recognised by the folder pretrain/dstl or pretrain/cntr beside them."""

    def parts(at: Path, *overrides: str, name: str = "pretrain/simclr/small") -> list[tuple[str, float]]:
        lr = _lr(prepared(name, "config.MODEL.SYNC_BN_CONFIG.SYNC_BN_TYPE=pytorch", *overrides, at=at))
        if lr.name == "cosine":
            return [("cosine", lr.start_value)]
        return [(part["name"], part["start_value"]) for part in lr.schedulers]

    stock, fork, text = tmp_path / "stock", tmp_path / "fork", _TOP + _SIMCLR
    for root, places in ((stock, ("simclr", "swav")), (fork, ("simclr", "cntr"))):
        for place in places:
            (root / "config" / "pretrain" / place).mkdir(parents=True)
        (root / "config" / "pretrain" / "simclr" / "small.yaml").write_text(text)
    lr = 0.3 * 32 / 256
    cosine, whole = [("cosine", lr)], [("linear", 0.001), ("cosine", lr)]
    switch = "config.OPTIMIZER.param_schedulers.lr.auto_lr_scaling.keep_warmup"
    assert parts(fork) == whole
    assert parts(fork, f"{switch}=false") == cosine
    assert parts(stock) == cosine
    assert parts(stock, f"{switch}=true") == whole
    # VISSL's own file, which the fork's folder does not have
    assert [name for name, _ in parts(fork, name="pretrain/simclr/simclr_8node_resnet")] == ["cosine"]


def _lr(config: Any) -> Any:
    return config.OPTIMIZER.param_schedulers.lr


@pytest.mark.slow
def test_without_the_forks_keys_vissls_own_parts_are_built(prepared: Callable) -> None:
    """The random weights, keys and outputs are the same, also with crops of two sizes."""
    config = prepared("pretrain/simclr/simclr_8node_resnet", "config.MODEL.SYNC_BN_CONFIG.SYNC_BN_TYPE=pytorch").MODEL
    config.HEAD.PARAMS = [[["mlp", {"dims": [2048, 8, 4], "use_bn": True, "use_relu": True, "use_dropout": True}]]]
    images = [torch.randn(4, 3, size, size) for size in (40, 40, 33)]
    outputs, states = [], []
    for model_kind, trunk_kind, head_kind in (
        (GroupedModel, WideResNeXt, OptionMLP),
        (BaseSSLMultiInputOutputModel, ResNeXt, MLP),
    ):
        torch.manual_seed(0)
        model = model_kind(config, {})
        if model_kind is BaseSSLMultiInputOutputModel:
            torch.manual_seed(0)
            model.trunk = ResNeXt(config, "resnet")
            torch.manual_seed(config._MODEL_INIT_SEED)
            model.heads[0][0] = MLP(config, **config.HEAD.PARAMS[0][0][1])
        assert type(model.trunk) is trunk_kind
        assert type(model.heads[0][0]) is head_kind
        torch.manual_seed(2)
        outputs.append([model(images)[0], model(images[0])[0]])
        states.append(model.state_dict())
    assert list(states[0]) == list(states[1])
    for ours, theirs in zip(states[0].values(), states[1].values(), strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(*outputs, strict=True):
        assert torch.equal(ours, theirs)


def head(name: str, **options: Any) -> nn.Module:
    config = AttrDict({"HEAD": {"BATCHNORM_EPS": 1e-5, "BATCHNORM_MOMENTUM": 0.1, "PARAMS_MULTIPLIER": 1.0}})
    torch.manual_seed(0)
    return get_model_head(name)(config, **options)


def test_options_of_the_mlp() -> None:
    kinds = [type(layer).__name__ for layer in head("mlp", dims=[4, 5, 6], use_ln=True, use_gelu=True).clf]
    assert kinds == ["Linear", "LayerNorm", "GELU", "Linear"]
    whole = head(
        "mlp", dims=[4, 5], use_bn=True, use_ln=True, use_gelu=True, use_dropout=True, skip_last_layer_relu_bn=False
    )
    assert [type(layer).__name__ for layer in whole.clf] == ["Linear", "BatchNorm1d", "LayerNorm", "GELU", "Dropout"]

    x = torch.randn(7, 4)
    residual = head("mlp", dims=[4, 6, 4], is_residual=True)
    torch.testing.assert_close(residual(x), x + residual.clf(x))
    torch.testing.assert_close(residual(x[:, :, None, None]), residual(x))

    narrow = head("mlp", dims=[400, 100, 300], is_JL_init=True, use_bias=False)
    assert narrow.clf[0].weight.std().item() == pytest.approx(0.1, rel=0.02)  # 1 / √100, of 40,000 numbers
    assert narrow.clf[1].weight.abs().max().item() <= 0.1  # torch's: uniform up to 1 / √100

    for options, reason in (
        ({"dims": [4, 4], "use_gelu": True, "use_relu": True}, "exclude each other"),
        ({"dims": [4, 3], "is_residual": True}, "equal first and last dims, got 4 and 3"),
    ):
        with pytest.raises(ValueError, match=reason):
            head("mlp", **options)


def test_heads_identity_and_batchnorm() -> None:
    x = 3 + 2 * torch.randn(50, 4)
    assert torch.equal(head("identity")(x), x)
    normed = head("batchnorm", dim=4)
    torch.testing.assert_close(normed(x), (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt())
    assert "norm.weight" in normed.state_dict()


def test_masked_patches_are_zero_in_all_channels() -> None:
    torch.manual_seed(0)
    mask = ImgTensorMask([0.5, 0.0], patch_size=8)
    images = [torch.full((3, 160, 160), 2.0), torch.full((3, 9, 9), 2.0)]
    masked, whole = mask(images)
    assert torch.equal(whole, ImgTensor2RGBA()(images[1]))
    assert torch.equal(whole[3], torch.ones(9, 9))
    patches = masked.unfold(1, 8, 8).unfold(2, 8, 8).flatten(3)  # [4, 20, 20, 64]
    kept = patches[3, :, :, 0]
    assert torch.equal(
        patches, kept[None, :, :, None] * torch.tensor([2.0, 2.0, 2.0, 1.0])[:, None, None, None] * torch.ones(64)
    )
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    assert abs(kept.mean().item() - 0.5) < 0.15  # 400 patches, six standard deviations
    with pytest.raises(ValueError, match=r"patch_size=8 does not divide .* an image of 9 x 9 pixels"):
        ImgTensorMask([0.5], patch_size=8)(images[1:])
    with pytest.raises(ValueError, match="got 2 for 1 views"):
        mask(images[:1])


def test_the_epoch_is_set_in_the_transforms_before_the_data_are_loaded(prepared: Callable) -> None:
    task = built(prepared("pretrain/small/dstl"))
    transform = get_transform(task.config.DATA.TRAIN.TRANSFORMS)
    apply, mask = transform.transforms[3].transform, transform.transforms[-1].transform
    assert isinstance(apply, WarmupRandomApply)
    heard = []
    task.datasets = {"train": SimpleNamespace(transform=transform)}
    task.dataloaders = {"train": SimpleNamespace()}
    for epoch in (0, 1, 4, 50, 200):
        task.set_epoch("train", epoch, 0, epoch)
        heard.append((apply.transforms[0].p, apply.transforms[1].p, mask.warmup_factor))
    expected = [(0, 0, 0), (0.25, 0.025, 0.01), (1, 0.1, 0.04), (1, 0.1, 0.5), (1, 0.1, 1)]
    torch.testing.assert_close(torch.tensor(heard), torch.tensor(expected, dtype=torch.float32))
    assert transform.transforms[-1]._is_grouping_transform()


@pytest.mark.slow
def test_the_epoch_is_set_before_the_iterator_is_made(prepared: Callable) -> None:
    """VISSL's hooks at the start of a phase come after the loader's processes have their copy of the transforms."""
    task = built(prepared("pretrain/small/dstl"))
    transform = get_transform(task.config.DATA.TRAIN.TRANSFORMS)
    seen = []

    class Loader:
        dataset = None

        def __iter__(self) -> Any:
            seen.append(transform.transforms[-1].transform.epoch)
            return iter(())

    task.datasets = {"train": SimpleNamespace(transform=transform, rebuild_dataloader=lambda: False)}
    task.dataloaders = {"train": Loader()}
    task.recreate_data_iterator("train", epoch=7, compute_start_iter=False, train_phase_idx=7)
    assert seen == [7]


def test_the_iteration_counts_training_steps_alone() -> None:
    loss = DstlISSLLoss.from_config({"warmup_beta_CE_iter": 10})
    teacher, student = torch.randn(8, 6), torch.randn(12, 6)

    def expected(covered: float) -> Tensor:
        views = list(teacher.chunk(2)), list(student.chunk(3))
        return dissl_loss(*views, beta_det_inv=2.3 + (0.6 - 2.3) * covered)

    torch.testing.assert_close(loss([teacher, student], None), expected(0.2))
    loss.eval()([teacher, student], None)
    assert loss.num_iteration.tolist() == [1]
    restored = DstlISSLLoss.from_config({"warmup_beta_CE_iter": 10})
    restored.load_state_dict(loss.state_dict())
    torch.testing.assert_close(restored([teacher, student], None), expected(0.3))


def test_the_iteration_is_taken_from_a_checkpoint_of_the_fork() -> None:
    """The fork's checkpoint nests the loss in another one; the fork's contrastive losses store nothing."""
    loss = DstlISSLLoss.from_config({})
    loss.set_classy_state({"dstl_criterion.num_iteration": torch.tensor([70])})
    assert loss.num_iteration.tolist() == [70]
    for name in ("cntr_issl_loss", "simple_cntr_issl_loss"):
        assert not LOSS_REGISTRY[name].from_config({}).get_classy_state()
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "dstl_criterion.step"'):
        loss.set_classy_state({"dstl_criterion.step": torch.tensor([70])})


def test_a_stall_is_reported_once_also_after_a_resume() -> None:
    uniform = [torch.zeros(8, 6), torch.zeros(8, 6)]
    loss = DstlISSLLoss.from_config({})
    loss.num_iteration.fill_(999)
    with pytest.warns(UserWarning, match="DISSL has stalled"):
        loss(uniform, None)
    resumed, older = DstlISSLLoss.from_config({}), DstlISSLLoss.from_config({})
    resumed.set_classy_state(loss.get_classy_state())
    resumed.num_iteration.fill_(1199)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed(uniform, None)
    older.set_classy_state({"num_iteration": torch.tensor([1199])})
    with pytest.warns(UserWarning, match="DISSL has stalled"):
        older(uniform, None)


def test_a_stall_is_reported_after_the_warm_up_of_a_resumed_run() -> None:
    uniform = [torch.zeros(8, 6), torch.zeros(8, 6)]
    for begun, rings in ((998, False), (999, True), (1198, False), (1199, True)):
        loss = DstlISSLLoss.from_config({})
        loss.num_iteration.fill_(begun)
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            value = loss(uniform, None)
        assert value.item() == pytest.approx((1 - 2.3 + 0.6) * math.log(6))
        assert [str(each.message).startswith("DISSL has stalled") for each in heard] == [True] * rings


@pytest.mark.sample("cntr-*buffer_params*", "dstl-*beta_pM_unif*")
@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("dstl", "+config.LOSS.dstl_issl_loss.beta=1", "config.LOSS.dstl_issl_loss: 'beta' is unknown"),
        ("dstl", "config.LOSS.dstl_issl_loss.beta_H_MlZ=-1", "beta_H_MlZ must be a finite number at least 0, got -1"),
        ("dstl", "config.LOSS.dstl_issl_loss.beta_H_MlZ=inf", "beta_H_MlZ must be a finite number at least 0, got inf"),
        ("dstl", "config.LOSS.dstl_issl_loss.beta_pM_unif=nan", "must be a finite number at least 0, got nan"),
        ("dstl", "config.LOSS.dstl_issl_loss.temperature_pred=0", "must be a finite number above 0, got 0"),
        ("dstl", "config.LOSS.dstl_issl_loss.temperature_assign=nan", "must be a finite number above 0, got nan"),
        ("dstl", "config.LOSS.dstl_issl_loss.warmup_beta_CE_iter=0.5", "must be a number of steps or null, got 0.5"),
        ("dstl", "config.LOSS.dstl_issl_loss.crops_for_teacher=[1,2]", "must be the indices of the first crops"),
        (
            "dstl",
            "config.DATA.TRAIN.TRANSFORMS.0.size_crops=[16,32]",
            r"put the largest first, got views of sizes \[16, 16, 32, 32\]",
        ),
        ("dstl", "config.LOSS.dstl_issl_loss.crops_for_teacher=[0,a]", "must be the indices of the first crops"),
        (
            "dstl",
            "config.LOSS.dstl_issl_loss.crops_for_teacher=[0,1,2]",
            "requires 3 views for the teacher head, got 2",
        ),
        ("dstl", "config.MODEL.MULTI_RES_SPLIT_CROPS=[[0,null]]", "requires a group of resolutions for each head"),
        ("dstl", "config.MODEL.MULTI_RES_SPLIT_CROPS=[0,1]", "must be a list with a pair"),
        ("dstl", "config.DATA.TRAIN.COLLATE_FUNCTION=default_collate", "requires config.DATA.TRAIN.COLLATE_FUNCTION"),
        (
            "dstl",
            "config.MODEL.TRUNK.RESNETS.Z_DIM_OLD_TMP_NEW=[512,8,4096]",
            r"\[2048, bottleneck, new width\]",
        ),
        ("dstl", "config.MODEL.HEAD.PARAMS=[[mlp,{dims:[4096,16]}]]", "requires two heads"),
        (
            "dstl",
            "config.MODEL.HEAD.PARAMS=[[mlp,{dims:[4,3],is_residual:true}],[identity,{}]]",
            "equal first and last",
        ),
        ("cntr", "config.MODEL.TRUNK.OUT_FEATURE_KEYS=[flatten]", "requires a feature for each head"),
        ("cntr", "config.LOSS.cntr_issl_loss.buffer_params={foo:1}", "buffer_params must be a mapping with the keys"),
        (
            "cntr",
            "config.LOSS.cntr_issl_loss.temperature=-0.1",
            "temperature must be a finite number above 0, got -0.1",
        ),
    ],
)
def test_an_invalid_option_raises_a_one_line_error(name: str, override: str, message: str, prepared: Callable) -> None:
    with pytest.raises(UserError, match=message):
        prepared(f"pretrain/small/{name}", override)


def test_outputs_that_do_not_consist_of_views_raise_an_error() -> None:
    loss = DstlISSLLoss.from_config({})
    with pytest.raises(ValueError, match="requires the outputs of two heads"):
        loss([torch.zeros(4, 3)], None)
    with pytest.raises(ValueError, match="got 5 rows of the teacher head and 4 of the student head"):
        loss([torch.zeros(5, 3), torch.zeros(4, 3)], None)
