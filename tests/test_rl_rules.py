"""Rules between RL keys and the decoding process: what does not fit is refused before any work starts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_drive.config import load_recipe
from rlhf_drive.config_rl_rules import process_of_checkpoint
from rlhf_drive.errors import ConfigError


def problems_of(*overrides: str, recipe: str = "quickstart") -> str:
    """The message a recipe is refused with."""
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe, overrides)
    return str(caught.value)


def checkpoint(folder: Path, process: str) -> Path:
    """A folder that looks like a policy of `process` from outside."""
    folder.mkdir()
    (folder / "policy.json").write_text(json.dumps({"process": {"name": process}}))
    return folder


FLOW = ("process={name: flow, beta_scale: 3.0, beta_power: 0.9, distance_scale_m: 4.0}",)
IN_ALL = ("rollout.order=all", "compare.order=all")
BALANCED = ("rl.router=free", "rl.load_balance_coef=0.1")
CAUSAL = ("process.name=autoregressive", "rollout.steps=16", "compare.steps=16")


def test_processes_with_their_own_decoding_are_valid() -> None:
    assert load_recipe("quickstart", [*FLOW, *IN_ALL]).process.name == "flow"
    assert load_recipe("quickstart", CAUSAL).process.name == "autoregressive"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (FLOW, "rollout.order: process 'flow' decodes in order 'all' only; got 'causal'"),
        (FLOW, "compare.order: process 'flow' decodes in order 'all' only; got 'causal'"),
        ((*CAUSAL, "rollout.order=random"), "process 'autoregressive' decodes in order 'causal' only; got 'random'"),
        (("process.name=autoregressive",), "rollout.steps: an autoregressive policy decides one token"),
        (("rollout.order=all",), "rollout.order: a masked policy reveals each position once"),
        (("process.name=flow",), "process.beta_scale: missing"),
        (("process.beta_scale=2.0",), "process.beta_scale: has no effect with process 'masked'"),
        ((*CAUSAL, "rl.likelihood=elbo"), "rl.likelihood: Likelihood 'elbo' does not fit process 'autoregressive'"),
        ((*FLOW, *IN_ALL, "rl.likelihood=mean_field"), "Use one of: trace, marginal"),
        (("rl.likelihood=marginal",), "rl.likelihood: Likelihood 'marginal' does not fit process 'masked'"),
        ((*CAUSAL, "policy.routing=expert_choice"), "policy.routing: with expert_choice an expert compares a token"),
        (("rl.likelihood_steps=4",), "rl.likelihood_steps: likelihood_steps leaves decode steps out"),
        (("rl.router=replay", "rl.likelihood=coupled"), "rl.router: router 'replay' repeats the sampler's experts"),
        (("rl.likelihood=sandwich",), "rl.num_iterations: likelihood 'sandwich' has no ratio"),
        (("rl.likelihood_antithetic=true",), "rl.likelihood_antithetic: pairs the masks of"),
        (("rl.likelihood_antithetic=true", "rl.likelihood=elbo"), "so likelihood_draws must be even; got 1"),
        (("rl.likelihood=sandwich", "rl.num_iterations=1", "rl.kl_in=reward"), "rl.kl_in: likelihood 'sandwich'"),
        (("rl.importance_sampling_level=step", "rl.likelihood=elbo"), "does not visit the decode steps"),
        (("rl.sync_ref_model=true", "rl.beta=0.0"), "rl.sync_ref_model: has no effect with beta 0"),
        (("rl.sync_ref_model=true", "rl.lora_rank=8"), "the reference of a LoRA run is the policy without adapters"),
        (("rl.lora_rank=8", "rl.router_z_coef=0.1"), "rl.router_z_coef: adapters leave routers as they are"),
        (("rl.load_balance_coef=0.1",), "rl.load_balance_coef: routers are frozen"),
        ((*BALANCED, "rl.max_tokens_per_forward=64"), "rl.load_balance_coef: is a loss of a whole micro-batch"),
        ((*BALANCED, "policy.routing=expert_choice"), "rl.load_balance_coef: with expert_choice every expert has"),
        (("rl.kl_in=reward", "rl.beta=0.0"), "rl.kl_in: has no effect with beta 0"),
        (("rl.likelihood_draws=4",), "rl.likelihood_draws: has no effect with likelihood 'trace'"),
        (("rl.advantages=gdpo", "reward.gates=[{name: nc}]"), "gdpo normalises each term by itself"),
        (("rl.advantages=gdpo", "rl.kl_in=reward"), "rl.kl_in: gdpo looks at the reward's terms"),
        (("rl.loss_type=gspo",), "rl.loss_type: 'gspo' is loss_type 'grpo' with importance_sampling_level 'sequence'"),
        (("rl.loss_type=mine.py",), "rl.loss_type: 'mine.py' names a file; name the function in it too"),
        (("rl.ratio_limit=0.9",), "rl.ratio_limit: ratios start at 1"),
        (("rl.kl_limit=0.1", "rl.num_iterations=1"), "rl.on_limit: next_batch leaves out what follows"),
        (("rl.lora_rank=1000", "policy.expert_dim=24"), "rl.lora_rank: at most policy.expert_dim = 24, a side"),
        (("rl.lora_rank=1000", "rl.lora_experts=false"), "rl.lora_rank: at most policy.d_model"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_the_reason(overrides: tuple[str, ...], message: str) -> None:
    assert message in problems_of(*overrides)


def test_what_fits_is_let_through() -> None:
    token = ("rl.importance_sampling_level=token", "rl.likelihood_steps=4")
    assert load_recipe("quickstart", token).rl.likelihood_steps == 4
    assert load_recipe("quickstart", ["rl.router=record", "rl.likelihood=coupled"]).rl.router == "record"
    assert load_recipe("quickstart", ["rl.kl_limit=0.1", "rl.num_iterations=2"]).rl.kl_limit == 0.1
    one = ("rl.kl_limit=0.1", "rl.num_iterations=1", "rl.on_limit=rollback")
    assert load_recipe("quickstart", one).rl.num_iterations == 1
    assert load_recipe("quickstart", ["rl.lora_rank=24", "policy.expert_dim=24"]).rl.lora_rank == 24
    assert load_recipe("quickstart", ["rl.likelihood=sandwich", "rl.num_iterations=1"]).rl.num_iterations == 1


def test_a_job_of_its_own_goes_by_the_checkpoints_process(tmp_path: Path) -> None:
    flow = checkpoint(tmp_path / "flow", "flow")
    assert process_of_checkpoint(str(flow)) == "flow"
    given = (f"scenes.store={tmp_path}", f"rl.policy={flow}")
    assert f"rollout.order: process 'flow' (of {flow}) decodes in order 'all' only" in problems_of(*given, recipe="rl")
    assert load_recipe("rl", [*given, "rollout.order=all", "rl.likelihood=marginal"]).rl.likelihood == "marginal"


def test_policies_of_two_processes_are_not_compared_with_one_decoding(tmp_path: Path) -> None:
    flow, masked = (checkpoint(tmp_path / name, name) for name in ("flow", "masked"))
    given = (f"scenes.store={tmp_path}", f"compare.policies.a={flow}", f"compare.policies.b={masked}")
    assert "compare.order: process 'flow'" in problems_of(*given, recipe="compare")
    assert "compare.order: a masked policy" in problems_of(*given, "compare.order=all", recipe="compare")


def test_a_manifest_that_cannot_be_read_decides_nothing(tmp_path: Path) -> None:
    assert process_of_checkpoint(str(tmp_path)) is None
    (tmp_path / "policy.json").write_text("[1, 2")
    assert process_of_checkpoint(str(tmp_path)) is None
    (tmp_path / "policy.json").write_text('{"process": 3}')
    assert process_of_checkpoint(str(tmp_path)) is None


def test_checking_a_recipe_loads_no_network_library() -> None:
    code = (
        "import sys; from rlhf_drive.cli_check import load_checked; load_checked('quickstart', []); "
        "print(sorted({'torch', 'trl', 'peft', 'accelerate', 'transformers', 'ray'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "[]"
