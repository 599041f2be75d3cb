"""The schema of the command line: unknown options, all mistakes at once, its table."""

from pathlib import Path

import pytest

from lightly_ext.benchmarks import schema
from plugins.tools.command import UserError
from plugins.tools.schema import allowed_values, rows

pytestmark = pytest.mark.lightly
ROOT = Path(__file__).parents[2]
NEEDED = ("--train-dir", "a", "--val-dir", "b")


def parse(*arguments: str) -> schema.Options:
    return schema.validate(vars(schema.parser().parse_args([*NEEDED, *arguments])))


@pytest.mark.parametrize(
    ("unknown", "nearest"), [("--epocs", "--epochs"), ("--weigth-decay", "--weight-decay"), ("--knn_k", "--knn-k")]
)
def test_an_unknown_option_names_the_nearest(unknown: str, nearest: str) -> None:
    with pytest.raises(UserError) as refused:
        parse(unknown, "3")
    assert str(refused.value) == f"unrecognized arguments: {unknown} 3; did you mean {nearest}?"
    with pytest.raises(UserError) as refused:
        parse("--nothing-like-it")
    assert str(refused.value) == "unrecognized arguments: --nothing-like-it; see --help"


def test_all_mistakes_are_named_at_once() -> None:
    numbers = ("--epochs", "many", "--lr", "-1", "--std", "1", "2", "--seed", "-1")
    with pytest.raises(UserError) as refused:
        schema.validate(
            vars(schema.parser().parse_args([*NEEDED[:2], *numbers, "--optimizer", "adam", "--option", "rho"]))
        )
    assert [line.strip() for line in str(refused.value).splitlines()] == [
        "--val-dir is required: folder of validation images, of the same classes",
        "--epochs must be an integer, at least 0, got 'many'",
        "--seed must be an integer in [0, 4294967295], got -1",
        "--optimizer must be lars or sgd or adamw, got 'adam'",
        "--lr must be a number, at least 0, got -1.0",
        "--option must be KEY=VALUE, got 'rho'",
        "--std must be three numbers, above 0, got [1.0, 2.0]",
    ]


def test_values_and_defaults() -> None:
    options = parse("--option", "rho=0.5", "form=gram", "flag=true", "--mean", "0", "0", "1", "--std", "1", "1", "1")
    assert options.option == {"rho": 0.5, "form": "gram", "flag": True} and options.mean == [0.0, 0.0, 1.0]
    assert (options.train_dir, options.epochs, options.transform, options.strategy) == (Path("a"), 100, {}, "auto")
    assert parse("--devices", "2").strategy == "ddp_find_unused_parameters_true"


@pytest.mark.parametrize("name", schema.Options.model_fields)
def test_a_wrong_value_of_any_option_is_a_sentence_or_works(name: str) -> None:
    for wrong in ("word", "-1", "nan", "", "1e30", "0"):
        try:
            parse(schema.flag(name), wrong)
        except UserError as error:
            assert schema.flag(name) in str(error) or "unrecognized arguments" in str(error)


def test_every_option_has_a_meaning_and_the_table_is_up_to_date() -> None:
    assert all(row.meaning and row.values for row in rows(schema.Options))
    assert (ROOT / "docs" / "lightly_options.md").read_text() == schema.markdown()
    from lightly_ext.lightning.module import OPTIMIZERS

    assert allowed_values(schema.Options.model_fields["optimizer"]).split(" or ") == list(OPTIMIZERS)


def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    options = parse("--log-dir=~/logs", "--ckpt-path=~/a.ckpt")
    assert (options.log_dir, options.ckpt_path) == (tmp_path / "logs", tmp_path / "a.ckpt")
