"""Measures pieces of the work on this machine, with the recipe's own policy: seconds a call and seconds a unit.

Pieces are single calls: a few scenes through the encoder, one decoder pass, one call of the head. None is a step, and
nothing is fitted to steps. Each piece is timed at two sizes; all take turns, so that what else the machine does meets
them alike, and medians are taken.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from rlhf_drive.config import Recipe
from rlhf_drive.errors import ConfigError
from rlhf_drive.estimate.machine import Machine, Rate
from rlhf_drive.estimate.measure_policy import PolicyPieces
from rlhf_drive.estimate.measure_scorer import ScorerPieces
from rlhf_drive.estimate.samples import sample_scenes
from rlhf_drive.estimate.sizes import network_of, step_of
from rlhf_drive.policies import Policy
from rlhf_drive.scenes import Scene

__all__ = ["MOST_PARAMETERS", "Timed", "measure", "measure_scorer"]

MOST_PARAMETERS = 300_000_000
"""A larger policy is not measured but reckoned from a data sheet."""
SCENES = 8
"""Scenes that pieces are fed with."""
MIN_ROUNDS, MAX_ROUNDS = 3, 15


@dataclass(frozen=True)
class Timed:
    """Something to time."""

    piece: str
    """Its rate's name."""
    units: float
    """Units of a call."""
    call: Callable[[], object]
    """Does it, or returns the seconds that it took if only a part of it counts."""


Clock = Callable[[], float]


def _turns(
    timed: list[Timed], budget_s: float, synchronise: Callable[[], None], clock: Clock
) -> dict[tuple[str, float], float]:
    """Median seconds by piece and units."""
    found: dict[tuple[str, float], list[float]] = {}
    for item in timed:  # first calls allocate and choose kernels
        item.call()
    started, rounds = time.perf_counter(), 0
    while rounds < MIN_ROUNDS or (rounds < MAX_ROUNDS and time.perf_counter() - started < budget_s):
        for item in timed:
            synchronise()
            start = clock()
            told = item.call()
            synchronise()
            seconds = told if isinstance(told, float) else clock() - start
            found.setdefault((item.piece, item.units), []).append(seconds)
        rounds += 1
    return {key: statistics.median(values) for key, values in found.items()}


def fit(times: Mapping[tuple[str, float], float]) -> dict[str, Rate]:
    """The line through the two sizes of each piece; through one, all of it is per unit. Neither part is negative."""
    sizes: dict[str, list[tuple[float, float]]] = {}
    for (piece, units), seconds in times.items():
        sizes.setdefault(piece, []).append((units, seconds))
    rates = {}
    for piece, points in sizes.items():
        (n0, t0), (n1, t1) = min(points), max(points)
        slope = (t1 - t0) / (n1 - n0) if n1 > n0 else t1 / n1
        slope = min(max(slope, 0.0), t1 / n1)
        rates[piece] = Rate(max(0.0, t1 - slope * n1), slope)
    return rates


def measure(
    recipe: Recipe,
    *,
    device: str = "cpu",
    budget_s: float = 8.0,
    clock: Clock = time.perf_counter,
    policy: Policy | None = None,
    scenes: list[Scene] | None = None,
) -> Machine:
    """This machine's rates for the recipe's policy and scorer; some 20 s.

    Args:
        recipe: Names policy, sizes of calls, and scorer.
        device: Where the policy is measured.
        budget_s: For the policy's pieces, once they are warm.
        clock: What tells the seconds; ``time.process_time`` leaves out what else the machine does.
        policy: Whose weights to use; None draws fresh ones.
        scenes: What to feed the pieces with; None takes a few like the recipe's.

    Raises:
        ConfigError: The policy is too large to be measured.
    """
    net, step = network_of(recipe), step_of(recipe)
    scenes = sample_scenes(recipe, SCENES) if scenes is None else scenes
    pieces = PolicyPieces(recipe, net, step, scenes, torch.device(device), clock=clock, policy=policy)
    if pieces.count > MOST_PARAMETERS:
        raise ConfigError(
            f"The policy has {pieces.count / 1e6:,.0f} M parameters; pieces are measured up to "
            f"{MOST_PARAMETERS / 1e6:,.0f} M. Name a device with --gpu, whose data sheet is then used."
        )
    synchronise = torch.cuda.synchronize if device == "cuda" else lambda: None
    rates = fit(_turns([Timed(*item) for item in pieces.timed()], budget_s, synchronise, clock))
    return measure_scorer(recipe, scenes, rates, name=f"this machine ({device})", clock=clock)


def measure_scorer(
    recipe: Recipe, scenes: list[Scene], rates: Mapping[str, Rate], *, name: str, clock: Clock = time.perf_counter
) -> Machine:
    """A machine with measured scorer and host work; `rates` are the policy's."""
    pieces = ScorerPieces(recipe, scenes)
    with pieces:
        found = fit(_turns([Timed(*item) for item in pieces.timed()], 3.0, lambda: None, clock))
        gain = pieces.thread_gain()
        prepare_s = pieces.prepare_s()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(
        name=name,
        measured=bool(rates),
        rates={**rates, "features": found["features"], "plans": found["plans"]},
        score=found["score"],
        prepare_s=prepare_s,
        monitor=found["monitor"],
        heldout=found["heldout"],
        cores=cores,
        core_gain=gain,
        memory=float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        host_copy=_copy_rate(),
        disk=_disk_rate(),
    )


def _copy_rate() -> float:
    """Bytes a second of a copy of 64 MB in memory, which is what putting weights into an object store costs."""
    source = np.ones(1 << 23)
    target = np.empty_like(source)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - start)
    return source.nbytes / statistics.median(seconds)


def _disk_rate() -> float:
    """Bytes a second written to a file and hashed."""
    import hashlib
    import tempfile

    blob = np.random.default_rng(0).bytes(1 << 24)
    start = time.perf_counter()
    with tempfile.TemporaryFile() as file:
        file.write(blob)
        file.flush()
        os.fsync(file.fileno())
    hashlib.sha256(blob).hexdigest()
    return len(blob) / (time.perf_counter() - start)
