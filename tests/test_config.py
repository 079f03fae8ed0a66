"""Recipes are validated as a whole: each kind of mistake is named by its full key path, and all at once."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from rlhf_drive.config import Recipe, dump_recipe, load_recipe, read_recipe_text, shipped_recipes
from rlhf_drive.errors import ConfigError

SIZES = (
    *("tokenizer.low=-20.0", "tokenizer.high=20.0", "tokenizer.step=0.05", "rollout.scenes_per_step=32"),
    *("policy.d_model=96", "policy.num_heads=4", "policy.num_experts=4", "policy.experts_per_token=2"),
)
"""Numbers the messages below repeat, whatever the shipped recipe says."""


def _problems(*overrides: str, recipe: str | Path = "quickstart") -> list[str]:
    """Problem lines of a recipe with overrides."""
    sizes = SIZES if recipe == "quickstart" else ()
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe, [*sizes, *overrides])
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def _checkpoint(folder: Path) -> Path:
    """The folder, made to look like a policy checkpoint."""
    (folder / "policy.json").touch()
    return folder


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("rl.max_step=3", "rl.max_step: unknown key. Did you mean 'rl.max_steps'?"),
        ("jobb=rl", "jobb: unknown key. Did you mean 'job'?"),
        ("policy.zzz=1", "policy.zzz: unknown key. Keys here: d_model, num_heads, "),
        ("reward.terms[0].weigth=2", "reward.terms[0].weigth: unknown key. Did you mean 'reward.terms[0].weight'?"),
        ("seed=1.0", "seed: must be a whole number; got 1.0 (number)"),
        ("rl.max_steps=true", "rl.max_steps: must be a whole number; got True (true/false)"),
        ("rl.learning_rate=true", "rl.learning_rate: must be a number; got True (true/false)"),
        ("sft.mirror=1", "sft.mirror: must be true or false; got 1 (whole number)"),
        ("sft.mirror=null", "sft.mirror: must be true or false; got null"),
        ("name=12", "name: must be text; got 12 (whole number)"),
        ("rl.seeds=3", "rl.seeds: must be a list, such as [a, b]; got 3 (whole number)"),
        ("rl.seeds=[0,a]", "rl.seeds[1]: must be a whole number; got 'a' (text)"),
        ("rl=5", "rl: must be a mapping of keys; got 5 (whole number)"),
        ("compare.policies=[a]", "compare.policies: must be a mapping, such as {name: value}; got ['a'] (list)"),
        ("rl.beta=.nan", "rl.beta: must be a finite number; got nan"),
        ("rl.beta=.inf", "rl.beta: must be a finite number; got inf"),
        ("scenes.source=recorder", "Did you mean 'recorded'?"),
        ("device=tpu", "device: must be one of auto, cpu, cuda; got 'tpu' (text)."),
        ("output_dir=${name}", "output_dir: a recipe is read as it stands, without ${…}; got '${name}'"),
        ("rollout.num_generations=1", "rollout.num_generations: must be at least 2; got 1"),
        ("rollout.temperature=0", "rollout.temperature: must be greater than 0; got 0.0"),
        ("rollout.steps=17", "rollout.steps: must be at least 1 and at most 16; got 17"),
        ("compare.steps=0", "compare.steps: must be at least 1 and at most 16; got 0"),
        ("rl.epsilon=1", "rl.epsilon: must be greater than 0 and less than 1; got 1.0"),
        ("policy.dropout=1", "policy.dropout: must be at least 0 and less than 1; got 1.0"),
        ("scenes.heldout_fraction=1", "scenes.heldout_fraction: must be greater than 0 and less than 1; got 1.0"),
        ("tokenizer.step=0", "tokenizer.step: must be greater than 0; got 0.0"),
        ("tokenizer.step=0.03", "tokenizer.step: high - low must be a whole number of steps; got 1333.33"),
        ("tokenizer.step=0.0001", "tokenizer.step: makes 400000 steps from low to high; at most 100000"),
        ("tokenizer.low=20", "tokenizer.low: must be less than tokenizer.high; got 20 and 20"),
        ("policy.num_heads=5", "policy.num_heads: must divide policy.d_model = 96; got 5"),
        ("policy.experts_per_token=5", "policy.experts_per_token: at most policy.num_experts = 4; got 5"),
        ("rollout.top_k=802", "rollout.top_k: at most the 801 tokens of the tokenizer; got 802"),
        ("compare.top_k=802", "compare.top_k: at most the 801 tokens of the tokenizer; got 802"),
        ("name=a/b", "name: becomes a folder"),
        ("scenes.count=0", "scenes.count: must be at least 1 with source 'generate'"),
        ("scenes.path=.", "scenes.path: has no effect with source 'generate'"),
        ("scenes.source=store", "scenes.store: must be given: a scene store. Add scenes.store=FOLDER"),
        ("scenes.kinds=[cut_in,cut_in]", "scenes.kinds: names a kind twice: cut_in, cut_in"),
        ("sft.policy=nowhere", "sft.policy: there is nothing at 'nowhere'"),
        ("sft.policy=/", "sft.policy: '/' holds no policy.json. Give a policy's own folder, such as RUN/sft/policy"),
        ("rl.policy={checkpoint}", "rl.policy: a pipeline goes on from the policy it trained"),
        ("rl.seeds=[]", "rl.seeds: is empty. Give at least one seed"),
        ("rl.seeds=[1,1]", "rl.seeds: names a seed twice: 1, 1"),
        ("rl.micro_batch_scenes=1000", "rl.micro_batch_scenes: at most rollout.scenes_per_step = "),
        ("reward.terms=[]", "reward.terms: is empty. Name at least one reward"),
        ("reward.terms[0].weight=-1", "reward.terms[0].weight: must be at least 0; got -1.0"),
        ("reward.terms[0].weight=0", "reward.terms: every weight is 0, so there is nothing to learn"),
        ("compare.policies.old=nowhere", "compare.policies.old: there is nothing at 'nowhere'"),
        ("compare.policies.sft={checkpoint}", "compare.policies.sft: is the name of a policy that the pipeline trains"),
        ("compare.policies.rl-seed0={checkpoint}", "compare.policies.rl-seed0: is the name of a policy that the pip"),
        ("compare.policies.human={checkpoint}", "compare.policies.human: is also the name of a baseline"),
        ("compare.baselines=[human,human]", "compare.baselines: names a baseline twice: human, human"),
        ("compare.baselines=[robot]", "compare.baselines[0]: must be one of human, pdm_closed, constant_velocity"),
    ],
)
def test_a_mistake_is_one_line_with_its_full_key(override: str, problem: str, tmp_path: Path) -> None:
    lines = _problems(override.format(checkpoint=_checkpoint(tmp_path)) if "{checkpoint}" in override else override)
    assert len(lines) == 1
    assert problem in lines[0]


def test_all_problems_come_in_one_error() -> None:
    lines = _problems(
        "rl.max_step=3", "seed=x", "policy.num_heads=5", "tokenizer.low=99", "rollout.steps=0", "name=a/b"
    )
    assert sorted(line.split(":")[0] for line in lines) == [
        *("name", "policy.num_heads", "rl.max_step", "rollout.steps", "seed", "tokenizer.low"),
    ]


def test_a_missing_key_and_a_missing_section_are_problems(tmp_path: Path) -> None:
    text = read_recipe_text("quickstart")
    path = tmp_path / "mine.yaml"
    kept = [line for line in text.splitlines() if not line.lstrip().startswith(("max_epochs:", "heldout_fraction:"))]
    path.write_text(re.sub(r"\nlogging:\n(  .*\n)+", "\n", "\n".join(kept)))
    assert _problems(recipe=path) == [
        "sft.max_epochs: missing. A recipe is complete; add the key",
        "logging: missing. A recipe with job 'pipeline' needs this section",
        "scenes.heldout_fraction: missing. A recipe is complete; source 'generate' needs the key",
    ]


def test_a_section_the_job_does_not_use_is_a_problem() -> None:
    lines = _problems("job=scenes")
    assert "rl: job 'scenes' does not use this section. Take it out, or choose another job" in lines
    assert len(lines) == 11  # twelve sections, of which the job uses one


def test_single_jobs_ask_for_what_they_start_from(tmp_path: Path) -> None:
    assert [line.split(":")[0] for line in _problems(recipe="rl")] == ["scenes.store", "rl.policy"]
    assert [line.split(":")[0] for line in _problems(recipe="real_scenes")] == ["scenes.path"]
    assert "there is no folder 'absent'" in _problems("scenes.path=absent", recipe="real_scenes")[0]
    store = f"scenes.store={tmp_path}"
    nothing = _problems(store, "compare.baselines=[]", recipe="compare")
    assert nothing[0].startswith("compare.policies: there is nothing to compare")
    assert load_recipe("rl", [store, f"rl.policy={_checkpoint(tmp_path)}"]).rl.policy == str(tmp_path)


def test_overrides_reach_nested_keys_lists_and_mappings(tmp_path: Path) -> None:
    recipe = load_recipe(
        "quickstart",
        [
            "rl.max_steps=7",
            "rl.learning_rate=3e-5",
            "rl.beta=1",
            "scenes.kinds=[cut_in, merge]",
            "reward.terms[0].weight=2",
            "reward.terms[0].options.limit=1.5",
            f"compare.policies.old={_checkpoint(tmp_path)}",
            "name=run-1",
        ],
    )
    assert recipe.rl.max_steps == 7
    assert recipe.rl.learning_rate == 3e-5
    assert recipe.rl.beta == 1.0
    assert isinstance(recipe.rl.beta, float)
    assert recipe.scenes.kinds == ("cut_in", "merge")
    assert recipe.reward.terms[0].weight == 2.0
    assert dict(recipe.reward.terms[0].options) == {"limit": 1.5}
    assert dict(recipe.compare.policies) == {"old": str(tmp_path)}
    assert recipe.name == "run-1"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "must be written key=value"),
        ("=3", "must be written key=value"),
        ("seed=[1", "cannot be applied"),
        ("reward.terms[4].weight=2", "cannot be applied"),
        ("seed=${", "cannot be applied"),
    ],
)
def test_an_override_that_cannot_be_read_is_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_recipe("quickstart", [override])
    assert repr(override) in str(caught.value)


def test_a_recipe_survives_being_written_and_read(tmp_path: Path) -> None:
    recipe = load_recipe("quickstart", ["rl.learning_rate=1.2345678901234567e-5", "reward.terms[0].options.a=null"])
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe))
    assert load_recipe(path) == recipe
    assert dump_recipe(load_recipe(path)) == path.read_text()  # a run is resumed only with the very recipe it has
    scenes = load_recipe("scenes")
    path.write_text(dump_recipe(scenes))
    assert load_recipe(path) == scenes
    assert "rl:" not in path.read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("job: [", "not valid YAML"),
        ("- a\n- b\n", "must be a mapping of keys at the top"),
        ("", "job: missing"),
        ("seed: 1\nseed: 2\n", "duplicate key seed"),
    ],
)
def test_a_file_that_is_no_recipe_says_so(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_recipe(path)
    assert "bad.yaml" in str(caught.value)


def test_an_unknown_recipe_offers_the_closest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Unknown recipe 'quickstrat'\. Did you mean 'quickstart'"):
        load_recipe("quickstrat")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_recipe(tmp_path / "absent.yaml")


def test_recipes_are_found_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()  # a folder of the same name here must not be taken for ours
    assert "quickstart" in shipped_recipes()
    assert load_recipe("quickstart").name == "quickstart"


def test_every_key_is_explained() -> None:
    """Each field of each section has a string under it that says what it means."""
    import ast

    import rlhf_drive.config_rl as rl
    import rlhf_drive.config_schema as schema

    trees = [ast.parse(Path(module.__file__).read_text()) for module in (schema, rl)]
    classes = [node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
    undocumented = []
    for node in classes:
        for statement, after in zip(node.body, [*node.body[1:], None], strict=True):
            explained = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            if isinstance(statement, ast.AnnAssign) and not explained:
                undocumented.append(f"{node.name}.{ast.unparse(statement.target)}")
    assert undocumented == []
    assert len(dataclasses.fields(Recipe)) == 18
