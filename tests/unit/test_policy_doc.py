"""docs/policy.md is executed: each example parses or fails with the text that the page shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from initd.core.policy import DEFAULT_POLICY, PolicyError, parse
from initd.core.presets import PRESETS
from initd.errors import ConfigError
from initd.settings import FIELDS, load

PAGE = (Path(__file__).parents[2] / "docs" / "policy.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```([a-z-]*)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def blocks(kind):
    found = [text for name, text in BLOCKS if name == kind]
    assert found, f"no {kind} example in the page"
    return [pytest.param(text, id=text.splitlines()[0]) for text in found]


def test_every_example_is_of_a_kind_that_is_executed():
    assert PAGE.count("```") == 2 * len(BLOCKS)
    assert {name for name, _ in BLOCKS} == {"policy", "error", "defaults", "toml", "settings-error"}


@pytest.mark.parametrize("text", blocks("policy"))
def test_example_parses(text):
    assert parse(text).names or parse(text).ranges or parse(text).feeds


@pytest.mark.parametrize("text", blocks("error"))
def test_example_fails_as_shown(text):
    entries, shown = text.split("---\n")
    with pytest.raises(PolicyError) as caught:
        parse(entries)
    assert f"initd: {caught.value}\n" == shown
    assert [issue.line for issue in caught.value.issues] == list(range(1, len(entries.splitlines()) + 1))


def test_lines_that_are_said_to_be_one_are_one():
    (text,) = (text for _, text in BLOCKS if "it counts once" in text)
    assert len(parse(text).names) == 1


def test_defaults_are_the_defaults():
    assert [text for name, text in BLOCKS if name == "defaults"] == [DEFAULT_POLICY]


def test_table_of_presets():
    rows = re.findall(r"^\| `@([a-z]+)` \| (.*) \|$", PAGE, re.MULTILINE)
    assert dict(rows) == {name: preset.summary for name, preset in PRESETS.items()}


def test_table_of_settings():
    rows = re.findall(r"^\| `([A-Z_]+)` \| `([a-z_]+)` \| `([^`]*)` \|", PAGE, re.MULTILINE)
    assert rows == [(field.variable, name, str(field.default)) for name, field in FIELDS.items()]


@pytest.mark.parametrize("text", blocks("toml"))
def test_settings_example_loads(tmp_path, text):
    (tmp_path / "initd.toml").write_text(text)
    assert load({"INITD_SETTINGS": str(tmp_path / "initd.toml")}).backend == "nftables"


@pytest.mark.parametrize("text", blocks("settings-error"))
def test_settings_example_fails_as_shown(tmp_path, text):
    entries, shown = text.split("---\n")
    (tmp_path / "initd.toml").write_text(entries)
    with pytest.raises(ConfigError) as caught:
        load({"INITD_SETTINGS": str(tmp_path / "initd.toml")})
    assert f"initd: {caught.value}\n".replace(f"{tmp_path}/", "") == shown
