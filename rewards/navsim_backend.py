"""Scorer `navsim`: the official package itself, in an environment and a process of its own."""

from __future__ import annotations

import math
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from rewards import navsim_worker
from rewards.call_thread import CallTimeoutError, WorkerDiedError
from rewards.carriers import ScorerInfo
from rewards.isolation import Pace, call_isolated
from rewards.navsim_process import NavsimProcess, refusal
from rewards.partly_scored import PartlyScoredError
from rewards.scorer import SCORERS, Scorer
from rlhf_drive.errors import ConfigError, RewardError, did_you_mean
from rlhf_drive.scenes import SceneReference

__all__ = ["navsim_scorer"]

Poses = NDArray[np.float64]
_WORKER = Path(navsim_worker.__file__).resolve()
_FILTERS = ("on", "off")
_MOST_LOSSES = 10


@SCORERS.register("navsim")
def navsim_scorer(
    *, python: str, cache: str, version: str = "v2.2", human_filter: str = "on", timeout_s: float = 60.0
) -> Scorer:
    """PDMS or EPDMS by the official package `navsim`, run by another interpreter on its own metric caches.

    A scene is the one whose token its metric cache has. Plans of a scene are simulated together with PDM-Closed; EP is
    then taken pair by pair, so that a plan's score is the one NAVSIM gives it alone. One worker serves all threads, one
    request at a time; more engines have more workers.

    Args:
        python: Interpreter of the environment that has `navsim` (3.9 or later), as a path or a name on PATH.
        cache: Folder of metric caches written by that version. They are pickles, which run what is in them: use none
            that you do not trust.
        version: `v1.1` (PDMS) or `v2.2` (EPDMS).
        human_filter: `on` or `off`; v1.1 has none.
        timeout_s: What a plan may take (seconds). A worker that takes longer is replaced.

    Raises:
        ConfigError: There is no such interpreter or folder, or no `navsim` of that version in the environment.
    """
    columns = _check_options(version, human_filter, timeout_s)
    interpreter, folder = shutil.which(str(Path(python).expanduser())), Path(cache).expanduser().resolve()
    if interpreter is None:
        raise ConfigError(f"navsim: there is no interpreter {python!r}. Give option python the path of one.")
    if not folder.is_dir():
        raise ConfigError(f"navsim: {cache!r} is no folder. Give option cache the folder of metric caches.")
    settings = ["--version", version, "--cache", str(folder), "--human-filter", human_filter]
    command = [interpreter, str(_WORKER), *settings]
    _check_environment(command, python)
    filters = human_filter if version == "v2.2" else "none"
    info = ScorerInfo("navsim", f"NAVSIM {version} (official package)", cast(Any, filters))
    backend = _Backend(NavsimProcess(command, timeout_s), columns, Pace(timeout_s))
    optional = frozenset({"ec"} & set(columns))
    return Scorer(info, columns, backend.prepare, backend.score, optional=optional)


def _check_options(version: str, human_filter: str, timeout_s: float) -> tuple[str, ...]:
    """The columns of `version`."""
    if version not in navsim_worker.COLUMNS:
        raise ConfigError(f"navsim: unknown version {version!r}. {did_you_mean(version, navsim_worker.COLUMNS)}")
    if human_filter not in _FILTERS:
        raise ConfigError(f"navsim: unknown human_filter {human_filter!r}. {did_you_mean(human_filter, _FILTERS)}")
    if not 0 < timeout_s < math.inf:
        raise ConfigError(f"navsim: timeout_s must be above 0; got {timeout_s}.")
    return navsim_worker.COLUMNS[version]


def _check_environment(command: list[str], python: str) -> None:
    """Ask the environment whether it has the package, without importing it.

    Raises:
        ConfigError: It has not, or cannot be asked.
    """
    try:
        problem = refusal([*command, "--check"])
    except (OSError, CallTimeoutError, WorkerDiedError) as error:
        problem = f"{python} cannot run the worker: {str(error) or 'it does not answer'}"
    if problem:
        raise ConfigError(f"navsim: {problem}.")


@dataclass
class _Backend:
    """The two functions of the scorer, around one process."""

    process: NavsimProcess
    columns: tuple[str, ...]
    pace: Pace
    losses: dict[str, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def prepare(self, token: str, reference: SceneReference) -> str:
        """Have the worker load the metric cache; the token is all that is kept here.

        Raises:
            RewardError: There is no worker, or no metric cache of this scene.
        """
        try:
            self._ask({"kind": "load", "token": token}, {"ego_xy": reference.ego_init[:2]}, token)
        except CallTimeoutError as error:
            limit = f"{self.pace.timeout_s:g} s"
            raise RewardError(f"the process with navsim took longer than {limit} to load the metric cache") from error
        return token

    def score(self, token: str, poses: Poses, previous: Poses | None) -> Mapping[str, NDArray[np.float64]]:
        """The columns ``[B]`` each.

        Raises:
            PartlyScoredError: Some rows have no score; with ``[B, C]`` values and the reasons.
        """
        rows = np.arange(len(poses))
        if len(rows) == 0:
            return {name: np.empty(0) for name in self.columns}
        values, failures = call_isolated(
            partial(self._rows, token, poses, previous), rows, len(self.columns), pace=self.pace
        )
        if failures:
            raise PartlyScoredError(values, failures)
        return {name: values[:, i] for i, name in enumerate(self.columns)}

    def _rows(self, token: str, poses: Poses, previous: Poses | None, rows: NDArray[np.int64]) -> Poses:
        """``[n, C]`` of some rows, from the worker."""
        arrays = {"poses": poses[rows]} | ({} if previous is None else {"previous": previous[rows]})
        header, answer = self._ask({"kind": "score", "token": token}, arrays, token)
        if header["reasons"]:
            reasons = {int(row): ("raised", f"navsim: {reason}") for row, reason in header["reasons"].items()}
            raise PartlyScoredError(answer["values"], cast(Any, reasons))
        return np.asarray(answer["values"], dtype=np.float64)

    def _ask(self, header: Mapping[str, object], arrays: Mapping[str, Poses], token: str) -> Any:
        """One request; a scene that has cost too many workers in a row gets no other."""
        if self.losses.get(token, 0) >= _MOST_LOSSES:
            raise RewardError(f"the process with navsim hung or ended {_MOST_LOSSES} times in a row on this scene")
        try:
            answer = self.process.request(header, arrays)
        except (CallTimeoutError, WorkerDiedError):
            with self.lock:
                self.losses[token] = self.losses.get(token, 0) + 1
            raise
        with self.lock:
            self.losses.pop(token, None)
        if answer[0]["kind"] == "failed":
            raise RewardError(f"navsim: {answer[0]['reason']}")
        return answer
