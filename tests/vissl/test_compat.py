"""Patches of vissl_ext.compat: each test fails if the patch is no longer needed, or no longer works."""

import json
import os
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from plugins.testing import spoil
from plugins.tools.bad_images import BadImages
from plugins.tools.command import UserError
from vissl_ext import compat
from vissl_ext.compat import folder_images, import_warnings
from vissl_ext.compat.checkpoints import set_aside
from vissl_ext.compat.cuda_calls import stay_on_cpu
from vissl_ext.compat.restored_losses import RestoreLoss

pytestmark = pytest.mark.vissl
ROOT = Path(__file__).parents[2]

_BARE = """
import json, sys, types, warnings
said = {}
def attempt(name, code):
    try:
        exec(code, {})
        said[name] = "ran"
    except Exception as error:
        said[name] = f"{type(error).__name__}: {error}"
with warnings.catch_warnings(record=True) as heard:
    warnings.simplefilter("always")
    attempt("misc", "import vissl.utils.misc")
    attempt("collect_env", "import vissl.utils.collect_env")
    stand_in = sys.modules["pkg_resources"] = types.ModuleType("pkg_resources")
    stand_in.resource_filename = lambda package, name: name
    attempt("kinetics", "import classy_vision.dataset.classy_kinetics400")
    import torchvision.datasets.kinetics as kinetics
    kinetics.Kinetics400 = kinetics.Kinetics
    attempt("svm", "from vissl.utils.svm_utils.evaluate import get_precision_recall as g; import numpy as np;"
                   "g(np.ones(2), np.ones(2))")
    attempt("nan", "from vissl.hooks import CheckNanModelOutputHook as H; H._checkpoint_model")
    attempt("rmac", "import torch; from vissl.utils.instance_retrieval_utils.rmac import get_rmac_descriptors as g;"
                    "g(torch.ones(1, 3, 4, 4), 2)")
    attempt("amp", "import torch; torch.cuda.amp.GradScaler(); torch.cuda.amp.autocast()")
said["warnings"] = [str(warning.message) for warning in heard]
json.dump(said, sys.stdout)
"""


@pytest.fixture(scope="module")
def bare() -> dict:
    """Return the errors and warnings of VISSL without patches."""
    process = subprocess.run([sys.executable, "-P", "-c", _BARE], capture_output=True, text=True, check=True)
    return json.loads(process.stdout)


@pytest.mark.slow
def test_pkg_resources_is_needed(bare):
    assert bare["misc"] == bare["collect_env"] == "ModuleNotFoundError: No module named 'pkg_resources'"
    import pkg_resources
    from vissl.utils.misc import get_json_data_catalog_file

    assert get_json_data_catalog_file().endswith("configs/config/dataset_catalog.json")
    assert pkg_resources.get_distribution("vissl").version == "0.1.6"
    with pytest.raises(pkg_resources.DistributionNotFound):
        pkg_resources.get_distribution("no such thing")


@pytest.mark.slow
def test_kinetics400_is_needed(bare):
    assert bare["kinetics"].startswith("ImportError: cannot import name 'Kinetics400'")
    import classy_vision.dataset.classy_kinetics400  # noqa: F401


@pytest.mark.slow
def test_numpy_names_are_needed(bare):
    assert "has no attribute 'float'" in bare["svm"]
    assert "has no attribute 'int'" in bare["rmac"]
    from vissl.utils.instance_retrieval_utils.rmac import get_rmac_descriptors
    from vissl.utils.svm_utils.evaluate import get_precision_recall

    # one positive before one negative: every positive is found first
    assert get_precision_recall(np.array([1, 0]), np.array([0.9, 0.1]))[3] == pytest.approx(1.0)
    # the whole map and its four quarters, three channels each
    assert torch.as_tensor(get_rmac_descriptors(torch.ones(1, 3, 4, 4), 2)).numel() == 5 * 3
    assert np.in1d([1, 2], [2]).tolist() == [False, True] and np.bool is not None


@pytest.mark.slow
def test_import_warnings_are_left_out(bare):
    amp = ("cuda.amp.autocast", "cuda.amp.GradScaler")
    for text in ("_functional_video", "_transforms_video", "torch.jit.script", *amp):
        assert any(text in message for message in bare["warnings"]), text
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        import_warnings.activate()
        torch.cuda.amp.GradScaler(), torch.cuda.amp.autocast()
    assert not [warning for warning in heard if "deprecated" in str(warning.message)]
    process = subprocess.run(
        [sys.executable, "-P", "-m", "vissl_ext.launch", "config=pretrain/nothing"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 2
    assert process.stdout == "" and len(process.stderr.splitlines()) == 1 and process.stderr.startswith("error: ")


@pytest.mark.slow
def test_nan_output_is_needed(bare):
    assert bare["nan"].startswith("AttributeError")
    from vissl.hooks import CheckNanModelOutputHook

    output = SimpleNamespace(model_output=torch.tensor([1.0, float("nan")]))
    with pytest.raises(FloatingPointError, match="iteration 8"):
        CheckNanModelOutputHook().on_forward(SimpleNamespace(last_batch=output, iteration=7))


def test_activating_twice_has_no_effect():
    from vissl.utils import checkpoint

    before = checkpoint.get_resume_checkpoint, sys.modules["pkg_resources"]
    compat.activate()
    assert before == (checkpoint.get_resume_checkpoint, sys.modules["pkg_resources"])


# checkpoints


class _Killed(BaseException):
    pass


def _half_written(state, file):
    file.write(b"PK half of it")
    raise _Killed


def test_vissl_leaves_an_incomplete_checkpoint_and_the_patch_does_not(tmp_path, monkeypatch):
    from classy_vision.generic.util import save_checkpoint
    from vissl.utils.checkpoint import CheckpointWriter, has_final_checkpoint

    monkeypatch.setattr(torch, "save", _half_written)
    for folder in ("stock", "ours"):
        (tmp_path / folder).mkdir()
    with pytest.raises(_Killed):
        save_checkpoint(str(tmp_path / "stock"), {}, "model_final_checkpoint_phase0.torch")
    assert has_final_checkpoint(str(tmp_path / "stock")), "mended upstream"
    writer = CheckpointWriter(str(tmp_path / "ours"), True, "phase", 0, "disk")
    with pytest.raises(_Killed):
        writer.save_consolidated_checkpoint({})
    assert list((tmp_path / "ours").iterdir()) == []


def test_checkpoint_and_link_can_be_moved_with_their_folder(tmp_path, monkeypatch):
    from vissl.utils.checkpoint import CheckpointWriter

    monkeypatch.chdir(tmp_path)
    for number in (0, 1):
        CheckpointWriter("run", False, "phase", number, "disk").save_consolidated_checkpoint({"number": number})
    (tmp_path / "run").rename(tmp_path / "moved")
    assert torch.load(tmp_path / "moved" / "checkpoint.torch", weights_only=True)["number"] == 1
    names = sorted(path.name for path in (tmp_path / "moved").iterdir())
    assert names == ["checkpoint.torch", "model_phase0.torch", "model_phase1.torch"]


def test_half_written_checkpoints_are_set_aside(tmp_path):
    for number in (0, 1):
        torch.save({"number": number}, tmp_path / f"model_phase{number}.torch")
        os.utime(tmp_path / f"model_phase{number}.torch", (number, number))  # VISSL takes the newest
    whole = (tmp_path / "model_phase1.torch").read_bytes()
    (tmp_path / "model_phase2.torch").write_bytes(whole[:-30])
    (tmp_path / "model_final_checkpoint_phase3.torch").write_bytes(b"")
    torch.save({}, tmp_path / "model_phase4.torch", _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(tmp_path / "model_phase4.torch")
    assert set_aside(tmp_path) == ["model_final_checkpoint_phase3.torch", "model_phase2.torch"]
    assert sorted(path.name for path in tmp_path.glob("*")) == [
        "model_phase0.torch",
        "model_phase1.torch",
        "model_phase4.torch",
        "torn_final_checkpoint_phase3.torch.broken",
        "torn_phase2.torch.broken",
    ]
    (tmp_path / "model_phase4.torch").unlink()
    from vissl.utils.checkpoint import get_resume_checkpoint

    assert get_resume_checkpoint(_resume_config(-1), str(tmp_path)) == str(tmp_path / "model_phase1.torch")
    assert set_aside(tmp_path) == []


def _resume_config(every: int):
    from vissl.config import AttrDict

    options = {"OVERWRITE_EXISTING": False, "AUTO_RESUME": True, "LATEST_CHECKPOINT_RESUME_FILE_NUM": 1}
    return AttrDict({"CHECKPOINT": {**options, "CHECKPOINT_ITER_FREQUENCY": every}})


def test_resumes_from_the_newest_checkpoint_of_either_kind(tmp_path):
    from vissl.utils.checkpoint import get_resume_checkpoint

    for age, name in enumerate(("model_iteration9", "model_phase1", "model_iteration30")):
        if age == 2:
            assert get_resume_checkpoint(_resume_config(5), str(tmp_path)) == f"{tmp_path}/model_phase1.torch"
        (tmp_path / f"{name}.torch").write_bytes(b"x")
        os.utime(tmp_path / f"{name}.torch", (age, age))
    assert get_resume_checkpoint(_resume_config(5), str(tmp_path)) == f"{tmp_path}/model_iteration30.torch"
    assert get_resume_checkpoint(_resume_config(-1), str(tmp_path)) == f"{tmp_path}/model_phase1.torch"


def test_a_dump_is_no_checkpoint_to_resume_from(tmp_path):
    from vissl.utils.checkpoint import get_resume_checkpoint

    (tmp_path / "model_iteration9.torch").write_bytes(b"x")
    stock = get_resume_checkpoint.__wrapped__(_resume_config(-1), str(tmp_path))
    assert stock == f"{tmp_path}/None", "mended upstream"
    assert get_resume_checkpoint(_resume_config(-1), str(tmp_path)) is None


# one training


def test_cuda_calls_stay_on_the_cpu():
    from vissl.losses.nce_loss import NumpySampler

    if torch.cuda.is_available():
        assert NumpySampler(5).draw(3).is_cuda
    else:
        with pytest.raises((AssertionError, RuntimeError)):
            NumpySampler(5).draw(3)
    layer = torch.nn.SyncBatchNorm(2)
    rows = torch.tensor([[1.0, 5.0], [3.0, 9.0]])
    with stay_on_cpu():
        assert NumpySampler(5).draw(3).device.type == "cpu"
        assert rows.to("cuda") is rows and rows.to(torch.float64).dtype == torch.float64
        # mean 2 and 7, standard deviation 1 and 2
        torch.testing.assert_close(layer(rows), torch.tensor([[-1.0, -1.0], [1.0, 1.0]]), atol=1e-4, rtol=0)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="GPU"):
            layer(rows)
    finally:
        torch.distributed.destroy_process_group()


def test_momentum_encoder_of_a_resumed_run_makes_its_first_step(monkeypatch):
    from vissl.hooks import MoCoHook

    steps = []
    monkeypatch.setattr(MoCoHook, "_update_momentum_encoder", lambda self, task: steps.append(task))
    monkeypatch.setattr(
        MoCoHook, "_build_moco_encoder", lambda self, task: setattr(task.loss, "moco_encoder", lambda x: [x])
    )

    def resumed():
        batch = SimpleNamespace(sample={"data_momentum": [torch.ones(2, 3)]})
        loss = SimpleNamespace(moco_encoder=None, checkpoint={}, key=None)
        return SimpleNamespace(loss=loss, last_batch=batch, checkpoint={"loss": {}})

    task, hook = resumed(), MoCoHook(0.5)
    hook.on_forward(task)
    assert steps == [], "mended upstream"
    task = resumed()
    RestoreLoss([hook]).on_start(task)
    hook.on_forward(task)
    assert steps == [task]


def test_a_new_run_builds_no_momentum_encoder_early():
    task = SimpleNamespace(loss=SimpleNamespace(moco_encoder=None, checkpoint=None), checkpoint=None)
    RestoreLoss([]).on_start(task)
    assert task.loss.moco_encoder is None


@pytest.mark.parametrize(("steps", "used"), [(3, False), (4, True)])
def test_the_queue_of_swav_is_used_from_a_resumed_runs_first_step(steps, used):
    """VISSL begins to use it in the fourth step, whose number is start_iter, and its hook looks before the step."""
    criterion = SimpleNamespace(local_queue_length=16, num_iteration=torch.tensor([steps]), use_queue=False)
    loss = SimpleNamespace(swav_criterion=criterion, queue_start_iter=3)
    RestoreLoss([]).on_start(SimpleNamespace(loss=loss, checkpoint={"loss": {}}))
    assert criterion.use_queue is used


def test_folder_images_are_needed(tmp_path, monkeypatch):
    """Each image is decoded once, where VISSL alone does it twice; a torn one is a sentence with its path."""
    from PIL import Image
    from torchvision.datasets import ImageFolder, folder
    from vissl.config import AttrDict
    from vissl.data import disk_dataset

    (tmp_path / "0").mkdir()
    for index in range(3):
        noise = np.random.default_rng(index).integers(256, size=(16, 16, 3), dtype=np.uint8)
        noise[0, 0, 0] = index
        Image.fromarray(noise).save(tmp_path / "0" / f"{index}.png")
    read = []
    stock = folder.pil_loader
    monkeypatch.setattr(folder, "pil_loader", lambda path: (read.append(Path(path).name), stock(path))[1])
    ours_read = folder_images.open_image
    monkeypatch.setattr(folder_images, "open_image", lambda path: (read.append(Path(path).name), ours_read(path))[1])
    keys = ("REMOVE_IMG_PATH_PREFIX", "NEW_IMG_PATH_PREFIX")
    data = {**dict.fromkeys(keys, ""), "ENABLE_QUEUE_DATASET": False, "BATCHSIZE_PER_REPLICA": 2}
    cfg = AttrDict({"DATA": {"TRAIN": data}})

    def images():
        return disk_dataset.DiskImageDataset(cfg, "disk_folder", str(tmp_path), "TRAIN", "it")

    ours = images()
    assert [ours[index][0].getpixel((0, 0))[0] for index in (1, 1, 0, 2)] == [1, 1, 0, 2]
    assert read == ["1.png", "1.png", "0.png", "2.png"]
    whole = (tmp_path / "0" / "1.png").read_bytes()
    for part in (whole[:20], whole[: len(whole) // 2], b""):
        (tmp_path / "0" / "1.png").write_bytes(part)
        with pytest.raises(UserError, match=rf"{tmp_path}/0/1\.png cannot be read as an image: "):
            ours[1]
    read.clear()
    monkeypatch.setattr(disk_dataset, "ImageFolder", ImageFolder)
    images()[0]
    assert read == ["0.png", "0.png"]


@pytest.mark.parametrize("queue", [False, True])
def test_a_bad_image_of_a_folder_is_replaced_and_recorded_if_asked(queue, tmp_path):
    """Also if the queue of seen images provides the image in its place, and if it is read twice in succession."""
    from PIL import Image
    from vissl.config import AttrDict
    from vissl.data import disk_dataset

    (tmp_path / "0").mkdir()
    for index in range(3):
        Image.new("RGB", (24, 24), (index, 0, 0)).save(tmp_path / "0" / f"{index}.png")
    bad = spoil(tmp_path / "0" / "2.png")
    keys = ("REMOVE_IMG_PATH_PREFIX", "NEW_IMG_PATH_PREFIX")
    data = {**dict.fromkeys(keys, ""), "ENABLE_QUEUE_DATASET": queue, "BATCHSIZE_PER_REPLICA": 1}
    data["DEFAULT_GRAY_IMG_SIZE"] = 24
    cfg = AttrDict({"DATA": {"TRAIN": data, "SKIP_BAD_IMAGES": True}, "CHECKPOINT": {"DIR": str(tmp_path)}})
    images = disk_dataset.DiskImageDataset(cfg, "disk_folder", str(tmp_path), "TRAIN", "it")
    assert images[1][0].getpixel((0, 0))[0] == 1
    assert [images[2][1] for _ in range(2)] == [queue, False]  # the queue has one image
    assert BadImages(tmp_path).names() == [str(bad)]
    cfg.DATA.SKIP_BAD_IMAGES = False
    with pytest.raises(UserError, match=r"2\.jpg cannot be read as an image: "):
        images[2]


def test_broadcasts_are_needed(tmp_path, monkeypatch):
    """Without the patch each byte of a checkpoint becomes a Python integer, even with one process."""
    from classy_vision.generic import distributed_util, util

    made = []
    stock = torch.ByteTensor
    monkeypatch.setattr(torch, "ByteTensor", lambda data: (made.append(type(data)), stock(data))[1])
    torch.save({"weight": torch.arange(3)}, tmp_path / "checkpoint.torch")
    assert torch.equal(util.load_and_broadcast_checkpoint(str(tmp_path))["weight"], torch.arange(3))
    assert made == []
    distributed_util.broadcast_object({})
    assert made == [memoryview]


@pytest.mark.parametrize("again", [False, True])
def test_data_are_copied_to_a_folder_of_their_own(again, tmp_path, monkeypatch):
    """VISSL's way fails, and deletes what else is in the destination."""
    from vissl.config import AttrDict
    from vissl.data import dataset_catalog
    from vissl.utils import distributed_launcher

    source, place = tmp_path / "digits", tmp_path / "local"
    (source / "0").mkdir(parents=True)
    (source / "0" / "a.png").write_text("a")
    (source / "0" / "up").symlink_to(source)
    place.mkdir()
    (place / "mine").write_text("mine")
    paths = {"DATA_PATHS": [str(source)], "DATA_SOURCES": ["disk_folder"], "DATASET_NAMES": ["x"]}
    data = {**paths, "LABEL_PATHS": [str(source)], "COPY_TO_LOCAL_DISK": True, "COPY_DESTINATION_DIR": str(place)}
    config = AttrDict({"DATA": {"TRAIN": data, "TEST": {"COPY_TO_LOCAL_DISK": False}}})
    monkeypatch.delenv("SLURM_JOBID", raising=False)
    for _ in range(1 + again):
        config.DATA.TRAIN.COPY_DESTINATION_DIR = str(place)
        distributed_launcher._copy_to_local(config)
    files, _ = dataset_catalog.get_data_files("TRAIN", config.DATA)
    assert files == [str(place / "train" / "digits")]
    copied = sorted(path.relative_to(files[0]).as_posix() for path in Path(files[0]).rglob("*") if path.is_file())
    assert copied == ["0/a.png", "copy_complete"]
    distributed_launcher._cleanup_local_dir(config)
    assert [path.name for path in place.iterdir()] == ["mine"] and (source / "0" / "a.png").is_file()
