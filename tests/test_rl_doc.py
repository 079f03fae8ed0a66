"""What docs/rl.md and docs/metrics.md say is what the code knows, refuses and writes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from rlhf_drive.config import Recipe, load_recipe
from rlhf_drive.config_schema import ProcessSection, RlSection
from rlhf_drive.errors import ConfigError
from rlhf_drive.likelihood_fits import LIKELIHOODS
from rlhf_drive.objective_rules import ADVANTAGES, LOSS_TYPES
from rlhf_drive.objectives import IMPORTANCE_SAMPLING_LEVELS, KL_ESTIMATORS
from rlhf_drive.policies.processes import PROCESSES
from rlhf_drive.training.metrics import read_metrics
from rlhf_drive.training.pipeline import run

ROOT = Path(__file__).resolve().parents[1]
DOC = (ROOT / "docs" / "rl.md").read_text("utf-8")
METRICS = (ROOT / "docs" / "metrics.md").read_text("utf-8")
ELSEWHERE = {
    *("policy", "seeds", "max_steps", "learning_rate", "weight_decay", "warmup_ratio", "max_grad_norm"),
    *("num_iterations", "monitor_steps", "monitor_scenes", "save_steps", "keep_checkpoints"),
}
"""Keys of every trainer, which the recipes explain."""
DECODING = {
    "masked": (),
    "flow": (
        "process={name: flow, beta_scale: 3.0, beta_power: 0.9, distance_scale_m: 4.0}",
        *("rollout.order=all", "compare.order=all"),
    ),
    "autoregressive": ("process.name=autoregressive", "rollout.steps=16", "compare.steps=16"),
}


def part(heading: str, text: str = DOC) -> str:
    """The text below a heading, up to the next."""
    return text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def test_every_key_of_the_core_is_explained() -> None:
    names = {field.name for kind in (RlSection, ProcessSection) for field in dataclasses.fields(kind)}
    prose = re.sub(r"```.*?```", "", DOC, flags=re.DOTALL)
    spans = " ".join(re.findall(r"`([^`\n]+)`", prose))
    assert {name for name in names - ELSEWHERE if not re.search(rf"\b{name}\b", spans)} == set()
    named = set(re.findall(r"`rl\.(\w+)", DOC))
    assert named - {field.name for field in dataclasses.fields(RlSection)} == set()


@pytest.mark.parametrize(
    ("heading", "known"),
    [
        ("Process", PROCESSES),
        ("Likelihood", LIKELIHOODS),
        ("Advantages", ADVANTAGES),
        ("Importance level", IMPORTANCE_SAMPLING_LEVELS),
        ("Objective and aggregation", LOSS_TYPES),
        ("KL and the reference", KL_ESTIMATORS),
    ],
)
def test_the_first_table_of_a_section_has_every_name(heading: str, known: Iterable[str]) -> None:
    (first, *_) = re.findall(r"(?:^\|.*\n)+", part(heading), re.MULTILINE)
    rows = re.findall(r"^\| `(\w+)` \|", first, re.MULTILINE)
    assert sorted(rows) == sorted(known)


REFUSED = [
    (cells[0].strip(), tuple(re.findall(r"`([^`]+)`", cells[1])))
    for cells in (line.strip("| ").split(" | ") for line in part("Refused combinations").splitlines())
    if cells[0].strip() in DECODING
]


def test_the_table_of_refusals_was_read() -> None:
    assert len(REFUSED) == 40


@pytest.mark.parametrize(("process", "overrides"), REFUSED)
def test_what_is_said_to_be_refused_is_refused(process: str, overrides: tuple[str, ...]) -> None:
    base = DECODING[process]
    load_recipe("quickstart", base)
    with pytest.raises(ConfigError) as caught:
        load_recipe("quickstart", [*base, *overrides])
    keys = {item.partition("=")[0] for item in overrides} | {
        "rl.num_iterations",
        "rl.epsilon_high",
        "rl.importance_sampling_cap",
    }
    assert any(f"  {key}: " in str(caught.value) for key in keys), str(caught.value)


def test_the_conversion_from_trl_runs_as_shown() -> None:
    pytest.importorskip("trl")
    (block,) = [code for code in re.findall(r"```python\n(.*?)```", DOC, re.DOTALL) if "GRPOConfig" in code]
    values: dict[str, object] = {}
    exec(block, values)
    config, back, recipe = values["config"], values["back"], values["recipe"]
    assert isinstance(recipe, Recipe)
    assert (recipe.rl.loss_type, recipe.rl.epsilon_high, recipe.rl.max_steps) == ("cispo", 5.0, 200)
    for name in ("loss_type", "epsilon", "epsilon_high", "beta", "num_generations", "max_steps", "learning_rate"):
        assert getattr(back, name) == getattr(config, name), name


def test_the_commands_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    lines = re.findall(r"^rlhf-drive train (quickstart .*)$", DOC, re.MULTILINE)
    autoregressive, flow, own = (load_recipe(recipe, overrides) for recipe, *overrides in map(str.split, lines))
    assert (autoregressive.process.name, flow.process.name) == ("autoregressive", "flow")
    rl = own.rl
    assert Path(rl.loss_type.partition(":")[0]).is_file()
    assert rl.advantages.endswith("custom_objective.py:rank")


def documented() -> list[re.Pattern[str]]:
    """Names that docs/metrics.md explains; in its rows a name without area has that of the row's first."""
    found = []
    for row in METRICS.splitlines():
        names = re.findall(r"`([a-z0-9_<>/]+)`", row.partition(" | ")[0]) if row.startswith("| `") else []
        area = names[0].partition("/")[0] if names else ""
        found += [name if "/" in name else f"{area}/{name}" for name in names]
    return [re.compile(re.sub(r"<\w+>", r"[\\w/]+", name)) for name in found]


def test_every_metric_that_a_run_writes_is_explained(tiny_recipe: Callable[..., Recipe]) -> None:
    folder = run(tiny_recipe(
        "quickstart", "rl.max_steps=2", "rl.monitor_steps=1", "rl.monitor_scenes=4", "sft.max_epochs=1",
        "rl.entropy_coef=0.001", "rl.bc_coef=0.1", "rl.dynamic_sampling_budget=1.0", "rl.scene_visits=informative",
        "rl.kl_limit=1e9", "rl.on_limit=rollback", "rl.router=replay", "rl.load_balance_coef=0.01",
        "compare.metrics=[pdms]", "compare.pictures=0",
    ))  # fmt: skip
    names = {name for line in read_metrics(folder) for name in line} - {"phase", "step"}
    assert len(names) > 80
    explained = documented()
    assert sorted(name for name in names if not any(known.fullmatch(name) for known in explained)) == []
    assert not any(known.fullmatch("ratio/median") for known in explained)
