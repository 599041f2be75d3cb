"""The schema of the configuration: unknown entries, all mistakes at once, its table, files that are none."""

import sys
from pathlib import Path

import pytest

from plugins.tools.command import UserError
from solo_ext import main_pretrain, schema
from solo_ext.compat import GENERATION  # noqa: F401  (before Lightning)
from solo_ext.compat.optim import OPTIMIZERS
from solo_ext.config import parse_linear, parse_pretrain
from solo_ext.schema import Linear, Pretrain, allowed_values, rows
from solo_ext.transforms import DATASETS

pytestmark = pytest.mark.solo
ROOT = Path(__file__).parents[2]

_UNKNOWN = {
    "max_epoch": "the configuration has no entry 'max_epoch'; did you mean max_epochs?",
    "optimizer.weight_decy": "did you mean weight_decay?",
    "momentum.base_tua": "known entries: base_tau, final_tau, classifier; did you mean base_tau?",
    "auto_resume.enable": "did you mean enabled?",
    "warmup_epoch": "did you mean scheduler.warmup_epochs?",
    "lr": "did you mean optimizer.lr?",
    "gradient_clip": "did you mean gradient_clip_val?",
    "finetune": "only main_linear has the entry finetune: remove it",
    "logger": "the command sets logger: remove it",
    "limit_train_batches": "limit_train_batches must be an integer or a number or null, got 'x'",
}


@pytest.mark.sample("lr", "auto_resume.enable")
@pytest.mark.parametrize("key", _UNKNOWN)
def test_an_unknown_entry_names_the_nearest(key, compose):
    value = "x" if key.startswith("limit") else "1"
    with pytest.raises(UserError) as refused:
        parse_pretrain(compose("isoloss", f"++{key}={value}"))
    assert _UNKNOWN[key] in str(refused.value)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("optimizer.weightdecay", "; did you mean weight_decay?"),
        ("optimzer.lr", "the configuration has no entry 'optimzer'; did you mean optimizer?"),
        ("augmentations.0.crop_sze", "augmentations[0] has no entry 'crop_sze'; known entries: rrc, "),
        ("augmentations.0.rrc.enabled", None),
        ("method_kwargs.rho", None),
        ("max_steps", None),
    ],
)
def test_an_override_of_an_unknown_entry_names_it(key, message):
    said = schema.unknown_entry(Pretrain, key, ["max_steps"])
    assert said is None if message is None else message in said


def test_all_mistakes_are_named_at_once(compose):
    more = ("++max_epoch=3", "++optimizer.lr=-1", "++momentum.base_tau=2", "++method=???", "++name=x")
    with pytest.raises(UserError) as refused:
        parse_pretrain(compose("isoloss", *more))
    said = [line.strip() for line in str(refused.value).splitlines()]
    assert len(said) == 4 and "the configuration needs a value for method" in said
    assert "optimizer.lr must be a number, at least 0, got -1" in said


def test_entries_to_which_others_refer_are_accepted(compose):
    cfg = parse_pretrain(compose("isoloss", "+mine=0.5", "++method_kwargs.rho=${mine}"))
    assert cfg.method_kwargs.rho == 0.5
    with pytest.raises(UserError, match="no entry 'mine'"):
        parse_pretrain(compose("isoloss", "+mine=0.5"))


def test_every_entry_has_a_meaning_and_the_table_is_up_to_date():
    for model in (Pretrain, Linear):
        assert all(row.meaning and row.values for row in rows(model))
    assert (ROOT / "docs" / "solo_options.md").read_text() == schema.markdown()
    assert set(allowed_values(schema.Data.model_fields["dataset"]).split(" or ")) == set(DATASETS)
    assert allowed_values(schema.Optimizer.model_fields["name"]).split(" or ") == list(OPTIMIZERS)


_BROKEN = {
    "syntax": (b"a: [1\nb: }", "is not valid YAML: "),
    "bytes": (b"name: \xff", "is not UTF-8 text"),
    "empty": (b"# nothing\n", "is empty, but a configuration is a mapping"),
    "list": (b"- 1\n", "is a list, but a configuration is a mapping"),
    "defaults": (b"defaults: 5\na: 1", "defaults must be a list"),
}


@pytest.mark.parametrize("case", _BROKEN)
def test_a_file_that_is_no_configuration_is_one_sentence(case, tmp_path, monkeypatch, capfd):
    content, sentence = _BROKEN[case]
    (tmp_path / "mine.yaml").write_bytes(content)
    monkeypatch.setattr(sys, "argv", ["prog", "--config-path", str(tmp_path), "--config-name", "mine"])
    with pytest.raises(SystemExit) as stopped:
        main_pretrain.main()
    err = capfd.readouterr().err
    assert stopped.value.code == 2 and sentence in err and "Traceback" not in err


def _values(entry):
    """Wrong kinds, a negative, null, a huge number."""
    return [value for value in ("word", -1, None, 10**30, True, [1], {"a": 1}, "???") if value != entry]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "parse"), [("isoloss", parse_pretrain), ("linear", parse_linear)])
def test_a_wrong_value_of_any_entry_is_refused_in_sentences_or_works(name, parse, compose):
    from omegaconf import OmegaConf

    more = ("pretrained_feature_extractor=x",) if name == "linear" else ()
    good = OmegaConf.to_container(compose(name, *more), resolve=True)

    def leaves(value, path=()):
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                yield from leaves(inner, (*path, key))
        yield path

    for path in [path for path in leaves(good) if path]:
        for wrong in _values(None):
            cfg = OmegaConf.to_container(OmegaConf.create(good))
            place = cfg
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = wrong
            try:
                parse(OmegaConf.create(cfg))
            except UserError as error:
                assert str(error)


def test_a_tilde_is_the_home_folder(compose, monkeypatch):
    """The shell does not replace a tilde in a YAML file or in ``checkpoint.dir=~/runs``."""
    given = compose("isoloss")
    home = Path(given.data.train_path).parent
    monkeypatch.setenv("HOME", str(home))
    paths = (
        "data.train_path='~/train'",
        "data.val_path='~/val'",
        "++checkpoint.dir='~/runs'",
        "++auto_umap.dir='~/clouds'",
    )
    cfg = parse_pretrain(compose("isoloss", *paths))
    assert (cfg.data.train_path, cfg.data.val_path) == (f"{home}/train", f"{home}/val")
    assert (cfg.checkpoint.dir, cfg.auto_umap.dir) == (f"{home}/runs", f"{home}/clouds")
