"""Rules between the keys of a recipe: what the type and range of one key alone cannot say."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from rlhf_drive.config_rl_rules import find_rl_conflicts
from rlhf_drive.config_scale_rules import find_scale_conflicts
from rlhf_drive.config_schema import (
    POLICY_FILE,
    PROCESS_KEYS,
    SECTIONS,
    SOURCE_KEYS,
    CompareSection,
    Recipe,
    ScenesSection,
    TokenizerSection,
)

__all__ = ["MAX_BINS", "find_conflicts", "missing_keys"]

MAX_BINS = 100_000
"""Largest number of steps between a tokenizer's low and high."""


def missing_keys(data: Mapping[str, object]) -> Iterator[str]:
    """Sections and scene keys that the job and the source need but the recipe lacks, and sections it would not use.

    Args:
        data: The recipe as YAML gave it.
    """
    job = data.get("job")
    if isinstance(job, str) and job in SECTIONS:
        for name in SECTIONS["pipeline"]:
            if name in SECTIONS[job] and name not in data:
                yield f"{name}: missing. A recipe with job {job!r} needs this section"
            if name not in SECTIONS[job] and name in data:
                yield f"{name}: job {job!r} does not use this section. Take it out, or choose another job"
    scenes = data.get("scenes")
    if isinstance(scenes, Mapping):
        for name in SOURCE_KEYS.get(str(scenes.get("source")), ()):
            if name not in scenes:
                yield f"scenes.{name}: missing. A recipe is complete; source {scenes['source']!r} needs the key"
    process = data.get("process")
    if isinstance(process, Mapping) and process.get("name") in PROCESS_KEYS:
        own = PROCESS_KEYS[str(process["name"])]
        for name in dict.fromkeys(key for keys in PROCESS_KEYS.values() for key in keys):
            if name in own and name not in process:
                yield f"process.{name}: missing. A recipe is complete; process {process['name']!r} needs the key"
            if name not in own and name in process:
                yield f"process.{name}: has no effect with process {process['name']!r}. Take it out"


def find_conflicts(recipe: Recipe) -> Iterator[str]:
    """Problems between keys that are right one by one; ``key.path: what is wrong``, one line each.

    Args:
        recipe: The recipe; a section or value with a problem of its own is None and left out.
    """
    if recipe.name and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", recipe.name):
        yield f"name: becomes a folder, so only letters, digits, '-', '_' and '.' are allowed; got {recipe.name!r}"
    if recipe.scenes:
        yield from _scenes(recipe.scenes)
    if recipe.tokenizer:
        yield from _tokenizer(recipe.tokenizer)
    yield from _policy(recipe)
    yield from _reward(recipe)
    yield from _rl(recipe)
    yield from find_rl_conflicts(recipe)
    yield from find_scale_conflicts(recipe)
    if recipe.compare:
        yield from _compare(recipe.job, recipe.compare)


def _scenes(scenes: ScenesSection) -> Iterator[str]:
    if scenes.source == "generate" and scenes.count == 0:
        yield "scenes.count: must be at least 1 with source 'generate'"
    if scenes.source in ("recorded", "navsim"):
        what = "the folder of recordings" if scenes.source == "recorded" else "the folder of metric caches"
        yield from _given_folder("scenes.path", scenes.path, what, "scenes.path=FOLDER")
    elif scenes.path is not None:
        yield f"scenes.path: has no effect with source {scenes.source!r}. Set it to null, or scenes.source=recorded"
    if scenes.source == "navsim" and scenes.logs is not None:
        yield from _given_folder("scenes.logs", scenes.logs, "the folder of NAVSIM logs", "scenes.logs=FOLDER")
    elif scenes.logs is not None:
        yield f"scenes.logs: has no effect with source {scenes.source!r}. Set it to null, or scenes.source=navsim"
    if scenes.source == "store":
        yield from _given_folder("scenes.store", scenes.store, "a scene store", "scenes.store=FOLDER")
    if len(set(scenes.kinds)) != len(scenes.kinds):
        yield f"scenes.kinds: names a kind twice: {', '.join(scenes.kinds)}"


def _tokenizer(tokenizer: TokenizerSection) -> Iterator[str]:
    if tokenizer.low >= tokenizer.high:
        yield f"tokenizer.low: must be less than tokenizer.high; got {tokenizer.low:g} and {tokenizer.high:g}"
        return
    bins = (tokenizer.high - tokenizer.low) / tokenizer.step
    if bins > MAX_BINS + 0.5:
        yield f"tokenizer.step: makes {bins:g} steps from low to high; at most {MAX_BINS}. Choose a larger step"
    elif abs(bins - round(bins)) > 1e-6 or round(bins) < 1:
        yield f"tokenizer.step: high - low must be a whole number of steps; got {bins:.6g}"


def _policy(recipe: Recipe) -> Iterator[str]:
    policy = recipe.policy
    if policy and policy.d_model % policy.num_heads:
        yield f"policy.num_heads: must divide policy.d_model = {policy.d_model}; got {policy.num_heads}"
    if policy and policy.experts_per_token > policy.num_experts:
        most, got = policy.num_experts, policy.experts_per_token
        yield f"policy.experts_per_token: at most policy.num_experts = {most}; got {got}"
    if recipe.sft:
        yield from _existing("sft.policy", recipe.sft.policy)
    bins = round((recipe.tokenizer.high - recipe.tokenizer.low) / recipe.tokenizer.step) if recipe.tokenizer else 0
    for name, section in (("rollout", recipe.rollout), ("compare", recipe.compare)):
        if section and bins > 0 and section.top_k > bins + 1:
            yield f"{name}.top_k: at most the {bins + 1} tokens of the tokenizer; got {section.top_k}. 0 takes all"


def _reward(recipe: Recipe) -> Iterator[str]:
    terms = recipe.reward.terms if recipe.reward else None
    if terms == ():
        yield "reward.terms: is empty. Name at least one reward, such as {name: pdms, weight: 1.0}"
    elif terms and not any(term.weight > 0 for term in terms):
        yield "reward.terms: every weight is 0, so there is nothing to learn. Give a term a weight above 0"


def _rl(recipe: Recipe) -> Iterator[str]:
    rl, rollout = recipe.rl, recipe.rollout
    if not rl:
        return
    if recipe.job == "rl" and rl.policy is None:
        yield "rl.policy: must be given with job 'rl': the checkpoint to start from. Add rl.policy=CHECKPOINT"
    if recipe.job == "pipeline" and rl.policy is not None:
        yield "rl.policy: a pipeline goes on from the policy it trained. Set it to null, or use sft.policy or job 'rl'"
    yield from _existing("rl.policy", rl.policy)
    if not rl.seeds:
        yield "rl.seeds: is empty. Give at least one seed"
    if len(set(rl.seeds)) != len(rl.seeds):
        yield f"rl.seeds: names a seed twice: {', '.join(map(str, rl.seeds))}"
    if rollout and rl.micro_batch_scenes > rollout.scenes_per_step:
        yield (
            f"rl.micro_batch_scenes: at most rollout.scenes_per_step = {rollout.scenes_per_step}; "
            f"got {rl.micro_batch_scenes}"
        )


def _compare(job: str, compare: CompareSection) -> Iterator[str]:
    for name, path in compare.policies.items():
        yield from _existing(f"compare.policies.{name}", path)
        if name in compare.baselines:
            yield f"compare.policies.{name}: is also the name of a baseline. Choose another name"
        if job == "pipeline" and (name == "sft" or name.startswith("rl-seed")):
            yield f"compare.policies.{name}: is the name of a policy that the pipeline trains. Choose another name"
    if len(set(compare.baselines)) != len(compare.baselines):
        yield f"compare.baselines: names a baseline twice: {', '.join(compare.baselines)}"
    if len(set(compare.metrics)) != len(compare.metrics) or not compare.metrics:
        yield f"compare.metrics: name pdms, epdms or both, each once; got [{', '.join(compare.metrics)}]"
    if job == "compare" and not compare.policies and not compare.baselines:
        yield "compare.policies: there is nothing to compare. Add compare.policies.NAME=CHECKPOINT or a baseline"


def _given_folder(path: str, value: str | None, what: str, example: str) -> Iterator[str]:
    """A folder that must be named and exist."""
    if value is None:
        yield f"{path}: must be given: {what}. Add {example}"
    elif not Path(value).is_dir():
        yield f"{path}: there is no folder {value!r} (relative paths start at {Path.cwd()})"
    elif what == "a scene store" and (Path(value) / "stages.json").is_file():
        yield f"{path}: {value!r} is a run folder. Give its scene store, {str(Path(value) / 'scenes')!r}"


def _existing(path: str, value: str | None) -> Iterator[str]:
    """A checkpoint that must exist if it is named."""
    if value is None:
        return
    if not Path(value).exists():
        yield f"{path}: there is nothing at {value!r} (relative paths start at {Path.cwd()})"
    elif not (Path(value) / POLICY_FILE).is_file():
        yield f"{path}: {value!r} holds no {POLICY_FILE}. Give a policy's own folder, such as RUN/sft/policy"
