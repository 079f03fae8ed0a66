"""A recipe's run, stage by stage: scenes, SFT, RL per seed, comparison. Finished stages are not done again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rewards.from_recipe import build_service, metric_config, reward_config
from rlhf_drive.config import Recipe
from rlhf_drive.disk import resume_command
from rlhf_drive.policies import Policy, load_policy
from rlhf_drive.policies.feature_cache import FeatureCache
from rlhf_drive.runs.folders import open_run, planned_stages
from rlhf_drive.scenes.store import SceneStore
from rlhf_drive.training.alerts import AlertLog
from rlhf_drive.training.build import (
    build_accelerator,
    build_policy,
    build_trainer,
    epochs_to_steps,
    loop_settings,
    precision_of,
    sampling_of,
    sft_settings,
    visiting_of,
)
from rlhf_drive.training.comparison import compare_policies
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
from rlhf_drive.training.stopping import stopped_at_once
from rlhf_drive.training.terminal import print_info, progress
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
        command = resume_command(folder.path) or ""
        with folder.locked() as locked, stopped_at_once(command):
            if not locked:
                print_info(f"{folder.path} lies on storage without file locks: start no second run there")
            started = time.monotonic() - folder.seconds_before()
            planned = planned_stages(open_run(folder.path))
            if planned and all(map(folder.is_done, planned)):
                print_info(f"{folder.path} is finished: no stage is left to do")
                return folder.path
            print_info(f"run folder: {folder.path} (if it stops: {command})")
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
            if self.recipe.scenes.source != "store":
                print_info(
                    "scenes: making or opening them (the first use on a machine compiles the scorer, some minutes)"
                )
            with progress("scenes") as on_progress:
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

    def _compare(self, store: SceneStore) -> None:
        device = self.accelerator.device
        compare_policies(self.recipe, self.folder, store, self.features, device=device, started=self.started)
