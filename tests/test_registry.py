"""Registries and functions loaded from a user's module or file."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import pytest

from rlhf_drive.errors import ConfigError, PluginError, UnknownNameError
from rlhf_drive.registry import Registry, is_plugin, load_function


def _plugin(folder: Path, text: str, name: str = "rewards.py") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def test_an_unknown_name_offers_the_closest_and_says_where() -> None:
    parts: Registry[int] = Registry("reward")
    parts.add("ego_progress", 1)
    parts.add("comfort", 2)
    with pytest.raises(UnknownNameError) as caught:
        parts.get("ego_progres", where="reward.terms[2].name")
    assert str(caught.value) == (
        "Unknown reward 'ego_progres' in reward.terms[2].name. "
        "Did you mean 'ego_progress'? Known: comfort, ego_progress."
    )


def test_names_are_sorted_and_entries_come_back_as_they_went_in() -> None:
    parts: Registry[object] = Registry("part")
    entry = object()
    assert parts.register("b")(entry) is entry
    parts.add("a", 1)
    assert parts.names() == ("a", "b")
    assert parts.get("b") is entry
    assert list(parts) == ["a", "b"]
    assert "a" in parts
    assert "c" not in parts


def test_a_name_is_given_once() -> None:
    parts: Registry[object] = Registry("reward")
    parts.add("x", len)
    parts.add("x", len)
    with pytest.raises(ConfigError, match=r"reward name 'x' is taken by builtins\.len"):
        parts.add("x", max)
    with pytest.raises(ConfigError, match="needs a name"):
        parts.add("", max)


def test_a_function_of_a_file_loads_without_touching_the_import_path(tmp_path: Path) -> None:
    target = _plugin(tmp_path, "def double(x):\n    return 2 * x\n") + ":double"
    path_before, rewards_before = list(sys.path), sys.modules.get("rewards")
    function = load_function(target)
    assert function(21) == 42
    assert sys.path == path_before
    assert sys.modules.get("rewards") is rewards_before  # a file called rewards.py shadows nothing
    assert function.__module__.startswith("_rlhf_drive_plugin_")
    assert load_function(target) is function
    assert pickle.loads(pickle.dumps(function)) is function


def test_an_edited_file_is_loaded_anew(tmp_path: Path) -> None:
    target = _plugin(tmp_path, "def f():\n    return 1\n") + ":f"
    assert load_function(target)() == 1
    _plugin(tmp_path, "def f():\n    return 2\n")
    assert load_function(target)() == 2


def test_a_relative_path_starts_at_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _plugin(tmp_path, "def f():\n    return 3\n", "mine.py")
    monkeypatch.chdir(tmp_path)
    assert load_function("mine.py:f")() == 3


def test_a_function_of_a_module_loads() -> None:
    assert load_function("math:hypot")(3.0, 4.0) == 5.0
    assert is_plugin("math:hypot")
    assert not is_plugin("pdms")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nothing", "names no function"),
        ("math:", "names no function"),
        ("absent/file.py:f", r"there is no file .*absent/file\.py"),
        ("no_such_module_here.sub:f", "no module 'no_such_module_here.sub'"),
        ("math:hypott", r"has no function 'hypott'.*Did you mean 'hypot'"),
        ("math:pi", "is a float, not a function"),
    ],
)
def test_a_target_that_cannot_be_loaded_says_why(target: str, message: str) -> None:
    with pytest.raises(PluginError, match=message) as caught:
        load_function(target, where="reward.terms[0].name")
    assert "reward.terms[0].name" in str(caught.value)


def test_a_file_that_fails_names_the_error_and_leaves_no_module(tmp_path: Path) -> None:
    before = set(sys.modules)
    target = _plugin(tmp_path, "raise ValueError('broken on purpose')\n", "bad.py") + ":f"
    with pytest.raises(PluginError, match=r"bad\.py failed while loading: ValueError: broken on purpose"):
        load_function(target)
    assert not {name for name in set(sys.modules) - before if name.startswith("_rlhf_drive_plugin_")}


def test_a_module_that_misses_a_dependency_names_the_dependency(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _plugin(tmp_path, "import a_dependency_that_is_absent\n", "needs_more_for_test.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(PluginError, match="No module named 'a_dependency_that_is_absent'"):
        load_function("needs_more_for_test:f")
