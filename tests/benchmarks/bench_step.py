"""Where the time of one RL step goes: policy network, scorer, and everything else, which should be under a tenth.

Run: ``OMP_NUM_THREADS=1 python tests/benchmarks/bench_step.py [--process masked|flow|autoregressive] [KEY=VALUE ...]``.
The steps are those of the shipped recipe (32 scenes of 8 plans, 2 updates, KL to the reference), run by `train_rl` with
metrics file and TensorBoard. Scenes are generated, and a fresh policy learns them for some seconds; `--scenes` and
`--policy` take a scene store and a checkpoint instead. Overrides of the recipe go last.

Times are this process's processor time. Plans are scored in the thread that waits for them, and all scenes were seen
before. A moment belongs to one part, the innermost that is entered; what no part claims has a line of its own, so the
parts add up to the step. Steps with and without the watching of parts take turns, so that its cost is known. Left out:
scoring held-out scenes, which is network and scorer once more; a checkpoint's time is printed beside the table.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from step_clock import REST, Clock, watch_network

import rlhf_drive.training.rl as rl_module
import rlhf_drive.training.trainer as trainer_module
from rewards.carriers import Scores
from rewards.from_recipe import build_service, reward_config
from rewards.hack_detector import Alert
from rewards.service import LocalRewardService
from rlhf_drive.config import Recipe, ScenesSection, load_recipe
from rlhf_drive.likelihood import passes
from rlhf_drive.policies import Policy, TrajectoryTokenizer, autoregressive, flow, load_policy, masked
from rlhf_drive.policies.feature_cache import FeatureCache
from rlhf_drive.policies.moe import RouterRecord
from rlhf_drive.scenes import Scene, Trajectories
from rlhf_drive.scenes.store import SceneStore
from rlhf_drive.training import logp_source
from rlhf_drive.training.build import build_accelerator, build_policy, build_trainer, sampling_of, visiting_of
from rlhf_drive.training.checkpoint import CheckpointStore
from rlhf_drive.training.engine import TrainingEngine
from rlhf_drive.training.journal import RunJournal
from rlhf_drive.training.live import RL_COLUMNS, LiveTable
from rlhf_drive.training.metrics import MetricsWriter
from rlhf_drive.training.not_finite import Evidence
from rlhf_drive.training.rl import LoopSettings
from rlhf_drive.training.scenes import build_scenes
from rlhf_drive.training.step_collector import Services
from rlhf_drive.training.trainer import RlTrainer
from rlhf_drive.training.update_batch import UpdateBatch
from rlhf_drive.training.watch import Watch
from rollout import LocalRolloutService
from rollout import service as rollout_service

RECIPES = {"masked": "real_scenes_masked", "flow": "real_scenes_flow", "autoregressive": "real_scenes"}
TARGET = 0.1
"""Share of a step that everything but network and scorer may take."""
NETWORK = ("encoder", "decoder", "head", "encoder backward", "decoder backward", "head backward")
SOFTMAX = ("log-probabilities", "log-probabilities backward", "draws")
"""From logits to what is asked of them, over all tokens of the vocabulary: the output layer's other half."""
STAGES = ("rollout", "reference", "first update", "later updates", REST)
SFT_UPDATES = 60

Times = Mapping[tuple[str, str], float]


class InTurn:
    """Scores in the caller's thread, so that the scorer's time is there to be seen."""

    def __init__(self, service: LocalRewardService, clock: Clock) -> None:
        self._service, self._clock, self.stats = service, clock, service.stats

    def submit(
        self, scenes: Sequence[Scene], trajectories: Trajectories, previous: Trajectories | None = None
    ) -> Future[Scores]:
        """Scores that are there already."""
        future: Future[Scores] = Future()
        with self._clock.on("scorer"):
            future.set_result(self._service.score(scenes, trajectories, previous))
        return future


class Steps:
    """A journal that ends a step's account when the step is logged; every other step is watched part by part."""

    def __init__(self, journal: RunJournal, trainer: RlTrainer, clock: Clock, warm: int) -> None:
        self._journal, self._trainer, self._clock, self._warm = journal, trainer, clock, warm
        self.watched: list[tuple[float, Times]] = []
        self.bare: list[float] = []
        self.flat: list[float] = []
        self._watching = ExitStack()
        self._started = time.process_time()

    def resume(self, step: int) -> None:
        """As the run's journal does."""
        self._journal.resume(step)

    def note(self, text: str) -> None:
        """As the protocol says."""
        self._journal.note(text)

    def warn(self, alert: Alert) -> None:
        """As the run's journal does."""
        self._journal.warn(alert)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log as the run's journal does; then one step ends and the next begins."""
        with self._clock.on("journal"):
            self._journal.log(step, metrics)
        found, now = self._clock.take(), time.process_time()
        if step > self._warm and step % 2:
            self.watched.append((now - self._started, found))
            self.flat.append(metrics["groups/degenerate_frac"])
        elif step > self._warm:
            self.bare.append(now - self._started)
        self._watching.close()
        if step % 2 == 0:
            self._watching.enter_context(watch_step(self._clock, self._trainer))
        self._clock.take()
        self._started = time.process_time()


@contextmanager
def watch_step(clock: Clock, trainer: RlTrainer) -> Iterator[None]:
    """Charge every part of a step by name."""
    score_draws, iteration = passes.score_draws, RlTrainer._iteration

    def scored(*args: Any, **options: Any) -> Any:
        with clock.on("log-probabilities"):
            logp, entropies = score_draws(*args, **options)
        clock.turn_at(logp, "log-probabilities backward")
        return logp, entropies

    def iterated(*args: Any, **options: Any) -> Any:
        with clock.during("first update" if options["first"] else "later updates"):
            return iteration(*args, **options)

    parts: list[tuple[Any, str, str]] = [
        (masked, "draw", "draws"),
        (flow, "draw", "draws"),
        (autoregressive, "draw", "draws"),
        (FeatureCache, "batch", "features"),
        (rollout_service, "row_uniforms", "random numbers"),
        (logp_source, "row_uniforms", "random numbers"),
        (TrajectoryTokenizer, "decode", "tokens to plans"),
        (LocalRolloutService, "sample", "decode steps: masks, trace"),
        (logp_source.LogpSource, "logp", "likelihood: states, rows"),
        (UpdateBatch, "micro_batches", "micro-batches"),
        (UpdateBatch, "loss_inputs", "micro-batches"),
        (UpdateBatch, "keep", "micro-batches"),
        (trainer, "advantages", "advantages"),
        (trainer, "objective", "objective"),
        (trainer.engine.accelerator, "backward", "objective backward"),
        (trainer_module, "check_finite", "checks"),
        (Evidence, "concatenate", "checks"),
        (TrainingEngine, "step", "gradient norm"),
        (trainer.optimizer, "step", "optimizer"),
        (trainer.optimizer, "zero_grad", "optimizer"),
        (trainer_module, "merge_metrics", "metrics"),
        (RouterRecord, "load_cv", "metrics"),
        (RouterRecord, "flips", "metrics"),
        (RouterRecord, "dropped_frac", "metrics"),
        (rl_module, "reward_metrics", "metrics"),
        (Watch, "look", "monitors"),
    ]
    patches = [mock.patch.object(owner, name, clock.timed(part, getattr(owner, name))) for owner, name, part in parts]
    patches += [
        mock.patch.object(passes, "score_draws", scored),
        mock.patch.object(RlTrainer, "_iteration", iterated),
        mock.patch.object(RlTrainer, "_reference_logp", clock.staged("reference", RlTrainer._reference_logp)),
        mock.patch.object(rl_module, "collect", clock.staged("rollout", rl_module.collect)),
    ]
    with ExitStack() as stack:
        stack.enter_context(watch_network(clock))
        for patch in patches:
            stack.enter_context(patch)
        yield


def generated(count: int) -> list[Scene]:
    """Scenes with what the scorer needs."""
    section = ScenesSection(source="generate", path=None, store=None, count=2 * count, seed=3, heldout_fraction=0.25)
    with tempfile.TemporaryDirectory() as name:
        return build_scenes(section, Path(name) / "store", workers=1).split("train")[:count]


def learn(policy: Policy, scenes: Sequence[Scene], features: FeatureCache, order: str) -> None:
    """Some updates on what the human drove, so that plans differ in reward as those of a policy after SFT do."""
    tokens = torch.from_numpy(policy.tokenizer.encode(np.stack([s.reference.human_poses for s in scenes])))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(SFT_UPDATES):
        context = policy.encode(features.batch(policy, scenes))
        policy.process.sft_loss(policy, tokens, context, order, generator).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()


def run(recipe: Recipe, scenes: Sequence[Scene], policy: Policy, features: FeatureCache, warm: int) -> Steps:
    """The recipe's RL steps, watched; prints what a checkpoint costs."""
    clock, saved = Clock(), CheckpointStore.save
    seconds: list[float] = []

    def save(*args: Any, **options: Any) -> Path:
        start = time.process_time()
        path = saved(*args, **options)
        seconds.append(time.process_time() - start)
        return path

    with (
        tempfile.TemporaryDirectory() as name,
        mock.patch.object(CheckpointStore, "save", save),
        build_service(reward_config(recipe.reward), recipe.reward) as service,
        MetricsWriter(name, tensorboard=True) as writer,
        LiveTable("rl", recipe.rl.max_steps, RL_COLUMNS, stream=io.StringIO()) as table,
    ):
        assert isinstance(service, LocalRewardService)
        trainer = build_trainer(
            recipe.rl, policy, seed=0, accelerator=build_accelerator("cpu"), features=features, folder=Path(name),
            reward_weights={term.name: term.weight for term in recipe.reward.terms},
        )  # fmt: skip
        steps = Steps(RunJournal(writer, table, "rl"), trainer, clock, warm)
        rl_module.train_rl(
            trainer,
            Services(
                LocalRolloutService(policy, seed=0, features=features),
                InTurn(service, clock),  # type: ignore[arg-type]
            ),
            scenes,
            Path(name),
            sampling=sampling_of(recipe.rollout),
            visiting=visiting_of(recipe.rl),
            settings=LoopSettings(
                seed=0,
                save_steps=recipe.rl.max_steps,
                keep_checkpoints=1,
                max_invalid_fraction=recipe.reward.max_invalid_fraction,
            ),
            journal=steps,
        )
    print(f"a checkpoint takes {1e3 * seconds[-1]:.0f} ms, not counted below")
    return steps


def print_table(steps: Steps) -> tuple[float, float]:
    """Milliseconds a step by part and stage, and shares; those of distributions and of everything else."""
    count = len(steps.watched)
    total = 1e3 * float(np.mean([seconds for seconds, _ in steps.watched]))
    table: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for _, found in steps.watched:
        for (stage, part), seconds in found.items():
            table[part][stage] += 1e3 * seconds / count
    table["other threads"][REST] = total - sum(sum(row.values()) for row in table.values())
    others = [part for part in table if part not in (*NETWORK, *SOFTMAX, "scorer")]
    others.sort(key=lambda part: -sum(table[part].values()))
    print(f"{'ms of processor time':28}" + "".join(f"{stage:>15}" for stage in STAGES) + f"{'step':>10}{'share':>9}")
    groups = {"network": NETWORK, "scorer": ("scorer",), "distributions": SOFTMAX, "everything else": others}
    shares = []
    for title, parts in groups.items():
        rows = {part: table[part] for part in parts if part in table}
        whole = {stage: sum(row.get(stage, 0.0) for row in rows.values()) for stage in STAGES}
        shares.append(sum(whole.values()) / total)
        for label, row in ((title, whole), *((f"  {part}", row) for part, row in rows.items() if part != title)):
            cells = "".join(f"{row.get(stage, 0.0):15.1f}" for stage in STAGES)
            print(f"{label:28}{cells}{sum(row.values()):10.1f}{sum(row.values()) / total:9.1%}")
    print(f"{'step':28}{'':75}{total:10.1f}{sum(shares):9.1%}")
    watching = np.mean([seconds for seconds, _ in steps.watched]) / np.mean(steps.bare)
    print(f"{count} watched steps take {watching:.3f} times as long as {len(steps.bare)} others; ", end="")
    print(f"{np.mean(steps.flat):.0%} of the groups have no spread and are left out of updates")
    return shares[-2], shares[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--process", choices=tuple(RECIPES), default="masked")
    parser.add_argument("--likelihood", help="instead of the recipe's")
    parser.add_argument("--scenes", type=Path, help="scene store, instead of 64 generated scenes")
    parser.add_argument("--policy", type=Path, help="checkpoint to start from")
    parser.add_argument("--steps", type=int, default=12, help="steps measured, half of them part by part")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the recipe")
    options = parser.parse_args()
    torch.set_num_threads(1)
    overrides = ["scenes.path=.", "device=cpu", "reward.workers=1", *options.overrides]
    if options.likelihood:
        overrides.append(f"rl.likelihood={options.likelihood}")
    size = load_recipe(RECIPES[options.process], overrides).rollout.scenes_per_step
    count = 2 * size
    scenes = (SceneStore.open(options.scenes).split("train") if options.scenes else generated(count))[:count]
    warm = 2 + len(scenes) // size
    recipe = load_recipe(RECIPES[options.process], [*overrides, f"rl.max_steps={warm + options.steps}"])
    features = FeatureCache()
    policy = load_policy(options.policy) if options.policy else build_policy(recipe, torch.device("cpu"))
    if not options.policy:
        learn(policy, scenes, features, recipe.sft.mask_order)
    softmax, others = print_table(run(recipe, scenes, policy, features, warm))
    print(f"everything else: {others:.1%} of a step, {softmax + others:.1%} with distributions; target {TARGET:.0%}")


if __name__ == "__main__":
    main()
