"""Overrides come out of Hydra as the user typed them."""

import pytest

pytest.importorskip("hydra")
from hydra.core.override_parser.overrides_parser import OverridesParser

from plugins.tools.overrides import hydra_value, is_valid_override, quote_override


@pytest.mark.parametrize(
    "value",
    [
        "runs/ep=9.ckpt",
        "~/runs",
        "a b",
        "a (b)",
        "it's=1",
        r"back\slash=1",
        "ends=\\",
        r"both\'=1",
        "{a",
        "x=[1",
        "ü=1",
    ],
)
def test_a_path_comes_out_as_typed(value):
    word = quote_override(f"key={value}")
    if value.startswith("{"):
        assert word == f"key={value}", "quotes are for values that cannot be lists or sections"
    else:
        assert str(OverridesParser.create().parse_override(word).value()) == value


@pytest.mark.parametrize("value", ["a/b-1.c", "a=b", "it's", r"back\slash", r"ends=\\", r"both\'=1", "[a]", "{a"])
def test_a_formatted_value_is_one_string(value):
    assert str(OverridesParser.create().parse_override(f"key={hydra_value(value)}").value()) == value
    assert hydra_value(3) == "3" and hydra_value("a/b-1.c") == "a/b-1.c"


@pytest.mark.parametrize(
    ("value", "read"), [("[~/photos]", ["~/photos"]), ("[/a=b,~/c d, /plain]", ["/a=b", "~/c d", "/plain"]), ("[]", [])]
)
def test_paths_of_a_list_come_out_as_typed(value, read):
    assert OverridesParser.create().parse_override(quote_override(f"key={value}")).value() == read


@pytest.mark.parametrize("word", ["a=1", "a='x y'", "+a=[1,2]", "~a", "--help", "a=[1", "a='x", "a={b: 1}", "a=1,2"])
def test_what_needs_no_quotes_or_cannot_be_helped_stays(word):
    assert quote_override(word) == word
    assert is_valid_override(word) == (word not in ("--help", "a=[1", "a='x"))
