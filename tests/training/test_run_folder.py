"""A run's folder belongs to one run of one recipe, and remembers what is done."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_drive.config import Recipe, dump_recipe, load_recipe
from rlhf_drive.errors import ConfigError, RunStoppedError
from rlhf_drive.runs.folders import open_run, state_of
from rlhf_drive.training.ranks import Ranks
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


def test_a_recipe_that_was_edited_by_hand_is_read_and_not_compared_letter_by_letter(tiny_recipe: MakeRecipe) -> None:
    folder = RunFolder.create(tiny_recipe("quickstart", "rl.learning_rate=0.5")).path
    text = (folder / "recipe.yaml").read_text()
    assert text.count("learning_rate: 0.5\n") == 1
    (folder / "recipe.yaml").write_text(text.replace("learning_rate: 0.5\n", "learning_rate: 2.0e-3  # was too high\n"))
    edited = load_recipe(folder / "recipe.yaml")
    assert edited.rl.learning_rate == 2e-3
    assert RunFolder.resume(edited, folder).path == folder
    with pytest.raises(
        ConfigError, match=r"another recipe .*learning_rate: 2\.0e-3  # was too high there, learning_rate: 0\.5"
    ):
        RunFolder.resume(tiny_recipe("quickstart", "rl.learning_rate=0.5"), folder)


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
    assert written == {
        "id": folder.identity.id, "seconds": 31.0, "done": {"sft": {"epoch": 3}, "rl-seed0": {"steps": 4}}
    }  # fmt: skip
    assert sorted(path.name for path in folder.path.iterdir()) == ["recipe.yaml", "stages.json"]


def test_each_run_has_an_identity_of_its_own_for_good(tiny_recipe: MakeRecipe) -> None:
    recipe = tiny_recipe()
    first, second = RunFolder.create(recipe), RunFolder.create(recipe)
    assert first.identity.recipe == second.identity.recipe
    assert len({first.identity.id, second.identity.id}) == 2
    assert RunFolder.resume(recipe, first.path).identity == first.identity
    other = RunFolder.create(tiny_recipe("quickstart", "rl.max_steps=7"))
    assert other.identity.recipe != first.identity.recipe


def test_a_folder_of_an_older_version_gets_an_identity(tiny_recipe: MakeRecipe) -> None:
    recipe = tiny_recipe()
    path = RunFolder.create(recipe).path
    (path / "stages.json").write_text(json.dumps({"seconds": 4.0, "done": {"sft": {"epoch": 3}}}))
    folder = RunFolder.resume(recipe, path)
    assert len(folder.identity.id) == 16
    assert (folder.seconds_before(), folder.done("sft")) == (4.0, {"epoch": 3})
    assert RunFolder.resume(recipe, path).identity == folder.identity
    (path / "stages.json").write_text('{"id": "a')
    with pytest.raises(ConfigError, match=r"stages.json cannot be read .* Remove it"):
        RunFolder.resume(recipe, path)


def test_two_processes_do_not_work_in_one_folder_and_read_what_the_other_left(tiny_recipe: MakeRecipe) -> None:
    recipe = tiny_recipe()
    folder = RunFolder.create(recipe)
    late = RunFolder.resume(recipe, folder.path)
    with folder.locked() as held:
        assert held
        with pytest.raises(ConfigError, match="Another process works in"), late.locked():
            pass
        folder.mark_done("sft", {"epoch": 3}, 12.5)
    assert not late.is_done("sft")
    with late.locked():
        assert (late.done("sft"), late.seconds_before()) == ({"epoch": 3}, 12.5)


class Follower(Ranks):
    """A process that is not the main one, and hears from it what is in `said`."""

    def __init__(self, *said: object) -> None:
        super().__init__()
        self.index, self.count, self.said = 1, 2, list(said)

    def first(self, value: object) -> object:  # type: ignore[override]
        return (self.said.pop(0), None)


def test_only_the_main_process_writes(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    state = {"id": "abc", "seconds": 2.0, "done": {}}
    path = tmp_path / "runs" / "quickstart"
    ranks = Follower(path, (state, "digest"), None, (state, "digest"), None)
    folder = RunFolder.create(tiny_recipe(), ranks)
    assert (folder.path, folder.identity.id, folder.seconds_before()) == (path, "abc", 2.0)
    with folder.locked():
        folder.mark_done("sft", {}, 3.0)
    assert folder.is_done("sft")
    assert ranks.said == []
    assert not path.exists()


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (ConfigError("no such thing\nand more"), "failed"),
        (RunStoppedError("enough"), "stopped"),
        (ValueError(), "killed"),
    ],
)
def test_how_a_run_broke_off_is_noted_until_it_goes_on(
    tiny_recipe: Callable[..., Recipe], error: Exception, state: str
) -> None:
    folder = RunFolder.create(tiny_recipe())
    with pytest.raises(type(error)), folder.locked():
        raise error
    run = open_run(folder.path)
    assert state_of(run) == state
    assert run.ended == {"failed": "failed: no such thing", "stopped": "stopped", "killed": ""}[state]
    with folder.locked():
        assert state_of(open_run(folder.path)) == "running"
        assert open_run(folder.path).ended == ""
