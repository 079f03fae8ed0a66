"""Candidates per second of PDMS and EPDMS, beside the same work in plain NumPy and shapely, in one run.

Run: ``OMP_NUM_THREADS=1 python tests/benchmarks/bench_scorer.py [FOLDER] [--cold] [--quick]``. FOLDER holds golden
vectors (``<id>.scene.json/.npz``) and adds the small scenes; real-size scenes are made on the spot. One thread is timed
by its processor time, two processes by the clock. The plain scorer's scores must equal the kernels', or the run fails.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from real_size import real_size_scene

from rewards.epdms import score_epdms
from rewards.pdm_closed import plan_pdm_closed
from rewards.pdms import score_pdms
from rewards.prepare import PreparedScene, prepare_scene
from rewards.prepare_epdms import PreparedEpdms, prepare_epdms
from rlhf_drive.scenes import SceneReference

BATCHES = (1, 16, 64, 256)
METRICS = ("pdms", "epdms", "epdms+ec")
MEMORY_LIMIT = 2_000_000
PROCESS_SECONDS = 2.0


@dataclass(frozen=True)
class Case:
    """One scene with plans."""

    reference: SceneReference
    plans: NDArray[np.float64]
    previous: NDArray[np.float64]
    v1: PreparedScene
    v2: PreparedEpdms

    @staticmethod
    def of(reference: SceneReference, plans: NDArray[np.float64], previous: NDArray[np.float64]) -> Case:
        return Case(reference, plans, previous, prepare_scene(reference), prepare_epdms(reference))

    def score(self, metric: str, batch: int) -> Callable[[], NDArray[np.float64]]:
        """A call that scores `batch` plans."""
        plans, previous = np.resize(self.plans, (batch, 8, 3)), np.resize(self.previous, (batch, 8, 3))
        if metric == "pdms":
            return lambda: score_pdms(self.v1, plans).pdms
        if metric == "epdms":
            return lambda: score_epdms(self.v2, plans).epdms
        return lambda: score_epdms(self.v2, plans, previous).epdms


def real_size_cases(count: int) -> list[Case]:
    scenes = [real_size_scene(seed) for seed in range(count)]
    return [Case.of(scene.reference, scene.plans, scene.previous) for scene in scenes]


def golden_cases(folder: Path) -> list[Case]:
    from rlhf_drive.scenes.importers.vectors import read_vectors

    return [Case.of(s.reference, s.candidates, s.prev_candidates) for s in read_vectors(folder)]


def seconds(function: Callable[[], object], budget_s: float = 0.15) -> float:
    """Median processor time of a call in this thread, so that other processes do not count."""
    function()
    times: list[float] = []
    while len(times) < 5 or (sum(times) < budget_s and len(times) < 200):
        start = time.thread_time()
        function()
        times.append(time.thread_time() - start)
    return float(np.median(times))


def nbytes(value: Any) -> int:
    """Bytes of all arrays in a prepared scene, named tuples and dataclasses included."""
    if isinstance(value, np.ndarray):
        return int(value.nbytes)
    parts = value if isinstance(value, tuple) else getattr(value, "__dict__", {}).values()
    return sum(nbytes(part) for part in parts)


def print_rates(name: str, cases: list[Case], quick: bool) -> None:
    """Rates of the kernels by batch, and of the plain scorer at 64 plans, with the largest difference of scores."""
    from reference_scorer import PlainScene, plain_epdms, plain_pdms

    few = cases[:: max(len(cases) // 4, 1)]
    plain = [PlainScene.of(case.reference) for case in few]
    print(f"\n{name}: {len(cases)} scenes, one thread, candidates/s")
    print(
        f"{'':10}"
        + "".join(f"{'B=' + str(batch):>10}" for batch in BATCHES)
        + "     plain B=64    ratio   largest difference"
    )
    for metric in METRICS:
        rates = [1.0 / np.mean([seconds(c.score(metric, b), 0.1) / b for c in cases]) for b in BATCHES]
        slow, ours, worst = [], [], 0.0
        for case, scene in zip(few, plain, strict=True):
            plans, previous = case.plans[:64], case.previous[:64] if metric == "epdms+ec" else None
            run = (
                partial(plain_pdms, scene, plans) if metric == "pdms" else partial(plain_epdms, scene, plans, previous)
            )
            difference = np.abs(run() - case.score(metric, len(plans))()).max()
            assert difference < 1e-6, f"{metric}: the plain scorer differs by {difference}"
            worst = max(worst, difference)
            slow.append(seconds(run, 0.05 if quick else 0.3) / len(plans))
            ours.append(seconds(case.score(metric, len(plans))) / len(plans))
        row = "".join(f"{rate:10.0f}" for rate in rates)
        print(f"{metric:10}{row}{1.0 / np.mean(slow):15.0f}{np.mean(slow) / np.mean(ours):8.1f}x{worst:21.1e}")


def print_scenes(name: str, cases: list[Case]) -> None:
    """Preparing, PDM-Closed and memory per scene."""
    sizes = [[nbytes(case.v1), nbytes(case.v2)] for case in cases]
    most = np.max(sizes, axis=0)
    assert most.max() < MEMORY_LIMIT, f"{most.max()} bytes in a prepared scene"
    rows = {
        "prepare for PDMS": lambda c: prepare_scene(c.reference),
        "prepare for EPDMS": lambda c: prepare_epdms(c.reference),
        "PDM-Closed v1.1": lambda c: plan_pdm_closed(c.reference, version="v1"),
        "PDM-Closed v2.2": lambda c: plan_pdm_closed(c.reference, version="v2"),
    }
    print(f"\n{name}: per scene")
    for label, work in rows.items():
        times = [1e3 * seconds(partial(work, case), 0.05) for case in cases]
        print(f"  {label:20}{np.mean(times):7.2f} ms (max {max(times):.2f})")
    print(f"  memory: at most {most[0] / 1e6:.2f} MB prepared for PDMS, {most[1] / 1e6:.2f} MB for EPDMS")


def _work(metric: str, seeds: range, barrier: Barrier, results: Any) -> None:
    calls = [case.score(metric, 64) for case in real_size_cases(len(seeds))]
    for call in calls:
        call()
    barrier.wait(timeout=300)
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < PROCESS_SECONDS:
        calls[done % len(calls)]()
        done += 1
    results.put(64 * done / (time.perf_counter() - start))


def print_processes() -> None:
    """Candidates per second by the clock, of one process and of two at once."""
    context = multiprocessing.get_context("spawn")
    print("\nreal size: processes at once, candidates/s by the clock, B=64")
    for metric in METRICS:
        totals = []
        for count in (1, 2):
            barrier, results = context.Barrier(count), context.SimpleQueue()
            workers = [context.Process(target=_work, args=(metric, range(4), barrier, results)) for _ in range(count)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join(timeout=300)
            assert all(worker.exitcode == 0 for worker in workers), "a worker failed"
            totals.append(sum(results.get() for _ in workers))
        print(f"{metric:10}{totals[0]:10.0f}{totals[1]:10.0f}   the second adds {totals[1] / totals[0] - 1.0:+.0%}")


COLD = """
import time, sys
start, cpu = time.perf_counter(), time.process_time()
from real_size import real_size_scene
scene = real_size_scene(0, plans=2)
from rewards.pdms import score_pdms
from rewards.prepare import prepare_scene
from rewards.epdms import prepare_epdms, score_epdms
score_pdms(prepare_scene(scene.reference), scene.plans)
score_epdms(prepare_epdms(scene.reference), scene.plans, scene.previous)
print(f"{time.process_time() - cpu:.1f} s of processor time, {time.perf_counter() - start:.1f} s by the clock")
"""


def print_cold() -> None:
    """The first scores of a fresh installation, and the second start, which finds the machine code."""
    print("\nfirst scores (PDM-Closed, PDMS, EPDMS), imports included")
    with tempfile.TemporaryDirectory() as cache:
        paths = os.pathsep.join([str(Path(__file__).parent), *(p for p in sys.path if p)])
        environment = os.environ | {"NUMBA_CACHE_DIR": cache, "PYTHONPATH": paths}
        for name in ("nothing compiled", "compiled before"):
            run = subprocess.run(
                [sys.executable, "-c", COLD], env=environment, check=True, capture_output=True, text=True
            )
            print(f"  {name:20}{run.stdout.strip()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder", type=Path, nargs="?", help="golden vectors; left out, only real-size scenes are timed"
    )
    parser.add_argument("--cold", action="store_true", help="time compilation in a fresh cache as well")
    parser.add_argument("--quick", action="store_true", help="fewer scenes, no processes")
    options = parser.parse_args()
    cases = {"real size": real_size_cases(2 if options.quick else 8)}
    if options.folder is not None:
        cases["golden size"] = golden_cases(options.folder)[:: 4 if options.quick else 1]
    for name, group in cases.items():
        print_rates(name, group, options.quick)
        print_scenes(name, group)
    from bench_parts import print_floor, print_parts

    print_parts(cases["real size"])
    print_floor(cases["real size"])
    if not options.quick:
        print_processes()
    if options.cold:
        print_cold()


if __name__ == "__main__":
    main()
