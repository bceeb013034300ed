"""The registry: names, lazy loading, the user's own code, messages that help."""

import subprocess
import sys
from pathlib import Path

import pytest

from trt_kd.config import Plugin
from trt_kd.errors import ConfigError, TrtKdError
from trt_kd.registry import Registry

ROOT = Path(__file__).parents[1]
COLOURS = Registry(
    "colour",
    {
        "plugin": "trt_kd.config:Plugin",
        "error": "trt_kd.errors:TrtKdError",
        "absent_module": "trt_kd.no_such_module:Thing",
        "absent_class": "trt_kd.errors:NoSuchError",
        "function": "trt_kd.artifacts.environment:environment",
    },
)


def test_names_keep_the_order_of_the_table():
    assert COLOURS.names()[:2] == ["plugin", "error"]


def test_a_name_loads_its_class():
    assert COLOURS.load("plugin") is Plugin
    assert COLOURS.load("error") is TrtKdError


def test_a_name_with_a_colon_is_the_users_own_code(tmp_path, monkeypatch):
    (tmp_path / "a_users_colours.py").write_text("class Mine:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert COLOURS.load("a_users_colours:Mine").__name__ == "Mine"


def test_an_unknown_name_lists_the_choices_and_the_nearest():
    with pytest.raises(ConfigError, match="unknown colour 'plugn'; available: plugin, error") as it:
        COLOURS.load("plugn")
    assert it.value.hint == "did you mean 'plugin'?"


def test_a_name_like_no_other_gets_no_guess():
    with pytest.raises(ConfigError) as it:
        COLOURS.load("zzzzzz")
    assert it.value.hint is None


@pytest.mark.parametrize("target", ["no_such_package:Thing", "trt_kd.errors:NoSuchError"])
def test_a_users_target_that_does_not_import_is_the_users_to_fix(target):
    with pytest.raises(ConfigError, match="cannot be imported") as it:
        COLOURS.load(target)
    assert "PYTHONPATH" in it.value.hint


@pytest.mark.parametrize(
    ("name", "kind"), [("absent_module", ModuleNotFoundError), ("absent_class", AttributeError)]
)
def test_a_broken_table_of_ours_is_not_blamed_on_the_user(name, kind):
    with pytest.raises(kind):
        COLOURS.load(name)


def test_a_summary_is_the_first_line_of_the_docstring():
    assert COLOURS.summary("plugin").startswith("A member of a family")
    assert COLOURS.summary("function").startswith("Hardware and versions")


@pytest.mark.parametrize(("name", "reason"), [("absent_module", "exist"), ("absent_class", "no")])
def test_a_summary_of_nothing_says_so(name, reason):
    with pytest.raises(ConfigError, match=reason):
        COLOURS.summary(name)


def test_making_a_registry_and_its_summaries_imports_no_member():
    code = (
        "import sys; from trt_kd.registry import Registry;"
        "r = Registry('x', {'a': 'trt_kd.checkpoints:load_model'}); r.summary('a');"
        "sys.exit('trt_kd.checkpoints' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
