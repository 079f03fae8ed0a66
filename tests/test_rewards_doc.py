"""What docs/rewards.md shows works as it says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import yaml
from navsim_standin import write_environment

from rewards import PDMS_COMPONENTS, Reward, RewardInputs, RewardSpec, build_reward
from rewards.carriers import FailureKind
from rewards.from_recipe import reward_config
from rewards.remote import _read_answer, _request
from rewards.trl_functions import TRL_COLUMNS
from rlhf_drive.config import RewardSection
from rlhf_drive.config_build import build
from rlhf_drive.scenes import Trajectories
from rlhf_drive.scenes.generator import generate_scenes

DOC = (Path(__file__).resolve().parents[1] / "docs" / "rewards.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOC, re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the page speaks of; one folder, since a reward's name belongs to one file."""
    path = tmp_path_factory.mktemp("doc")
    (code,) = [block for block in blocks("python") if block.startswith("# my_rewards.py")]
    (path / "my_rewards.py").write_text(code.replace('"calm"', '"calm_of_the_doc"'))
    (path / "my_trl_rewards.py").write_text(
        "def smoothness(completions, **kwargs):\n    return [0.5] * len(completions)"
    )
    return path


@pytest.fixture(autouse=True)
def _inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def section(block: str) -> Reward:
    """The reward that a whole section gives, read as a recipe's."""
    problems: list[str] = []
    values = yaml.safe_load(block)["reward"]
    if values["scorer"] == "navsim":
        values["scorer_options"] |= {"python": write_environment(Path.cwd(), "v2.2"), "cache": str(Path.cwd())}
    made = build(RewardSection, values, "reward", problems)
    assert problems == []
    return reward_config(made).build()


def test_every_section_builds() -> None:
    sections = [block for block in blocks("yaml") if block.startswith("reward:")]
    last = ["epdms", "pdms", "epdms_two_frame", "calm_of_the_doc", "epdms"]
    assert [section(block).names[-1] for block in sections] == last
    assert [section(block).two_frame for block in sections] == [False, False, True, False, False]


def test_every_term_builds() -> None:
    terms = [yaml.safe_load(block)[0] for block in blocks("yaml") if not block.startswith("reward:")]
    assert [term["name"] for term in terms] == ["trl", "remote", "vlm_judge"]
    for term, column in zip(terms, ("smoothness", "remote", "vlm_judge"), strict=True):
        assert build_reward([RewardSpec("pdms"), RewardSpec(**term)]).names == (*PDMS_COMPONENTS, column)


def test_wam_flow_spelled_out_is_the_preset() -> None:
    rng = np.random.default_rng(0)
    columns = {name: rng.random(50) for name in PDMS_COMPONENTS}
    (spelled,) = [block for block in blocks("yaml") if "gates: [{name: nc" in block]
    preset = build_reward([RewardSpec("wam_flow")])
    inputs = RewardInputs([], Trajectories(np.zeros((50, 8, 3)), np.zeros(50)), columns)
    expected = preset.terms[0].function(inputs)
    np.testing.assert_allclose(section(spelled).total(columns), expected, rtol=1e-14)


def test_own_function_does_what_it_says(folder: Path) -> None:
    poses = np.zeros((3, 8, 3))
    poses[:, -1, 0] = [5.0, 9.0, 20.0]  # 10, 18 and 40 m/s over the last half second
    term = build_reward([RewardSpec("pdms"), RewardSpec(f"{folder}/my_rewards.py:calm", 1.0, {"limit_mps": 12.0})])
    values = term.terms[1].function(RewardInputs([], Trajectories(poses, np.zeros(3)), {}))
    assert values.tolist() == [1.0, 0.5, 0.0]


def test_request_has_the_keys_that_are_documented() -> None:
    request, answer = (json.loads(block) for block in blocks("json"))
    (scene,) = generate_scenes(1, seed=0)
    inputs = RewardInputs([scene], Trajectories(np.zeros((2, 8, 3)), np.zeros(2)), {"pdms": np.array([0.9, np.nan])})
    sent = _request(inputs, range(2), "summary")

    def keys(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: keys(item) for key, item in value.items() if key != "components"}
        return keys(value[0]) if isinstance(value, list) and value and isinstance(value[0], dict) else None

    assert keys(sent) == keys(request)
    assert _read_answer(answer, 2, "server") == [0.75, ("unavailable", "server did not score it: no map here")]


def test_columns_of_trl_functions_are_documented() -> None:
    assert all(f"`{name}`" in DOC for name in TRL_COLUMNS)


def test_failure_kinds_are_documented() -> None:
    kinds = re.findall(r"^\| `(\w+)`", DOC.partition("## Failures")[2], re.MULTILINE)
    assert set(kinds) == set(get_args(FailureKind))
