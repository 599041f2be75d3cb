"""The command line: search for configurations, settings on a CPU, and one-line errors."""

import pickle
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

import configs
from plugins.tools.command import UserError
from vissl_ext.checks import check, check_sections
from vissl_ext.compat.checkpoints import set_aside
from vissl_ext.compose import compose, config_names
from vissl_ext.defaults import adapt, without_slurm
from vissl_ext.launch import USAGE, _options, main, prepare
from vissl_ext.progress import Progress
from vissl_ext.registry import register

register()

pytestmark = pytest.mark.vissl
SIMCLR = "config=pretrain/simclr/simclr_8node_resnet"
LOSS = "config.LOSS.simclr_info_nce_loss"


ENGINES = {"pretrain/clusterfit/cluster_features_resnet_8gpu_imagenet": ["engine_name=extract_features"]}
"""Stock files without training."""


def checked(*words: str) -> None:
    """Run the checks of the launcher."""
    cfg, given = compose(words)
    check_sections(cfg)
    check(cfg, given)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


# search


def test_configurations_are_found_in_all_places(tmp_path, monkeypatch):
    own, beside = tmp_path / "own", tmp_path / "beside"
    for folder, seed in ((own, 11), (beside / "configs", 22)):
        (folder / "config" / "mine").mkdir(parents=True)
        for name in ("a", "b") if folder is own else ("b", "c"):
            text = f"# @package _global_\nconfig:\n  SEED_VALUE: {seed}\n"
            (folder / "config" / "mine" / f"{name}.yaml").write_text(text)
    monkeypatch.chdir(beside)
    # the user's folder comes before ./configs
    for name, seed in (("a", 11), ("b", 11), ("c", 22)):
        assert seed == compose([f"config=mine/{name}"], [str(own)])[0].config.SEED_VALUE
    monkeypatch.chdir(tmp_path)
    assert compose([SIMCLR])[0].config.LOSS.name == "simclr_info_nce_loss"
    assert compose(["config=pretrain/isoloss/digits"])[0].config.LOSS.name == "isoloss"
    names = config_names([own])
    assert {"mine/a", "pretrain/swav/swav_8node_resnet", "pretrain/isoloss/digits"} <= set(names)
    assert "mine/c" not in names


def test_a_file_of_the_user_hides_the_stock_one(tmp_path):
    folder = tmp_path / "config" / "pretrain" / "simclr"
    folder.mkdir(parents=True)
    (folder / "simclr_8node_resnet.yaml").write_text("# @package _global_\nconfig:\n  SEED_VALUE: 77\n")
    assert compose([SIMCLR], [str(tmp_path)])[0].config.SEED_VALUE == 77


def test_an_empty_section_keeps_the_defaults():
    cfg, _ = compose(["config=pretrain/datasets/imagenet"])
    assert cfg.config.MACHINE == {"DEVICE": "gpu"}
    with pytest.raises(UserError, match=r"config\.MACHINE must be a mapping, got None"):
        checked("config=pretrain/datasets/imagenet", "config.MACHINE=null")


@pytest.mark.slow
def test_every_stock_file_passes_the_checks():
    refused = {}
    stock = Path(configs.__file__).parent / "config"
    names = [path.relative_to(stock).with_suffix("").as_posix() for path in sorted(stock.glob("pretrain/**/*.yaml"))]
    assert len(names) > 60
    for name in names:
        try:
            checked(f"config={name}", *ENGINES.get(name, ()))
        except UserError as error:
            refused[name] = str(error)
    assert refused == {}


def test_options_take_both_forms():
    assert _options(["a=1", "--config-dir", "x", "--config-dir=y"]) == (["a=1"], ["x", "y"], [])
    assert _options(["--import=u.py", "--import", "v", "a=1"]) == (["a=1"], [], ["u.py", "v"])
    with pytest.raises(UserError, match="--import needs a module: --import MODULE"):
        _options(["--import"])
    with pytest.raises(UserError, match="needs a folder"):
        _options(["--config-dir"])


_ISOLOSS = "config=pretrain/isoloss/digits"
_VOC = "benchmark/linear_image_classification/voc07/eval_resnet_8gpu_transfer_voc07_svm"
_KNN = "config=benchmark/nearest_neighbor/digits/knn"
_TRANSFORMS = "config.DATA.TRAIN.TRANSFORMS"
_LAYERS = "config.MODEL.FEATURE_EVAL_SETTINGS.LINEAR_EVAL_FEAT_POOL_OPS_MAP"
_LR = "config.OPTIMIZER.param_schedulers.lr"
_RESNETS = "config.MODEL.TRUNK.RESNETS"


@pytest.mark.sample("words0-*", "words22-*", "words48-*")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([_ISOLOSS, "config.OPTIMIZER.weight_decay=abc"], "config.OPTIMIZER.weight_decay must be a number, got 'abc'"),
        ([_ISOLOSS, "config.SEED_VALUE=true"], "config.SEED_VALUE must be a number, got True"),
        ([_ISOLOSS, "config.TEST_MODEL=maybe"], "config.TEST_MODEL must be true or false, got 'maybe'"),
        ([_ISOLOSS, "config.DATA.SKIP_BAD_IMAGES=1"], "config.DATA.SKIP_BAD_IMAGES must be true or false, got 1"),
        ([_ISOLOSS, "config.LOG_FREQUENCY=0"], "config.LOG_FREQUENCY must not be 0"),
        ([_ISOLOSS, "config.LOSS=isoloss"], "config.LOSS must be a mapping"),
        ([_ISOLOSS, "config.MACHINE.DEVICE=tpu"], "config.MACHINE.DEVICE: 'tpu' is unknown"),
        ([_ISOLOSS, "node_id=3"], "node_id must be below config.DISTRIBUTED.NUM_NODES=1"),
        ([_ISOLOSS, "engine_name=knn"], "engine_name=knn requires config.DATA.TRAIN.COLLATE_FUNCTION=default_collate"),
        ([_KNN, "engine_name=knn", "config.NEAREST_NEIGHBOR.TOPK=0"], "TOPK must be at least 1"),
        ([_KNN, "engine_name=knn", "config.TEST_MODEL=false"], "set config.TEST_MODEL=true"),
        # sections
        ([_ISOLOSS, "config.MODEL=3"], "config.MODEL must be a mapping, got 3"),
        ([_ISOLOSS, "~config.OPTIMIZER.param_schedulers.lr"], "config.OPTIMIZER.param_schedulers.lr is missing"),
        ([_ISOLOSS, "config.MODEL.HEAD.PARAMS=3"], "config.MODEL.HEAD.PARAMS must be a list, got 3"),
        ([_ISOLOSS, "node_id=abc"], "node_id must be an integer, got 'abc'"),
        ([_ISOLOSS, "config.DATA.NUM_DATALOADER_WORKERS=-1"], "must be at least 0, got -1"),
        ([_ISOLOSS, "config.METERS.name=foo"], "config.METERS: 'foo' is unknown; allowed: accuracy"),
        ([_ISOLOSS, "+config.OPTIMIZER.weight_decy=1"], "weight_decy; did you mean weight_decay?"),
        ([_ISOLOSS, "config.LOSS.byol.base_tau=0.5"], "config.LOSS.byol.base_tau has no effect"),
        # transforms
        ([_ISOLOSS, f"{_TRANSFORMS}=foo"], f"{_TRANSFORMS} must be a list, got 'foo'"),
        ([_ISOLOSS, f"{_TRANSFORMS}=[foo]"], "each entry must be {name: NAME, OPTION: VALUE, ...}, got 'foo'"),
        (
            [_ISOLOSS, f"{_TRANSFORMS}=[{{nam: Foo}}]"],
            "each entry must be {name: NAME, OPTION: VALUE, ...}, got {'nam':",
        ),
        ([_ISOLOSS, f"{_TRANSFORMS}=[{{name: Foo}}]"], "'Foo' is unknown; allowed: Img"),
        ([_ISOLOSS, f"{_TRANSFORMS}=[{{name: ToTenso}}]"], "'ToTenso' is unknown, did you mean 'ToTensor'?"),
        ([_ISOLOSS, f"+{_TRANSFORMS}.0.foo=1"], "option of ImgReplicatePil: 'foo' is unknown; allowed: num_times"),
        ([_ISOLOSS, f"{_TRANSFORMS}=[{{name: CenterCrop, size: [1,2,3]}}]"], "CenterCrop cannot be constructed with"),
        # layers
        ([_KNN, "engine_name=knn", f"{_LAYERS}=[[res9,[Identity,[]]]]"], "'res9' is unknown, did you mean 'res5'?"),
        ([_KNN, "engine_name=knn", f"{_LAYERS}=[[res5,[Idenity,[]]]]"], "did you mean 'Identity'?; allowed: Ada"),
        (
            [_KNN, "engine_name=knn", f"{_LAYERS}=[res5]"],
            "each entry must be [LAYER, [POOLING, [ARGUMENTS]]], got 'res5'",
        ),
        ([_KNN, "engine_name=knn", f"{_LAYERS}=[[res5,[AvgPool2d,[a]]]]"], "arguments of AvgPool2d must be numbers"),
        ([_KNN, "engine_name=knn", f"{_LAYERS}=[[res5,[AvgPool2d,[]]]]"], "AvgPool2d cannot be constructed with []"),
        (
            [_KNN, "engine_name=knn", f"{_LAYERS}=[[res5,[Identity,[]]],[res3,[Identity,[]]]]"],
            "must name the layers in the order of the network, res3, res5, got res5, res3",
        ),
        (
            [_KNN],
            "leaves nothing to train with engine_name=train; add engine_name=extract_features, or engine_name=knn",
        ),
        (["config=feature_extraction/digits/extract"], "leaves nothing to train with engine_name=train"),
        # engines of files that train nothing
        ([f"config={_VOC}"], "add engine_name=svm, or engine_name=svm_low_shot"),
        (["config=benchmark/instance_retrieval/eval_resnet_1gpu_roxford"], "add engine_name=retrieval"),
        (["config=pretrain/clusterfit/cluster_features_resnet_8gpu_imagenet"], "add engine_name=cluster"),
        # schedules and optimiser
        ([_ISOLOSS, f"{_LR}=0.1"], f"{_LR} must be a mapping"),
        ([_ISOLOSS, f"{_LR}.warmup=abc"], f"{_LR}.warmup must be a number, got 'abc'"),
        ([_ISOLOSS, f"{_LR}.lengths=[abc]"], f"{_LR}.lengths must be numbers, got ['abc']"),
        ([_ISOLOSS, f"{_LR}.auto_lr_scaling.base_value=[abc]"], "base_value must be a number, got"),
        ([_ISOLOSS, f"{_LR}.auto_lr_scaling.base_lr_batch_size=0"], "base_lr_batch_size must be above 0"),
        ([_ISOLOSS, f"{_LR}.name=foo"], f"{_LR}.name: 'foo' is unknown; allowed: composite, "),
        ([_ISOLOSS, f"+{_LR}.foo=1"], f"{_LR}: 'foo' is unknown; allowed: auto_lr_scaling, "),
        ([SIMCLR, f"{_LR}.schedulers.0.start_value=abc"], f"{_LR}.schedulers.0.start_value must be a number, got"),
        ([SIMCLR, f"{_LR}.name=cosine", f"{_LR}.start_value=0"], "cannot scale a cosine schedule with start_value=0"),
        ([_ISOLOSS, "config.OPTIMIZER.larc_config.eps=abc"], "larc_config.eps must be a number, got 'abc'"),
        (
            [_ISOLOSS, "+config.OPTIMIZER.larc_config.foo=1"],
            "larc_config: 'foo' is unknown; allowed: clip, eps, exclude",
        ),
        # model
        (
            [_ISOLOSS, f"+{_RESNETS}.CIFAR_STEN=true"],
            "option of plain_resnet: 'CIFAR_STEN' is unknown, did you mean 'CIFAR_STEM'?; allowed: CIFAR_STEM",
        ),
        ([_ISOLOSS, f"{_RESNETS}.CIFAR_STEM=1"], "CIFAR_STEM must be true or false, got 1"),
        ([SIMCLR, f"{_RESNETS}.CIFAR_STEM=true"], "option of resnet: 'CIFAR_STEM' is unknown; allowed: DEPTH"),
        ([SIMCLR, "config.MODEL.HEAD.PARAMS=[[mlp,{dim:[2,3]}]]"], "mlp cannot be constructed with {'dim': [2, 3]}"),
        ([SIMCLR, "config.MODEL.HEAD.PARAMS=[[mlp]]"], "must be a list of [NAME, {OPTIONS}], got the element ['mlp']"),
    ],
)
def test_invalid_values_raise_a_one_line_error(words, message):
    with pytest.raises(UserError, match=re.escape(message)):
        checked(*words)


def test_an_added_option_needs_no_plus():
    cfg, _ = compose([_ISOLOSS, "config.LOSS.isoloss.alpha=0.3", "config.MODEL.TRUNK.RESNETS.CIFAR_STEM=true"])
    assert cfg.config.LOSS.isoloss.alpha == 0.3 and cfg.config.MODEL.TRUNK.RESNETS.CIFAR_STEM is True
    assert "alpha" not in compose([_ISOLOSS])[0].config.LOSS.isoloss


def test_an_empty_list_is_an_error():
    with pytest.raises(UserError, match="no configuration with zzzz in its name"):
        main(["--list", "zzzz"])
    with pytest.raises(UserError, match="--config-dir: there is no folder nowhere"):
        main(["--list", "--config-dir", "nowhere"])


# CPU and GPU


def test_a_gpu_changes_nothing(gpu):
    cfg, given = compose([SIMCLR, "config.MODEL.SYNC_BN_CONFIG.SYNC_BN_TYPE=pytorch"])
    before = OmegaConf.to_container(cfg)
    assert adapt(cfg, given) == []
    assert OmegaConf.to_container(cfg) == before


def test_settings_that_need_a_gpu_are_changed_on_a_cpu_and_reported(no_gpu):
    cfg, given = compose([SIMCLR, "config.DISTRIBUTED.NUM_PROC_PER_NODE=2", "config.MODEL.SYNC_BN_CONFIG.GROUP_SIZE=1"])
    before = OmegaConf.to_container(cfg)
    changed = adapt(cfg, given)
    assert changed == [
        "MACHINE.DEVICE=cpu",
        "DISTRIBUTED.BACKEND=gloo",
        "DISTRIBUTED.NUM_NODES=1",
        "DISTRIBUTED.RUN_ID=auto",
        "DATA.PIN_MEMORY=false",
        "MODEL.SYNC_BN_CONFIG.CONVERT_BN_TO_SYNC_BN=false",
    ]
    assert cfg.config.DISTRIBUTED.NUM_PROC_PER_NODE == 2
    # nothing else, and nothing unsaid
    for text in changed:
        key = text.partition("=")[0]
        OmegaConf.update(cfg.config, key, OmegaConf.select(OmegaConf.create(before).config, key))
    assert OmegaConf.to_container(cfg) == before


@pytest.mark.sample("config.MACHINE.DEVICE=gpu-*")
@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("config.MACHINE.DEVICE=gpu", "config.MACHINE.DEVICE=gpu needs a GPU, but no GPU is available"),
        ("config.DISTRIBUTED.BACKEND=nccl", "config.DISTRIBUTED.BACKEND=nccl needs a GPU"),
        ("config.MODEL.AMP_PARAMS.USE_AMP=true", "USE_AMP=true needs a GPU"),
        ("config.MODEL.SYNC_BN_CONFIG.CONVERT_BN_TO_SYNC_BN=true", "CONVERT_BN_TO_SYNC_BN=true needs a GPU"),
        ("config.MODEL.FSDP_CONFIG.AUTO_SETUP_FSDP=true", "AUTO_SETUP_FSDP=true needs a GPU"),
    ],
)
def test_overrides_that_need_a_gpu_raise_an_error_on_a_cpu(no_gpu, override, text):
    with pytest.raises(UserError, match=re.escape(text)):
        adapt(*compose([SIMCLR, override]))


def test_apex_raises_an_error_if_it_is_not_installed(gpu):
    with pytest.raises(UserError, match=r"SYNC_BN_TYPE is apex, which is not installed; set .*SYNC_BN_TYPE=pytorch"):
        adapt(*compose([SIMCLR]))
    amp = ["config.MODEL.AMP_PARAMS.USE_AMP=true", "config.MODEL.AMP_PARAMS.AMP_TYPE=apex"]
    with pytest.raises(UserError, match="AMP_TYPE is apex, which is not installed"):
        adapt(*compose([SIMCLR, "config.MODEL.SYNC_BN_CONFIG.SYNC_BN_TYPE=pytorch", *amp]))


# errors


@pytest.mark.sample("overrides1-*", "overrides20-*", "overrides25-*")
@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ([SIMCLR, f"{LOSS}.temprature=1"], f"{LOSS}: 'temprature' is unknown, did you mean 'temperature'?"),
        ([SIMCLR, f"+{LOSS}.temprature=1"], "'temprature' is unknown, did you mean 'temperature'?"),
        ([SIMCLR, f"+{LOSS}.buffer_params.size=1"], f"{LOSS}.buffer_params: 'size' is unknown"),
        ([SIMCLR, f"{LOSS}.buffer_params=1"], "must be a mapping, got 1"),
        ([SIMCLR, "+config.LOSS.temperature=1"], "config.LOSS: 'temperature' is unknown"),
        ([SIMCLR, "config.LOSS.name=simclr_info_nce"], "did you mean 'simclr_info_nce_loss'?"),
        ([SIMCLR, "config.LOSS.name=MSELoss"], "there is no section config.LOSS.MSELoss"),
        ([SIMCLR, "config.LOSS.name=MSELoss", "+config.LOSS.MSELoss={reductio: sum}"], "did you mean 'reduction'?"),
        ([SIMCLR, "config.MODEL.HEAD.PARAMS=[[mpl,{dims:[1,2]}]]"], "'mpl' is unknown, did you mean 'mlp'?"),
        ([SIMCLR, "config.MODEL.HEAD.PARAMS=[[[mlp,{dims:[1,2]}],[nlp,{}]]]"], "'nlp' is unknown"),
        ([SIMCLR, "config.MODEL.HEAD.PARAMS=[mlp]"], "must be a list of [NAME, {OPTIONS}]"),
        ([SIMCLR, "config.MODEL.TRUNK.NAME=resnt"], "'resnt' is unknown, did you mean 'resnet'?"),
        ([SIMCLR, "config.OPTIMIZER.name=sdg"], "did you mean 'sgd'?"),
        ([SIMCLR, "engine_name=trian"], "did you mean 'train'?"),
        ([SIMCLR, "config.DATA.TRAIN.TRANSFORMS.0.name=Foo"], "TRANSFORMS: 'Foo' is unknown"),
        ([SIMCLR, "config.DATA.TRAIN.COLLATE_FUNCTION=foo"], "COLLATE_FUNCTION: 'foo' is unknown"),
        ([SIMCLR, "config.DISTRIBUTED.NUM_PROC_PER_NODE=0"], "must be an integer, at least 1, got 0"),
        (["config=pretrain/simclr/simclr_8nodes_resnet"], "did you mean pretrain/simclr/simclr_8node_resnet?"),
        (["config=isolos"], "'isolos'; did you mean pretrain/isoloss/cifar or pretrain/isoloss/digits or"),
        ([SIMCLR, "config.SEED_VALUE=???"], "config.SEED_VALUE has no value (???)"),
        ([SIMCLR, "config.SEED_VALUE=${nowhere}"], "config.SEED_VALUE: Interpolation key 'nowhere' not found"),
        (["config=simclr_8node_resnet"], "did you mean pretrain/simclr/simclr_8node_resnet?"),
        (["config.SEED_VALUE=1"], "there is no config=NAME"),
        (
            [SIMCLR, "config.DATA.TRAIN.DATA_PATHS=[/a"],
            "cannot parse 'config.DATA.TRAIN.DATA_PATHS=[/a': write a list as [A,B]",
        ),
        (
            [SIMCLR, "config.CHECKPOINT.DIR='a (b)"],
            """quote a value with special characters, 'config.CHECKPOINT.DIR="'a (""",
        ),
        ([SIMCLR, "foo"], "'foo' is not a valid argument: write KEY=VALUE, such as config=NAME"),
        ([SIMCLR, "+config/foo=bar"], "there is no folder of configurations config/foo"),
        ([SIMCLR, "+FOO=1"], "FOO is not an option of VISSL; write +config.FOO=VALUE"),
        (
            ["config=pretrain/isoloss/digits", "config.LOSS.isoloss.alpah=1"],
            "config.LOSS.isoloss: 'alpah' is unknown, did you mean 'alpha'?; allowed: alpha, base_tau",
        ),
        (
            ["config=pretrain/isoloss/digits", "config.LOSS.isoloss.foo=1"],
            "config.LOSS.isoloss: 'foo' is unknown; allowed: alpha, base_tau",
        ),
        ([SIMCLR, "config.OPTIMZER.num_epochs=1"], "config: 'OPTIMZER' is unknown, did you mean 'OPTIMIZER'?"),
        ([SIMCLR, "config.OPTIMIZER.foo.lr=1"], "unknown; write +config.OPTIMIZER.foo.lr=VALUE to add it"),
        ([SIMCLR, f"{_TRANSFORMS}.0.total_num_crops=3"], "ImgReplicatePil: 'total_num_crops' is unknown; allowed: num"),
        ([SIMCLR, f"~{_TRANSFORMS}.1"], f"~{_TRANSFORMS}.1: an element of a list cannot be removed by an override; "),
        ([SIMCLR, f"{_TRANSFORMS}.one.size=3"], "elements of a list are numbers, as in KEY.0=VALUE: Index 'one'"),
        ([SIMCLR, f"{_TRANSFORMS}.40.size=3"], f"Error merging override {_TRANSFORMS}.40.size=3 list index out of"),
        (
            [SIMCLR, f"{_TRANSFORMS}.0.num_times=3"],
            "simclr_info_nce_loss takes 2 views of each image, but ",
        ),
        (
            [SIMCLR, f"{_TRANSFORMS}.0.num_times=1"],
            "makes 1: change num_times of ImgReplicatePil or num_crops",
        ),
    ],
)
def test_invalid_overrides_raise_a_one_line_error(overrides, text):
    with pytest.raises(UserError, match=re.escape(text)) as caught:
        checked(*overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"config:\n  SEED_VALUE: [1\n  B: 2\n", "a configuration is not valid YAML: while parsing a flow sequence"),
        ("config:\n  SEED_VALUE: 1 # \u00e9\n".encode("latin-1"), "mine.yaml is not valid UTF-8"),
        (b"config:\n  MINE: ???\n", r"config\.MINE has no value \(\?\?\?\)"),
        (b"- a\n", "Cannot merge DictConfig with ListConfig"),
    ],
)
def test_invalid_files_of_the_user_raise_a_one_line_error(text: bytes, message: str, tmp_path: Path):
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "mine.yaml").write_bytes(b"# @package _global_\n" + text)
    with pytest.raises(UserError, match=message) as caught:
        check_sections(compose(["config=mine"], [str(tmp_path)])[0])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "read"),
    [
        ("[~/photos]", ["~/photos"]),
        ("[/a=b,~/c d, /plain]", ["/a=b", "~/c d", "/plain"]),
        ("['~/x']", ["~/x"]),
        ("[]", []),
    ],
)
def test_paths_need_no_quotes(value: str, read: list[str]):
    cfg, given = compose([SIMCLR, f"config.DATA.TRAIN.DATA_PATHS={value}", "config.CHECKPOINT.DIR=~/runs/ep=1"])
    assert list(cfg.config.DATA.TRAIN.DATA_PATHS) == given["DATA.TRAIN.DATA_PATHS"] == read
    assert cfg.config.CHECKPOINT.DIR == "~/runs/ep=1"


def test_the_home_folder_may_be_written_as_a_tilde(few_digits: Path, tmp_path: Path, monkeypatch, no_gpu):
    """The example of --help has a tilde."""
    monkeypatch.setenv("HOME", str(few_digits))
    config = prepare([_ISOLOSS, "config.DATA.TRAIN.DATA_PATHS=[~/train]", f"config.CHECKPOINT.DIR={tmp_path}"], [])[1]
    assert [str(few_digits / "train")] == config.DATA.TRAIN.DATA_PATHS


def test_more_classes_than_outputs_raise_an_error(few_digits: Path, tmp_path: Path, no_gpu):
    data = [f"config.DATA.{split}.DATA_PATHS=[{few_digits / 'train'}]" for split in ("TRAIN", "TEST")]
    words = ["config=benchmark/linear_image_classification/digits/eval_resnet8_linear", *data]
    head = "config.MODEL.HEAD.PARAMS=[[eval_mlp,{in_channels:64,dims:[64,5]}]]"
    with pytest.raises(UserError, match=r"config\.MODEL\.HEAD\.PARAMS is empty: the loss needs a head"):
        prepare([*words, "config.MODEL.HEAD.PARAMS=[]", f"config.CHECKPOINT.DIR={tmp_path}"], [])
    with pytest.raises(UserError, match=r"DATA.TRAIN has 10 classes, but the head in .* has 5 outputs"):
        prepare([*words, head, f"config.CHECKPOINT.DIR={tmp_path}"], [])


@pytest.mark.sample("pickle")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text", "is not a file of torch.save that contains only weights"),
        (pickle.dumps({"a": 1}), "is not a file of torch.save that contains only weights"),
        ([1, 2], "must contain a mapping name → weight, got a list"),
        ({"state_dict": {}}, "STATE_DICT_KEY_NAME is classy_state_dict, but .* has the keys state_dict"),
        ({"classy_state_dict": {"base_model": {}}}, "is not a complete checkpoint of VISSL"),
    ],
    ids=["text", "pickle", "list", "state dict", "half"],
)
def test_files_without_weights_raise_an_error(content: Any, message: str, few_digits: Path, tmp_path, no_gpu):
    path = tmp_path / "weights.torch"
    if isinstance(content, str | bytes):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    else:
        torch.save(content, path)
    words = [f"config.DATA.TRAIN.DATA_PATHS=[{few_digits / 'train'}]", f"config.CHECKPOINT.DIR={tmp_path / 'run'}"]
    with pytest.raises(UserError, match=message):
        prepare([_ISOLOSS, *words, f"config.MODEL.WEIGHTS_INIT.PARAMS_FILE={path}"], [])
    assert not (tmp_path / "run").exists()


def test_without_slurm_a_file_for_slurm_runs_here(monkeypatch):
    cfg, given = compose([SIMCLR])
    cfg.config.SLURM.USE_SLURM = True
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/sbatch")
    assert without_slurm(cfg.config, given) == "" and cfg.config.SLURM.USE_SLURM
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "SLURM is not installed" in without_slurm(cfg.config, given) and not cfg.config.SLURM.USE_SLURM
    with pytest.raises(UserError, match="needs SLURM, but the program sbatch is not installed"):
        without_slurm(*[(cfg := compose([SIMCLR, "config.SLURM.USE_SLURM=true"]))[0].config, cfg[1]])


def test_a_folder_without_configurations_raises_an_error(tmp_path):
    with pytest.raises(UserError, match="a subfolder 'config'"):
        compose([SIMCLR], [str(tmp_path)])


@pytest.mark.slow
def test_commands(few_digits: Path, tmp_path: Path, launches: Callable, no_gpu):
    data = f"config.DATA.TRAIN.DATA_PATHS=[{few_digits / 'train'}]"
    small = [
        *(SIMCLR, data, "config.DATA.TRAIN.DATA_LIMIT=16", "config.DATA.TRAIN.BATCHSIZE_PER_REPLICA=8"),
        *("config.OPTIMIZER.num_epochs=1", "config.DATA.NUM_DATALOADER_WORKERS=0"),
        "config.DATA.TRAIN.TRANSFORMS.1.size=32",
    ]
    torch.save({"schedule": partial(print)}, tmp_path / "code.torch")
    (tmp_path / "torn.torch").write_bytes((tmp_path / "code.torch").read_bytes()[:-30])
    params = "config.MODEL.WEIGHTS_INIT.PARAMS_FILE"
    rate = "config.OPTIMIZER.param_schedulers.lr.auto_lr_scaling.base_value=1e25"
    wrong = {
        "the catalogue has nothing": ([SIMCLR], "'imagenet1k_folder' is in no data set catalogue"),
        "no such folder": ([SIMCLR, "config.DATA.TRAIN.DATA_PATHS=[/nowhere]"], "is neither a folder nor"),
        "steps for more epochs": (
            ["config=pretrain/moco/moco_1node_resnet", data, "config.OPTIMIZER.num_epochs=2"],
            "VISSL rejects the configuration: Total num_updates",
        ),
        "test without data": ([SIMCLR, data, "config.TEST_MODEL=true"], "config.DATA.TEST has no data"),
        "no weights": ([*small, f"{params}=none.torch"], f"{params}: there is no file none.torch"),
        "weights that name code": (
            [*small, f"{params}=code.torch"],
            "code.torch contains builtins.print, functools.partial, which could run code",
        ),
        "half of the weights": (
            [*small, f"{params}=torn.torch"],
            "torn.torch is incomplete, or was not written by torch.save",
        ),
        "unwritable": ([*small, "config.CHECKPOINT.DIR=/dev/null/x"], "CHECKPOINT.DIR cannot be written to"),
        "unknown option": ([SIMCLR, "--foo"], "unknown option --foo; see --help"),
    }
    right = {
        "help": ["--help"],
        "list": ["--list", "swav_8"],
        "once": [*small, "config.CHECKPOINT.DIR=run"],
        "again": [*small, "config.CHECKPOINT.DIR=run"],
    }
    jobs = (
        [argv for argv, _ in wrong.values()] + list(right.values()) + [[*small, rate, "config.CHECKPOINT.DIR=nan"], []]
    )
    results = launches([{"argv": argv, "folder": str(tmp_path)} for argv in jobs])
    for (name, (_, text)), result in zip(wrong.items(), results, strict=False):
        assert result["status"] == 2, (name, result["output"])
        assert text in result["output"] and len(result["output"].splitlines()) == 1, (name, result["output"])
    *_, diverged, empty = results
    named = dict(zip(right, results[len(wrong) :], strict=False))
    assert all(result["status"] == 0 for result in named.values()), named
    assert named["help"]["output"].strip() == USAGE.strip() == empty["output"].strip()
    assert empty["status"] == 2
    assert named["list"]["output"].split() == ["pretrain/swav/swav_8node_resnet"]
    lines = named["once"]["output"].splitlines()
    assert lines[0].startswith("on the CPU: MACHINE.DEVICE=cpu, ")
    shown = [line.split("  ")[1] for line in lines if line.startswith("epoch 1/1")]
    assert shown[0] == "iteration 1/2" and len(shown) == 2
    assert "the training is finished after 1 epoch;" in named["again"]["output"]
    assert diverged["status"] == 2 and "error: training diverged: " in diverged["output"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["code.torch", "nan", "run", "torn.torch"], (
        "a run with an error left files behind"
    )


@pytest.mark.slow
def test_invalid_images_raise_a_one_line_error(few_digits: Path, tmp_path: Path, launches: Callable, no_gpu):
    torn = tmp_path / "torn"
    (torn / "0").mkdir(parents=True)
    for path in (few_digits / "train").glob("0/*.png"):
        (torn / "0" / path.name).write_bytes(path.read_bytes()[:-40])
    common = ["config=pretrain/byol/digits", "config.OPTIMIZER.num_epochs=1", "config.MACHINE.DEVICE=cpu"]
    mistakes = {
        "config.DATA.TRAIN.BATCHSIZE_PER_REPLICA=512 is larger than the number of training images": [
            *(f"config.DATA.TRAIN.DATA_PATHS=[{few_digits / 'train'}]", "config.DATA.TRAIN.BATCHSIZE_PER_REPLICA=512"),
        ],
        f"{torn}/0/": [
            *(f"config.DATA.TRAIN.DATA_PATHS=[{torn}]", "config.DATA.TRAIN.BATCHSIZE_PER_REPLICA=4"),
        ],
        f"{torn}/0/0": [
            *(f"config.DATA.TRAIN.DATA_PATHS=[{torn}]", "config.DATA.TRAIN.BATCHSIZE_PER_REPLICA=4"),
            *("config.DATA.NUM_DATALOADER_WORKERS=1", "config.MULTI_PROCESSING_METHOD=fork"),
        ],
        "config.DATA.TRAIN has the label ": [  # from no file: the numbers of the images
            *(f"config.DATA.TRAIN.DATA_PATHS=[{few_digits / 'train'}]", "config.DATA.TRAIN.LABEL_TYPE=sample_index"),
            *("config.LOSS.name=CrossEntropyLoss", "+config.LOSS.CrossEntropyLoss={reduction:mean}"),
            *("config.MODEL.HEAD.PARAMS=[[mlp,{dims:[64,5]}]]", "config.DATA.TRAIN.BATCHSIZE_PER_REPLICA=16"),
            *("config.DATA.TRAIN.TRANSFORMS=[{name:Resize,size:[8,8]},{name:ToTensor}]", "config.METERS.name=''"),
            "config.DATA.TRAIN.COLLATE_FUNCTION=default_collate",
        ],
    }
    results = launches(
        [
            {"argv": [*common, *words, f"config.CHECKPOINT.DIR={tmp_path / str(number)}"], "folder": str(tmp_path)}
            for number, words in enumerate(mistakes.values())
        ]
    )
    for sentence, result in zip(mistakes, results, strict=True):
        assert result["status"] == 2, result["output"][-3000:]
        errors = [line for line in result["output"].splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and errors[0].startswith(f"error: {sentence}"), result["output"]
        assert "Traceback" not in result["output"]


# progress


def _task(**more):
    options = SimpleNamespace(lr=[0.1, 0.3])
    task = SimpleNamespace(train=True, iteration=0, max_iteration=20, train_phase_idx=0, num_train_phases=2, meters=[])
    vars(task).update(
        dataloaders={"train": range(10), "test": range(4)}, optimizer=SimpleNamespace(options_view=options)
    )
    vars(task).update(config={"METERS": {"enable_training_meter": True}}, checkpoint_folder="runs/x", **more)
    return task


def test_lines_come_at_growing_intervals(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr("vissl_ext.progress.time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr("sys.stderr", SimpleNamespace(isatty=lambda: False))
    task, progress = _task(), Progress()
    progress.on_start(task)
    progress.on_phase_start(task)
    for step in range(10):
        now += 4.0
        task.iteration = step + 1
        task.last_batch = SimpleNamespace(loss=torch.tensor(float(step)))
        progress.on_step(task)
    task.meters = [SimpleNamespace(value={"top_1": {"0": 12.5}, "top_5": {"a": 50.0, "b": 75.0}})]
    progress.on_phase_end(task)
    progress.on_end(task)
    # shown at 4 s, then 5, 7.5 and 11.25 s later or more, in steps of 4 s
    assert capsys.readouterr().out.splitlines() == [
        "epoch 1/2  iteration 1/10  loss 0.0000  lr 0.3  ETA 0:01:16",
        "epoch 1/2  iteration 3/10  loss 2.0000  lr 0.3  ETA 0:01:08",
        "epoch 1/2  iteration 5/10  loss 4.0000  lr 0.3  ETA 0:01:00",
        "epoch 1/2  iteration 8/10  loss 7.0000  lr 0.3  ETA 0:00:48",
        "epoch 1/2  train loss 4.5000  train top_1 12.5  train top_5 a 50  train top_5 b 75  lr 0.3  after 0:00:40",
        "finished; checkpoints and log.txt are in runs/x",
    ]


def test_nothing_is_set_aside_in_a_new_folder(tmp_path):
    assert set_aside(tmp_path / "new") == []
