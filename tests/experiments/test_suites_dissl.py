"""The TinyImageNet suites of DISSL and CISSL: runs, their settings, and one training on the digits."""

import json
import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from plugins.experiments import run as experiments
from plugins.experiments.suites import Request, dissl
from plugins.testing import composed

pytestmark = pytest.mark.usefixtures("in_checkout")
ROOT = Path(__file__).parents[2]
NAMES = {
    "dissl_table1_contrastive": ["simclr", "cissl", "cissl-dim", "cissl-epochs", "cissl-aug"],
    "dissl_table1_distillation": ["dino", "dissl", "dissl-dim", "dissl-epochs", "dissl-aug"],
    "dissl_fig7a": ["dissl-quarter", "dissl-half", "dissl-one"],
    "dissl_fig7c": [f"{heads}-z{dim}" for heads in ("cissl", "cissl_mlp") for dim in (128, 512, 2048, 8192)],
}


def runs(suite, **options):
    return {run.method: run for run in dissl.run_lister(suite)(Request(**options))}


def training(run):
    return composed(run.steps[0].arguments)


@pytest.mark.sample("tinyimagenet-dissl_fig7a", "digits-dissl_table1_contrastive")
@pytest.mark.parametrize("suite", NAMES)
@pytest.mark.parametrize("dataset", ["tinyimagenet", "digits"])
def test_runs_and_their_folders(suite, dataset):
    found = dissl.run_lister(suite)(Request(data=[dataset], seeds=range(2), out=Path("out")))
    assert [run.name for run in found] == [f"solo/{n}_{dataset}/seed{s}" for s in (0, 1) for n in NAMES[suite]]
    assert len({run.folder for run in found}) == len(found)
    for run in found:
        cfg = training(run)
        assert Path(cfg.checkpoint.dir, cfg.checkpoint.group, cfg.checkpoint.version) == run.folder
        assert (cfg.data.dataset, cfg.seed, cfg.auto_resume.enabled) == (dataset, run.seed, True)
        probe = run.steps[1].arguments
        assert [step.name for step in run.steps] == ["pretrain", "probe"]
        assert probe[:2] == ("-m", "solo_ext.main_probe")
        assert (ROOT / probe[probe.index("--config") + 1]).is_file()
        assert probe[probe.index("--pretrained_checkpoint_dir") + 1] == str(run.folder)
        assert probe[probe.index("--seed") + 1] == str(run.seed)


def _strength(cfg):
    """Return crop, jitter, hue, grayscale and blur of the views, which are all of one kind."""
    (view,) = cfg.augmentations
    jitter = view.color_jitter
    assert (view.num_crops, view.crop_size, view.horizontal_flip.prob, jitter.prob) == (2, 64, 0.5, 0.8)
    assert jitter.brightness == jitter.contrast == jitter.saturation
    blur = view.gaussian_blur.prob
    return view.rrc.crop_min_scale, jitter.brightness, jitter.hue, view.grayscale.prob, blur


@pytest.mark.slow
def test_what_each_run_on_tinyimagenet_trains():
    """Published (method, width, epochs, batch, strength of the views); views of strength s follow their formula."""
    table = {
        "simclr": ("cissl", None, 300, 512, 1),
        "cissl": ("cissl", None, 300, 512, 1),
        "cissl-dim": ("cissl", 2048, 300, 512, 1),
        "cissl-epochs": ("cissl", 2048, 1000, 512, 1),
        "cissl-aug": ("cissl", 2048, 1000, 512, 2),
        "dino": ("dino", None, 300, 256, 1),
        "dissl": ("dissl", None, 300, 256, 1),
        "dissl-dim": ("dissl", 2048, 300, 256, 1),
        "dissl-epochs": ("dissl", 2048, 1000, 256, 1),
        "dissl-aug": ("dissl", 2048, 1000, 256, 2),
        "dissl-quarter": ("dissl", None, 300, 512, 0.25),
        "dissl-half": ("dissl", None, 300, 512, 0.5),
        "dissl-one": ("dissl", None, 300, 512, 1),
        **{f"{heads}-z{dim}": ("cissl", dim, 1000, 512, 1) for heads in ("cissl", "cissl_mlp") for dim in dissl.DIMS},
    }
    for suite, names in NAMES.items():
        for name, run in runs(suite).items():
            assert name in names
            cfg = training(run)
            method, dim, epochs, batch, s = table[name]
            assert (cfg.method, cfg.max_epochs, cfg.optimizer.batch_size) == (method, epochs, batch), name
            assert (cfg.backbone.name, cfg.backbone.kwargs.stem) == ("expanded_resnet18", "3x3")
            assert cfg.backbone.kwargs.get("dim") == dim, name
            wanted = (0.2 / s, 0.4 * s, 0.1 * s, 0.1 * s, 0.5 if s == 2 else 0.0)
            assert _strength(cfg) == pytest.approx(wanted), name
            optimizer = cfg.optimizer
            assert (optimizer.name, optimizer.lr, float(optimizer.weight_decay)) == ("adam", 0.002, 1e-6)
            # the backbone's rate is scaled, the classifier's published one is not
            assert optimizer.classifier_lr * batch / 256 == pytest.approx(3e-4), name
            assert (cfg.gradient_clip_val, cfg.gradient_clip_algorithm) == (2.0, "value")


def test_baselines_have_the_published_heads():
    for dataset in ("tinyimagenet", "digits"):
        cfg = training(runs("dissl_table1_contrastive", data=[dataset])["simclr"])
        assert cfg.method == "cissl"
        assert (cfg.method_kwargs.heads, cfg.method_kwargs.positives) == ("simclr", "other")
        cfg = training(runs("dissl_table1_distillation", data=[dataset])["dino"])
        assert cfg.method == "dino" and "n_classes" in cfg.method_kwargs, "solo-learn's own has num_prototypes"


@pytest.mark.slow
def test_clusters_heads_and_probes():
    clusters = {name: training(run).method_kwargs.n_classes for name, run in runs("dissl_fig7a").items()}
    assert clusters == {"dissl-quarter": 24000, "dissl-half": 20000, "dissl-one": 16384}
    assert all(Path(_probe(run)).stem == "probe_subsets" for run in runs("dissl_fig7a").values())
    assert training(runs("dissl_table1_distillation")["dissl-aug"]).method_kwargs.n_classes == 16384
    for name, run in runs("dissl_fig7c").items():
        heads = name.split("-")[0]
        assert training(run).method_kwargs.heads == heads
        assert Path(_probe(run)).stem == {"cissl": "probe", "cissl_mlp": "probe_mlp"}[heads]


def _probe(run):
    arguments = run.steps[1].arguments
    return arguments[arguments.index("--config") + 1]


@pytest.mark.slow
def test_epochs_shorten_the_training_and_the_warm_up_of_dino():
    found = {
        name: training(run)
        for suite in ("dissl_table1_contrastive", "dissl_table1_distillation")
        for name, run in runs(suite, epochs=3, devices=2, data_folder=Path("/data")).items()
    }
    assert {(cfg.max_epochs, cfg.devices, cfg.check_val_every_n_epoch) for cfg in found.values()} == {(3, 2, 1)}
    assert {cfg.data.train_path for cfg in found.values()} == {"/data/tinyimagenet/train"}
    warmup = "warmup_teacher_temperature_epochs"
    assert found["dino"].method_kwargs[warmup] == 3
    assert training(runs("dissl_table1_distillation")["dino"]).method_kwargs[warmup] == dissl.DINO_WARMUP
    assert training(runs("dissl_table1_distillation", epochs=200)["dino"]).method_kwargs[warmup] == dissl.DINO_WARMUP


@pytest.mark.parametrize("suite", NAMES)
def test_without_the_data_there_is_one_sentence_and_nothing_is_trained(suite, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert experiments.main([suite]) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: tinyimagenet is not in datasets/tinyimagenet: create it from its archive with: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "results").exists()


def test_result_joins_training_and_probes(tmp_path):
    run = runs("dissl_fig7c", out=tmp_path)["cissl-z128"]
    run.folder.mkdir(parents=True)
    training = {"epochs": 1000, "metrics": {"val_acc1": 40.0}, "images_per_second": 9.0, "seconds": 5.0, "config": {}}
    (run.folder / "pretrain.json").write_text(json.dumps(training))
    probes = [{"kind": "mlp", "acc1": 1.0}, {"kind": "linear", "acc1": 2.0}, {"kind": "linear", "acc1": 3.0}]
    (run.folder / "probe.json").write_text(json.dumps(probes))
    result = dissl.collect(run)
    expected = {"epochs": 1000, "online": 40.0, "linear": 2.0, "probes": probes, "seconds": 5.0}
    assert {key: result[key] for key in expected} == expected
    (run.folder / "probe.json").write_text(json.dumps(probes[:1]))
    assert dissl.collect(run)["linear"] is None


@pytest.fixture
def quick_digits(few_digits_here, tmp_path):
    """A folder to run suites in, with 12 training digits of a class, and short probes with labels to match."""
    few_digits_here(12)
    (tmp_path / "configs").unlink()
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    fractions = {1.0: 1.0, 0.1: 0.5, 0.03: 0.2, 0.01: 0.1}  # of 120 labels: the least has some of each class
    for name in ("probe", "probe_mlp", "probe_subsets"):
        file = tmp_path / "configs" / "solo" / "digits" / "short" / f"{name}.yaml"
        cfg = OmegaConf.load(file)
        cfg.epochs = 30
        for probe in cfg.probes:
            probe.fraction = fractions[probe.fraction]
            if "epochs" in probe:
                probe.epochs = 30
        OmegaConf.save(cfg, file)
    return tmp_path / "results"


def _run(suite, only, capfd):
    options = ["--data", "digits", "--epochs", "1", "--jobs", "2", "--only", only]
    assert experiments.main([suite, *options]) == 0, capfd.readouterr()


def _results(folder):
    """Return for each run of a suite, by name, its result.json and its lines of the table."""
    table = (folder / "table.md").read_text().splitlines()
    found = {}
    for file in folder.glob("solo/*/seed0/result.json"):
        name = file.parts[-3].removesuffix("_digits")
        found[name] = json.loads(file.read_text()), [line for line in table if f" {name} " in line]
    return found


@pytest.mark.slow
def test_table_1_on_the_digits(quick_digits, capfd):
    """An epoch of the baseline on a few images, its probe, and the table."""
    folder = quick_digits / "dissl_table1_distillation"
    _run(folder.name, "/dino_digits", capfd)
    ((result, lines),) = _results(folder).values()
    assert (result["config"]["method"], result["epochs"], result["dataset"]) == ("dino", 1, "digits")
    (probe,) = result["probes"]
    assert (probe["kind"], probe["labels"], probe["select"], probe["dim"]) == ("linear", 120, "validation", 512)
    assert len(lines) == 1 and f" {probe['acc1']:.1f} " in lines[0]


@pytest.mark.slow
def test_figure_7a_on_the_digits(quick_digits, capfd):
    """An epoch of DISSL on views of each strength, its probes of ever fewer labels, and the figure."""
    folder = quick_digits / "dissl_fig7a"
    _run(folder.name, "*", capfd)
    found = _results(folder)
    assert found.keys() == {"dissl-quarter", "dissl-half", "dissl-one"}
    for result, lines in found.values():
        assert result["config"]["method"] == "dissl"
        assert [probe["labels"] for probe in result["probes"]] == [120, 120, 60, 24, 12]
        for probe, line in zip(result["probes"], lines, strict=True):
            assert f" {probe['acc1']:.1f} " in line
        assert result["probes"][0]["acc1"] > 15, "ten classes"
    assert (folder / "fig7a.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.slow
def test_figure_7c_on_the_digits(quick_digits, capfd):
    """An epoch of CISSL with linear and with MLP heads at the smallest width, probes of their form, and the figure."""
    folder = quick_digits / "dissl_fig7c"
    _run(folder.name, "*-z128_digits", capfd)
    found = _results(folder)
    assert found.keys() == {"cissl-z128", "cissl_mlp-z128"}
    for name, kind in (("cissl-z128", "linear"), ("cissl_mlp-z128", "mlp")):
        result, (line,) = found[name]
        (probe,) = result["probes"]
        assert (probe["kind"], probe["dim"], result["config"]["method_kwargs"]["heads"]) == (kind, 128, name[:-5])
        assert f" {probe['acc1']:.1f} " in line
    assert (folder / "fig7c.pdf").read_bytes().startswith(b"%PDF")
