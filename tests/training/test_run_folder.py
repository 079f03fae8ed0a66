"""A run's folder belongs to one run of one recipe, and remembers what is done."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_drive.config import Recipe, dump_recipe
from rlhf_drive.errors import ConfigError
from rlhf_drive.training.run_folder import RunFolder

MakeRecipe = Callable[..., Recipe]


def test_an_existing_folder_is_never_used_again(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    taken = runs / "quickstart"
    taken.mkdir(parents=True)
    (taken / "mine.txt").write_text("mine")
    (runs / "quickstart-2").write_text("a file")
    recipe = tiny_recipe()
    first, second = RunFolder.create(recipe), RunFolder.create(recipe)
    assert (first.path, second.path) == (runs / "quickstart-3", runs / "quickstart-4")
    assert [path.name for path in taken.iterdir()] == ["mine.txt"]
    assert (runs / "quickstart-2").read_text() == "a file"
    assert (first.path / "recipe.yaml").read_text() == dump_recipe(recipe)


def test_a_place_that_cannot_be_written_is_a_config_error(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/quickstart cannot be made.*Set output_dir="):
        RunFolder.create(tiny_recipe("quickstart", f"output_dir={tmp_path / 'file'}"))


def test_another_recipe_is_refused_by_the_differing_line(tiny_recipe: MakeRecipe) -> None:
    folder = RunFolder.create(tiny_recipe("quickstart", "rl.max_steps=7"))
    with pytest.raises(ConfigError, match="was started with another recipe") as raised:
        RunFolder.resume(tiny_recipe("quickstart", "rl.max_steps=8"), folder.path)
    assert "(max_steps: 7 there, max_steps: 8 here)" in str(raised.value)
    written = folder.path / "recipe.yaml"
    written.write_text(written.read_text() + "extra: 1\n")
    with pytest.raises(ConfigError, match="more or fewer keys"):
        RunFolder.resume(tiny_recipe("quickstart", "rl.max_steps=7"), folder.path)


def test_a_folder_without_recipe_is_no_run(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ConfigError, match="is no run folder"):
            RunFolder.resume(tiny_recipe(), path)


def test_stages_and_time_survive(tiny_recipe: MakeRecipe) -> None:
    recipe = tiny_recipe()
    folder = RunFolder.create(recipe)
    assert (folder.seconds_before(), folder.is_done("sft"), folder.done("sft")) == (0.0, False, {})
    folder.mark_done("sft", {"epoch": 3}, 12.5)
    folder.mark_done("rl-seed0", {"steps": 4}, 20.0)
    again = RunFolder.resume(recipe, folder.path)
    assert (again.is_done("sft"), again.is_done("rl-seed0"), again.is_done("rl-seed1")) == (True, True, False)
    assert (again.done("sft"), again.seconds_before()) == ({"epoch": 3}, 20.0)
    again.note_seconds(31.0)
    written = json.loads((folder.path / "stages.json").read_text())
    assert written == {"seconds": 31.0, "done": {"sft": {"epoch": 3}, "rl-seed0": {"steps": 4}}}
    assert sorted(path.name for path in folder.path.iterdir()) == ["recipe.yaml", "stages.json"]
