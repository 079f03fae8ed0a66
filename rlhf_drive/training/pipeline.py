"""A recipe's run, stage by stage: scenes, SFT, RL per seed, comparison. Finished stages are not done again."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rewards.carriers import Scores
from rewards.from_recipe import build_service, metric_config, reward_config
from rewards.service import RewardService, check_invalid
from rlhf_drive.compare.analysis import Bootstrap, Comparison
from rlhf_drive.compare.baselines import baseline_planners
from rlhf_drive.compare.evaluate import Evaluation, Planner, evaluate
from rlhf_drive.compare.planners import PolicyPlanner
from rlhf_drive.compare.report import print_table, summary, write_report
from rlhf_drive.config import Recipe
from rlhf_drive.errors import DataError
from rlhf_drive.policies import Policy, load_policy
from rlhf_drive.policies.feature_cache import FeatureCache
from rlhf_drive.scenes import Scene, Trajectories
from rlhf_drive.scenes.store import SceneStore
from rlhf_drive.training.alerts import AlertLog
from rlhf_drive.training.build import (
    build_accelerator,
    build_policy,
    build_trainer,
    decoding_of,
    epochs_to_steps,
    loop_settings,
    precision_of,
    sampling_of,
    sft_settings,
    visiting_of,
)
from rlhf_drive.training.journal import Journal, RunJournal, SilentJournal
from rlhf_drive.training.launch import check_shared, process_group
from rlhf_drive.training.live import RL_COLUMNS, SFT_COLUMNS, Column, LiveTable
from rlhf_drive.training.long_work import on_main_for_long
from rlhf_drive.training.metrics import MetricsWriter
from rlhf_drive.training.ranks import Ranks
from rlhf_drive.training.rl import train_rl
from rlhf_drive.training.run_folder import RunFolder
from rlhf_drive.training.scenes import check_store, open_scenes
from rlhf_drive.training.services import check_engines, open_services
from rlhf_drive.training.sft import train_sft
from rlhf_drive.training.trackers import make_trackers
from rlhf_drive.training.watch import Watch, spread_out

__all__ = ["run"]

WAIT_S = 1800.0
"""How long processes of a job without section `parallel` wait for each other."""


def run(recipe: Recipe, *, resume: Path | None = None) -> Path:
    """Run a recipe's job and return its run folder. Where a launcher started several processes, all of them call it.

    Args:
        recipe: Validated recipe.
        resume: Run folder of an earlier, unfinished run of the same recipe; it goes on where the last checkpoint ends.

    Raises:
        ConfigError, DataError, CheckpointError, RewardError, StorageError, TrainingError: With what, where and what to
            do.
        RunStoppedError: A signal asked to stop; a checkpoint was written.
    """
    timeout_s = recipe.parallel.timeout_s if recipe.parallel else WAIT_S
    with process_group(recipe.device, timeout_s) as ranks:
        # Before there is a folder: the device may not be there, an engine may not do, or there are too many processes.
        accelerator = build_accelerator(recipe.device, timeout_s=timeout_s)
        if recipe.rollout:
            check_engines(recipe, ranks)
        if recipe.sft:
            sft_settings(recipe).check_processes(ranks.count)
        folder = RunFolder.resume(recipe, resume, ranks) if resume else RunFolder.create(recipe, ranks)
        check_shared(folder.path, ranks)
        with folder.locked() as locked:
            if not locked:
                print_info(f"{folder.path} lies on storage without file locks: start no second run there")
            started = time.monotonic() - folder.seconds_before()
            print_info(f"run folder: {folder.path} (if it stops: rlhf-drive train --resume {folder.path})")
            with _writer(recipe, folder.path) if ranks.main else nullcontext() as writer:
                _Run(recipe, folder, writer, accelerator, ranks, FeatureCache(), started).stages()
            folder.note_seconds(time.monotonic() - started)
        return folder.path


def _writer(recipe: Recipe, folder: Path) -> MetricsWriter:
    """Metrics, and what else the recipe sends them to; jobs that train nothing have no such section."""
    logging = recipe.logging
    if not logging:
        return MetricsWriter(folder, tensorboard=False)
    trackers = make_trackers(
        folder, project=logging.project, trackio=logging.trackio, wandb=logging.wandb, config=asdict(recipe)
    )
    return MetricsWriter(folder, logging.tensorboard, trackers, say=print_info)


@dataclass
class _Run:
    """A run in progress: what its stages share. Each process has one."""

    recipe: Recipe
    folder: RunFolder
    writer: MetricsWriter | None
    accelerator: Any
    ranks: Ranks
    features: FeatureCache
    started: float

    def stages(self) -> None:
        """The stages that the recipe's job consists of."""
        job = self.recipe.job
        store = self._scenes()
        check_store(store, *self._needs())
        if job in ("pipeline", "sft"):
            self._sft(store)
        if job in ("pipeline", "rl"):
            for seed in self.recipe.rl.seeds:
                self._rl(store, seed)
        if job in ("pipeline", "compare") and not self.folder.is_done("compare"):
            on_main_for_long(self.ranks, lambda: self._compare(store))
            self.folder.mark_done("compare", {}, time.monotonic() - self.started)

    def _needs(self) -> tuple[list[str], list[str]]:
        """Splits and simulator scores that the job's stages use."""
        recipe, job = self.recipe, self.recipe.job
        splits = ["train"] if job in ("pipeline", "sft", "rl") else []
        splits += ["heldout"] if job in ("pipeline", "sft", "compare") else []
        metrics = [recipe.reward.scorer] if job in ("pipeline", "rl") else []
        return splits, [*metrics, *(recipe.compare.metrics if job in ("pipeline", "compare") else ())]

    def _scenes(self) -> SceneStore:
        def made() -> None:
            with _progress("scenes") as on_progress:
                open_scenes(self.recipe.scenes, self.folder.path, on_progress=on_progress)

        on_main_for_long(self.ranks, made)
        store = open_scenes(self.recipe.scenes, self.folder.path)
        counts = f"{len(store.indices('train'))} train, {len(store.indices('heldout'))} held out"
        refused = len(store.info.get("refused", {})) + store.info.get("refused_more", 0)
        print_info(f"scenes: {counts}, {refused} refused")
        return store

    @contextmanager
    def _journal(
        self, phase: str, total: int, columns: tuple[Column, ...], alerts: AlertLog | None = None
    ) -> Iterator[Journal]:
        """Files and live table of a phase, on the main process."""
        if self.writer is None:
            yield SilentJournal()
            return
        with LiveTable(phase, total, columns) as table:
            yield RunJournal(self.writer, table, phase, alerts)

    def _sft(self, store: SceneStore) -> None:
        stage = self.folder.path / "sft"
        if self.folder.is_done("sft"):
            return
        settings = sft_settings(self.recipe)
        train, heldout = store.split("train"), store.split("heldout")
        policy = self._precise(build_policy(self.recipe, self.accelerator.device))
        total = epochs_to_steps(len(train), settings.batch_size, settings.max_epochs)
        with self._journal("sft", total, SFT_COLUMNS) as journal:
            result = train_sft(
                policy, train, heldout, settings, stage, accelerator=self.accelerator, features=self.features,
                journal=journal, ranks=self.ranks, strategy=self.recipe.parallel.strategy, run=self.folder.identity,
            )  # fmt: skip
        self.folder.mark_done("sft", asdict(result), time.monotonic() - self.started)
        print_info(
            f"sft: held-out loss {result.heldout_loss:.4f} nats per token in epoch {result.epoch} of {result.epochs}; "
            f"it fell by {result.late_fall:.1%} in the last fifth of them"
        )
        if not result.plateaued:
            print_info("sft: that is not flat yet; raise sft.max_epochs before judging what RL adds")

    def _precise(self, policy: Policy) -> Policy:
        """The policy with the recipe's precision."""
        policy.precision = precision_of(self.recipe.parallel)
        return policy

    def _sft_policy(self) -> Policy:
        named = self.recipe.rl.policy  # given in job `rl` only: a pipeline goes on from its own
        folder = named or self.folder.path / "sft" / "policy"
        return self._precise(load_policy(folder, device=self.accelerator.device))

    def _rl(self, store: SceneStore, seed: int) -> None:
        name, recipe = f"rl-seed{seed}", self.recipe
        if self.folder.is_done(name):
            return
        policy, folder = self._sft_policy(), self.folder.path / name
        rl, section, main = recipe.rl, recipe.reward, self.ranks.main
        sampling = sampling_of(recipe.rollout, keep_experts=rl.router == "replay")
        reward = reward_config(section)
        trainer = build_trainer(
            rl, policy, seed=seed, accelerator=self.accelerator, features=self.features, folder=folder,
            reward_weights={term.name: term.weight for term in reward.build().terms}, ranks=self.ranks,
            strategy=recipe.parallel.strategy, stale=recipe.rollout.max_staleness > 0,
        )  # fmt: skip
        with ExitStack() as stack:
            services = stack.enter_context(
                open_services(recipe, reward, trainer.policy, seed=seed, features=self.features, ranks=self.ranks)
            )
            alerts = AlertLog(self.folder.path) if main else None
            journal = stack.enter_context(self._journal(name, rl.max_steps, RL_COLUMNS, alerts))
            watch = None
            if main and rl.monitor_steps:
                epdms = build_service(metric_config("epdms"), replace(section, engine="local"))
                heldout = spread_out(store.split("heldout"), rl.monitor_scenes)
                stack.push(epdms)
                watch = Watch(heldout, epdms, sampling, every=rl.monitor_steps)
            train_rl(
                trainer, services, store.split("train"), folder, sampling=sampling, visiting=visiting_of(rl),
                settings=loop_settings(recipe, seed=seed, run=self.folder.identity), journal=journal, watch=watch,
            )  # fmt: skip
        self.folder.mark_done(name, {"steps": rl.max_steps}, time.monotonic() - self.started)

    def _policies(self) -> dict[str, Policy]:
        """Policies to compare, by name, in the order of the report."""
        folders = {name: Path(path) for name, path in self.recipe.compare.policies.items()}
        if self.recipe.job == "pipeline":
            folders["sft"] = self.folder.path / "sft" / "policy"
            folders |= {
                f"rl-seed{seed}": self.folder.path / f"rl-seed{seed}" / "policy" for seed in self.recipe.rl.seeds
            }
        return {name: load_policy(folder, device=self.accelerator.device) for name, folder in folders.items()}

    def _compare(self, store: SceneStore) -> None:
        section = self.recipe.compare
        policies = self._policies()
        scenes = _unseen(store.split("heldout"), policies)
        planners: list[Planner] = [
            PolicyPlanner(name, policy, decoding_of(section), section.samples, section.seed, self.features)
            for name, policy in policies.items()
        ]
        planners += baseline_planners(section.baselines)
        reward = self.recipe.reward
        trained = reward_config(reward)
        # The recipe's own terms are reported too, unless another scorer is asked for first, or they need the frame
        # before, which not every planner has; the metric takes EC in wherever it can.
        own = reward.scorer == section.metrics[0] and not trained.build().two_frame
        configs = [trained if own else metric_config(section.metrics[0], reward)]
        configs += [metric_config(metric, reward) for metric in section.metrics[1:]]
        with ExitStack() as stack:
            services = [
                _Tolerant(
                    stack.push(build_service(config, reward, address=self.recipe.ray.address)),
                    reward.max_invalid_fraction,
                )
                for config in configs
            ]
            with _progress("compare") as on_progress:
                evaluation = evaluate(
                    planners, scenes, services[0], extra=services[1:], two_frame="epdms" in section.metrics,
                    on_progress=lambda name, done, total: on_progress(done, total, name),
                )  # fmt: skip
        self._report(evaluation, scenes)

    def _report(self, evaluation: Evaluation, scenes: Sequence[Scene]) -> None:
        section, path = self.recipe.compare, self.folder.path
        bootstrap = Bootstrap(section.bootstrap_samples, section.confidence, section.seed)
        seeds = tuple(name for name in evaluation.planners if name.startswith("rl-seed"))
        comparisons = _comparisons(list(section.policies), seeds, list(evaluation.planners))
        write_report(
            evaluation, path, scenes=scenes, comparisons=comparisons, pictures=section.pictures, bootstrap=bootstrap,
            title=self.recipe.name,
        )  # fmt: skip
        print_rich(print_table(evaluation))
        minutes = (time.monotonic() - self.started) / 60.0
        if seeds and "sft" in evaluation.planners:
            result = summary(
                evaluation, "sft", seeds, minutes, bootstrap_samples=section.bootstrap_samples, seed=section.seed
            )
            result["sft_training"] = self.folder.done("sft")
            (path / "summary.json").write_text(json.dumps(result, indent=2) + "\n")
            gain, head = result["gain"], evaluation.headline
            low, high = gain["ci95"]
            interval = "no interval: too few clusters" if low is None else f"95 % interval [{low:+.2f}, {high:+.2f}]"
            better, equal = result["win_rate"], result["tie_rate"]
            shares = f"better on {better:.0%} of the scenes, equal on {equal:.0%}, worse on {1 - better - equal:.0%}"
            print_info(f"RL gain over SFT: {gain[head]:+.2f} {head.upper()} points, {interval}; {shares}")


def _unseen(scenes: Sequence[Scene], policies: Mapping[str, Policy]) -> Sequence[Scene]:
    """The scenes that no policy has trained on; what is left out is said, by policy.

    Raises:
        DataError: Nothing is left.
    """
    unseen = scenes
    for name, policy in policies.items():
        seen = sum(policy.has_trained_on(scene) for scene in scenes)
        if seen:
            print_info(f"compare: leaving out {seen} of {len(scenes)} held-out scenes that {name} has trained on")
            unseen = [scene for scene in unseen if not policy.has_trained_on(scene)]
    if not unseen:
        raise DataError(
            f"All {len(scenes)} held-out scenes belong to clusters that the policies have trained on. Compare on other "
            "scenes, or split them with the seed and share used in training."
        )
    return unseen


def _comparisons(policies: list[str], seeds: tuple[str, ...], evaluated: list[str]) -> list[Comparison]:
    """The report's questions: RL against SFT first, both against baselines, other policies against the first."""
    found = []
    if seeds:
        found = [Comparison("rl", seeds, name) for name in ("sft", "constant_velocity", "pdm_closed", "human")]
        found.insert(1, Comparison("sft", ("sft",), "constant_velocity"))
    found += [Comparison(name, (name,), policies[0]) for name in policies[1:]]
    return [c for c in found if {*c.policies, c.reference} <= set(evaluated)]


@dataclass(frozen=True)
class _Tolerant:
    """Scores plans, and stops when more of a batch cannot be scored than the recipe tolerates."""

    rewards: RewardService
    max_invalid_fraction: float

    def score(
        self, scenes: Sequence[Scene], trajectories: Trajectories, previous: Trajectories | None = None
    ) -> Scores:
        """Scores of all rows."""
        scores = self.rewards.score(scenes, trajectories, previous)
        check_invalid(scores, self.max_invalid_fraction)
        return scores


def print_info(text: str) -> None:
    """One line for the person who watches."""
    print(text, flush=True)  # noqa: T201


def print_rich(renderable: Any) -> None:
    """A rich table on the terminal."""
    from rich.console import Console

    Console().print(renderable)


@contextmanager
def _progress(name: str) -> Iterator[Any]:
    """A progress bar that is advanced by ``on_progress(done, total, text)``."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task(name, total=None)

        def on_progress(done: int, total: int, text: str) -> None:
            progress.update(task, completed=done, total=total, description=f"{name}: {text}")

        yield on_progress
