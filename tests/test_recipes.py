"""The shipped recipes: valid, commented, and without a key that does nothing."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from rewards.hack_detector import MonitorLimits
from rlhf_drive.cli_check import load_checked
from rlhf_drive.config import ACTION_TOKENS, Recipe, read_recipe_text, shipped_recipes
from rlhf_drive.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
EXPECTED = (
    *("compare", "quickstart", "quickstart_grpo", "real_scenes", "real_scenes_async", "real_scenes_epdms"),
    *("real_scenes_flow", "real_scenes_masked", "rl", "scenes", "sft"),
)


def _given(name: str, folder: Path) -> list[str]:
    """What a recipe asks its user for; the folder stands for a scene store and for a checkpoint."""
    (folder / "policy.json").touch()
    needs = {
        "real_scenes": [f"scenes.path={folder}"],
        "real_scenes_async": [f"scenes.path={folder}"],
        "real_scenes_epdms": [f"scenes.path={folder}"],
        "real_scenes_flow": [f"scenes.path={folder}"],
        "real_scenes_masked": [f"scenes.path={folder}"],
        "sft": [f"scenes.store={folder}"],
        "rl": [f"scenes.store={folder}", f"rl.policy={folder}"],
        "compare": [f"scenes.store={folder}", f"compare.policies.mine={folder}"],
    }
    return needs.get(name, [])


@pytest.mark.parametrize("name", EXPECTED)
def test_a_shipped_recipe_is_valid(name: str, tmp_path: Path) -> None:
    recipe = load_checked(name, _given(name, tmp_path))
    assert recipe.name == name
    assert recipe.job == (name if name in ("compare", "rl", "scenes", "sft") else "pipeline")


def test_the_list_is_complete() -> None:
    assert shipped_recipes() == EXPECTED


@pytest.mark.parametrize("name", EXPECTED)
def test_every_line_of_a_recipe_is_explained(name: str) -> None:
    """Each key with a value has a comment; the name and the description speak for themselves."""
    lines = read_recipe_text(name).splitlines()
    bare = [line for line in lines if line.strip() and "#" not in line and not line.rstrip().endswith(":")]
    assert [line for line in bare if not line.startswith(("description:",))] == []
    assert lines[0].startswith("# ")


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Leaf values by key path."""
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        if dataclasses.is_dataclass(item):
            yield from _leaves(item, f"{path}{field.name}.")
        else:
            yield f"{path}{field.name}", item


def test_the_asynchronous_recipe_differs_in_where_and_when_is_sampled_only(tmp_path: Path) -> None:
    names = ("real_scenes", "real_scenes_async")
    turns, overlapping = (dict(_leaves(load_checked(name, _given(name, tmp_path)))) for name in names)
    assert {key for key in turns if turns[key] != overlapping[key]} == {
        "name", "description", "rollout.engine", "rollout.max_staleness", "rollout.scenes_per_chunk",
    }  # fmt: skip


def test_the_grpo_quickstart_differs_in_the_algorithm_only() -> None:
    gspo, grpo = (dict(_leaves(load_checked(name, []))) for name in ("quickstart", "quickstart_grpo"))
    algorithm = {
        "rl.importance_sampling_level",
        "rl.epsilon",
        "rl.epsilon_high",
        "rl.scale_rewards",
        "rl.learning_rate",
    }
    differing = {key for key in gspo if gspo[key] != grpo[key]}
    assert {"rl.importance_sampling_level"} <= differing <= algorithm | {"name", "description"}
    assert (gspo["rl.importance_sampling_level"], grpo["rl.importance_sampling_level"]) == ("sequence", "token")


def test_the_epdms_recipe_differs_in_the_reward_only(tmp_path: Path) -> None:
    names = ("real_scenes_masked", "real_scenes_epdms")
    pdms, epdms = (dict(_leaves(load_checked(name, _given(name, tmp_path)))) for name in names)
    reward = {"reward.scorer", "reward.scorer_options", "reward.terms", "rollout.previous_plan", "compare.metrics"}
    assert {key for key in pdms if pdms[key] != epdms[key]} == reward | {"name", "description"}
    assert [term.name for term in epdms["reward.terms"]] == ["epdms_two_frame"]


@pytest.mark.parametrize(
    ("process", "also"),
    [
        ("flow", {"rollout.order", "compare.order"}),
        ("masked", set()),
    ],
)
def test_the_recipe_of_another_process_differs_in_decoding_only(process: str, also: set[str], tmp_path: Path) -> None:
    names = ("real_scenes", f"real_scenes_{process}")
    causal, other = (dict(_leaves(load_checked(name, _given(name, tmp_path)))) for name in names)
    decoding = {"process.name", "rollout.steps", "compare.steps"} | also
    assert {key for key in causal if causal[key] != other[key]} == decoding | {"name", "description"}
    assert (causal["process.name"], other["process.name"]) == ("autoregressive", process)


def test_a_reward_that_needs_the_frame_before_must_get_it(tmp_path: Path) -> None:
    given = [*_given("real_scenes_epdms", tmp_path), "rollout.previous_plan=none"]
    with pytest.raises(ConfigError, match=r"rollout\.previous_plan: the reward needs the plan of the frame before"):
        load_checked("real_scenes_epdms", given)
    given = [*_given("real_scenes_epdms", tmp_path), "reward.scorer_options.human_filter=onn"]
    with pytest.raises(ConfigError, match=r"reward\.scorer_options: Unknown human_filter 'onn'\. Did you mean 'on'"):
        load_checked("real_scenes_epdms", given)
    with pytest.raises(ConfigError, match=r"needs ec, which scorer 'pdms' does not yield"):
        load_checked("quickstart", ["reward.terms[0].name=ec"])


def test_single_jobs_repeat_the_numbers_of_the_quickstart(tmp_path: Path) -> None:
    whole = dict(_leaves(load_checked("quickstart", [])))
    for name in ("scenes", "sft", "rl", "compare"):
        part = dict(_leaves(load_checked(name, _given(name, tmp_path))))
        own = {"job", "name", "description", "compare.policies", "rl.policy"}
        shared = {key for key in part if not key.startswith("scenes.") and part[key] is not None} - own
        assert {key for key in shared if part[key] != whole[key]} == set(), name


def _fields(kind: Any, path: str = "") -> Iterator[str]:
    """Key paths of all leaves of the schema, whatever a recipe gives."""
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        kinds = [hints[field.name], *get_args(hints[field.name])]
        sections = [k for k in kinds if dataclasses.is_dataclass(k)]
        if sections:
            yield from _fields(sections[0], f"{path}{field.name}.")
        else:
            yield f"{path}{field.name}"


def _attributes_read() -> set[tuple[str, str]]:
    """Every (owner, attribute) that the packages read, outside the recipe's own modules."""
    pairs = set()
    for package in ("rlhf_drive", "rewards", "rollout"):
        for path in (ROOT / package).rglob("*.py"):
            if not path.name.startswith("config"):
                for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                        owner = getattr(node.value, "attr", getattr(node.value, "id", ""))
                        pairs.add((owner, node.attr))
    return pairs


def test_every_key_is_read_somewhere() -> None:
    """Sections may be handed on whole, so for most keys an attribute of that name anywhere counts."""
    read = {attribute for _, attribute in _attributes_read()}
    unread = [path for path in _fields(Recipe) if path.rpartition(".")[2] not in read]
    assert unread == []


@pytest.mark.parametrize(
    ("owner", "key"),
    [
        ("recipe", "name"),
        ("recipe", "job"),
        ("recipe", "seed"),
        ("term", "name"),
        ("gate", "name"),
        ("process", "name"),
    ],
)
def test_keys_with_everyday_names_are_read_from_their_own_section(owner: str, key: str) -> None:
    assert (owner, key) in _attributes_read()


def test_a_plan_has_as_many_tokens_as_the_schema_says() -> None:
    from rlhf_drive.policies import TrajectoryTokenizer

    tokenizer = load_checked("quickstart", []).tokenizer
    assert TrajectoryTokenizer(**dataclasses.asdict(tokenizer)).length == ACTION_TOKENS


@pytest.mark.parametrize("name", [name for name in EXPECTED if name not in ("compare", "scenes", "sft")])
def test_runs_are_long_enough_for_every_monitor(name: str, tmp_path: Path) -> None:
    rl, limits = load_checked(name, _given(name, tmp_path)).rl, MonitorLimits()
    assert rl.max_steps // rl.monitor_steps > limits.heldout_window
    assert rl.max_steps >= 2 * limits.window
