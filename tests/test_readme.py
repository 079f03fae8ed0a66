"""What the README tells a newcomer to type works as it says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from rewards import RewardInputs, resolve_reward
from rlhf_drive.cli import main
from rlhf_drive.cli_check import load_checked
from rlhf_drive.scenes import Trajectories
from rlhf_drive.scenes.generator import generate_scenes

README = (Path(__file__).resolve().parents[1] / "README.md").read_text("utf-8")


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `main` sets when it is absent, so that it is gone again after each test."""
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the README's own reward; one for all tests, since a reward's name belongs to one file."""
    code = re.search(r"```python\n(# my_rewards\.py\n.*?)```", README, re.DOTALL)
    assert code is not None
    path = tmp_path_factory.mktemp("readme")
    (path / "my_rewards.py").write_text(code.group(1))
    return path


@pytest.fixture
def _inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in that folder."""
    monkeypatch.chdir(folder)


@pytest.mark.usefixtures("_inside")
def test_the_reward_of_the_readme_gives_what_its_docstring_says() -> None:
    scenes = list(generate_scenes(1, seed=0))
    poses = np.zeros((3, 8, 3))
    for row, speed in enumerate((5.0, 15.0, 40.0)):
        poses[row, :, 0] = speed * 0.5 * np.arange(1, 9)
    inputs = RewardInputs(scenes, Trajectories(poses, np.zeros(3, dtype=int)), components={})
    # With a limit of 10 m/s: below it 1; at 15 m/s 2 - 1.5; beyond 20 m/s 0.
    calm = resolve_reward("my_rewards.py:calm").bind({"limit_mps": 10.0})
    np.testing.assert_allclose(calm(inputs), [1.0, 0.5, 0.0], atol=1e-12)


@pytest.mark.usefixtures("_inside")
def test_the_command_with_the_reward_is_valid(capsys: pytest.CaptureFixture[str]) -> None:
    command = next(line for line in README.splitlines() if "my_rewards.py:calm" in line)
    arguments = shlex.split(command)
    assert arguments[:3] == ["rlhf-drive", "train", "quickstart"]
    with pytest.raises(SystemExit) as stopped:
        main(["validate", *arguments[2:]])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith("quickstart is valid")


def test_the_commands_that_choose_parts_of_rl_are_valid(tmp_path: Path) -> None:
    block = README.partition("## The parts of RL")[2].partition("```bash\n")[2].partition("```")[0]
    commands = [shlex.split(line.replace("FOLDER", str(tmp_path)))[2:] for line in block.splitlines()]
    assert len(commands) == 3
    for recipe, *overrides in commands:
        rl = load_checked(recipe, overrides).rl
        for key, _, value in (item.partition("=") for item in overrides if item.startswith("rl.")):
            assert getattr(rl, key.removeprefix("rl.")) == (float(value) if value[0].isdigit() else value)


def test_the_error_that_the_readme_shows_is_the_one_that_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    shown = re.search(r"```\n\$ rlhf-drive (validate .*?)\n(Error: .*?)```", README, re.DOTALL)
    assert shown is not None
    with pytest.raises(SystemExit):
        main(shlex.split(shown.group(1)))
    assert capsys.readouterr().err == shown.group(2)


def test_every_command_and_recipe_that_the_readme_names_exists() -> None:
    from rlhf_drive.config import shipped_recipes

    commands = set(re.findall(r"^(?:\.venv/bin/)?rlhf-drive ([a-z]+)", README, re.MULTILINE))
    assert commands == {"compare", "estimate", "recipes", "runs", "scenes", "score", "train", "validate"}
    recipes = set(re.findall(r"rlhf-drive train ([a-z_]+)(?=\s|`)", README))
    assert recipes == {"quickstart", "real_scenes", "real_scenes_async", "real_scenes_flow", "rl", "sft"}
    assert recipes <= set(shipped_recipes())
