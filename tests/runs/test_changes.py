"""Changed keys are exactly those that were overridden."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from rlhf_drive.config import dump_recipe, load_recipe
from rlhf_drive.runs.changes import recipe_changes


def _data(name: str, *overrides: str) -> dict[str, object]:
    return dict(yaml.safe_load(dump_recipe(load_recipe(name, overrides))))


def test_overrides_are_the_changes(tmp_path: Path) -> None:
    found = recipe_changes(_data("quickstart", "rl.max_steps=7", "rl.seeds=[1,2]", f"output_dir={tmp_path}"))
    assert found.recipe == "quickstart"
    assert found.keys == {"rl.seeds": ([0], [1, 2]), "rl.max_steps": (40, 7)}


@pytest.mark.parametrize("name", ["quickstart_grpo", "real_scenes_flow"])
def test_a_renamed_run_is_compared_with_the_nearest_recipe(name: str, tmp_path: Path) -> None:
    extra = [] if name == "quickstart_grpo" else [f"scenes.path={tmp_path}"]
    found = recipe_changes(_data(name, "name=mine", "rl.learning_rate=1e-3", *extra))
    assert found.recipe == name
    expected = {"rl.learning_rate"} | ({"scenes.path"} if extra else set())
    assert set(found.keys) == expected


def test_keys_that_another_version_wrote_are_shown() -> None:
    data = _data("quickstart")
    assert isinstance(data["rl"], dict)
    data["rl"] = {key: value for key, value in data["rl"].items() if key != "beta"} | {"old_key": 3}
    found = recipe_changes(data)
    assert found.keys["rl.beta"][1] == "(absent)"
    assert found.keys["rl.old_key"] == ("(absent)", 3)
