"""The process in the other environment: NAVSIM's own scorer, asked through standard input and output.

`rewards.navsim_process` runs this file as a script with the interpreter that has the package `navsim`. It needs Python
3.9, NumPy and navsim with nuplan-devkit, and imports nothing of this project.

A message is ``NVS1``, the length of a header (uint32, little endian), the header (JSON) and the arrays that its
``arrays`` lists by name and shape, one after the other as little-endian float64. The worker first says ``ready`` or
``refused`` (with a reason), then answers one message at a time:

    load   {token, ego_xy?}           -> loaded
    score  {token} poses, previous?   -> scored {reasons: {row: reason}} values [B, C]

or ``failed`` with a reason. It ends when its input does. What libraries print goes to standard error.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import lzma
import os
import pickle
import struct
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Tuple  # noqa: UP035  (evaluated by Python 3.9)

import numpy as np

__all__ = ["COLUMNS", "pack_message", "pair_progress", "read_message"]

Arrays = Dict[str, Any]  # noqa: UP006
COLUMNS = {
    "v1.1": ("nc", "dac", "ep", "ttc", "c", "ddc", "pdms"),
    "v2.2": ("nc", "dac", "ddc", "tlc", "ep", "ttc", "lk", "hc", "ec", "epdms"),
}
"""Columns of the values by version of NAVSIM."""
_MULTIPLIED = {
    "v1.1": {"nc": "NO_COLLISION", "dac": "DRIVABLE_AREA"},
    "v2.2": {
        "nc": "NO_COLLISION",
        "dac": "DRIVABLE_AREA",
        "tlc": "TRAFFIC_LIGHT_COMPLIANCE",
        "ddc": "DRIVING_DIRECTION",
    },
}
_WEIGHTED = {
    "v1.1": {"ep": "PROGRESS", "ttc": "TTC", "c": "COMFORTABLE", "ddc": "DRIVING_DIRECTION"},
    "v2.2": {
        "ep": "PROGRESS",
        "ttc": "TTC",
        "lk": "LANE_KEEPING",
        "hc": "HISTORY_COMFORT",
        "ec": "TWO_FRAME_EXTENDED_COMFORT",
    },
}
_PDM = "navsim.planning.simulation.planner.pdm_planner"
_POLICY = "navsim.traffic_agents_policies.log_replay_traffic_agents"
_HEAD = struct.Struct("<4sI")
_MAGIC = b"NVS1"
_KEPT_SCENES = 64
_SAME_PLACE_M = 0.01
_STEP_S = 0.1
_GAP_LIMIT_S = 0.55


def pack_message(header: dict[str, Any], arrays: Arrays) -> bytes:
    """A message as bytes."""
    shapes = {name: list(np.shape(array)) for name, array in arrays.items()}
    text = json.dumps({**header, "arrays": shapes}).encode()
    parts = [np.ascontiguousarray(array, dtype="<f8").tobytes() for array in arrays.values()]
    return b"".join([_HEAD.pack(_MAGIC, len(text)), text, *parts])


def read_message(read: Callable[[int], bytes]) -> tuple[dict[str, Any], Arrays]:
    """The next message.

    Args:
        read: Gives exactly that many bytes, or raises EOFError.

    Raises:
        ValueError: The bytes are no message.
    """
    magic, length = _HEAD.unpack(read(_HEAD.size))
    if magic != _MAGIC:
        raise ValueError(f"a message must begin with {_MAGIC!r}; got {magic!r}")
    header = json.loads(read(length))
    arrays = {}
    for name, shape in header.pop("arrays").items():
        count = int(np.prod(shape, dtype=np.int64))
        arrays[name] = np.frombuffer(read(8 * count), dtype="<f8").astype(np.float64).reshape(shape)
    return header, arrays


def pair_progress(raw: Any, product: Any, limit_m: float, version: str) -> Any:
    """EP ``[1 + B]`` of each plan against the reference alone, as if it had been scored with no other plan.

    NAVSIM normalises by the largest progress of everything scored at once; its score is defined on the pair.

    Args:
        raw: ``[1 + B]`` metres along the centreline, the reference first.
        product: ``[1 + B]`` product of the multiplied metrics.
        limit_m: Progress up to which both count as standing still.
        version: v1.1 takes the plan's progress times its product, v2.2 the progress itself.
    """
    own = raw * product
    most = np.maximum(own[0], own)
    far = most > limit_m
    safe = np.where(far, most, 1.0)
    if version == "v1.1":
        return np.where(far, own / safe, np.where(product == 0.0, 0.0, 1.0))
    return np.where(far, np.clip(raw / safe, 0.0, 1.0), 1.0)


class _Scene(NamedTuple):
    """A metric cache in memory."""

    cache: Any
    reference: Any
    """``[41, 11]`` PDM-Closed, resampled, not yet simulated."""
    forgiven: Tuple[str, ...]  # noqa: UP006
    """Columns in which the human has 0."""


class OfficialScorer:
    """NAVSIM's simulator and scorer on the metric caches of one folder."""

    def __init__(self, version: str, cache: Path, human_filter: bool) -> None:
        def load(module: str, name: str) -> Any:
            return getattr(importlib.import_module(module), name)

        self._version = version
        self._filter = human_filter and version == "v2.2"
        self.paths = find_caches(cache)
        self._scenes: OrderedDict[str, _Scene] = OrderedDict()
        self._evaluate = importlib.import_module("navsim.evaluate.pdm_score")
        self._plan = load("navsim.common.dataclasses", "Trajectory")
        sampling = load("nuplan.planning.simulation.trajectory.trajectory_sampling", "TrajectorySampling")
        self._sampling = sampling(num_poses=40, interval_length=_STEP_S)
        self._simulator = load(f"{_PDM}.simulation.pdm_simulator", "PDMSimulator")(self._sampling)
        self._config = load(f"{_PDM}.scoring.pdm_scorer", "PDMScorerConfig")()
        self._scorer = load(f"{_PDM}.scoring.pdm_scorer", "PDMScorer")(self._sampling, self._config)
        self._multiplied = _indices(load(f"{_PDM}.utils.pdm_enums", "MultiMetricIndex"), _MULTIPLIED[version])
        self._weighted = _indices(load(f"{_PDM}.utils.pdm_enums", "WeightedMetricIndex"), _WEIGHTED[version])
        if version == "v2.2":
            self._traffic = load(_POLICY, "LogReplayTrafficAgents")(self._sampling)
            self._is_alike = load(f"{_PDM}.scoring.pdm_comfort_metrics", "ego_is_two_frame_extended_comfort")

    def scene(self, token: str) -> _Scene:
        """The metric cache of `token`; those used last stay in memory."""
        if token not in self._scenes:
            self._scenes[token] = self._load(token)
            while len(self._scenes) > _KEPT_SCENES:
                self._scenes.popitem(last=False)
        self._scenes.move_to_end(token)
        return self._scenes[token]

    def score(self, token: str, poses: Any, previous: Any) -> Any:
        """Columns ``[B, C]`` of plans ``[B, 8, 3]``; EC where there are plans of the previous frame."""
        scene = self.scene(token)
        ego = scene.cache.ego_state
        references = np.stack([scene.reference, *self._references(poses, ego)])
        states = self._simulator.simulate_proposals(references, ego)
        multiplied, weighted, raw = self._metrics(scene.cache, states)
        limit_m = self._config.progress_distance_threshold
        weighted[self._weighted["ep"]] = pair_progress(raw, multiplied.prod(axis=0), limit_m, self._version)
        weights = np.array(self._config.weighted_metrics_array, dtype=np.float64)
        if self._version == "v2.2":
            for name in scene.forgiven:
                (multiplied if name in self._multiplied else weighted)[{**self._weighted, **self._multiplied}[name]] = 1
            ec = self._weighted["ec"]
            if previous is None:
                weighted[ec], weights[ec] = 0.0, 0.0
            else:
                weighted[ec, 1:] = self._compare_frames(scene.cache, states[1:], previous)
        mean = (weighted * weights[:, None]).sum(axis=0) / weights.sum()
        found = {name: multiplied[i] for name, i in self._multiplied.items()}
        found.update({name: weighted[i] for name, i in self._weighted.items()})
        if previous is None and "ec" in found:
            found["ec"] = np.full(len(raw), np.nan)
        found[COLUMNS[self._version][-1]] = multiplied.prod(axis=0) * mean
        return np.stack([found[name] for name in COLUMNS[self._version]], axis=1)[1:]

    def _load(self, token: str) -> _Scene:
        if token not in self.paths:
            raise LookupError(f"no metric cache of token {token!r} among {len(self.paths)}")
        with lzma.open(self.paths[token], "rb") as file:
            cache = pickle.load(file)
        if hasattr(cache, "past_human_trajectory") != (self._version == "v2.2"):
            raise ValueError(f"the metric cache {self.paths[token]} was not written by NAVSIM {self._version}")
        reference = self._evaluate.get_trajectory_as_array(cache.trajectory, self._sampling, cache.ego_state.time_point)
        return _Scene(cache, reference, self._forgiven(cache))

    def _forgiven(self, cache: Any) -> tuple[str, ...]:
        """Columns in which the human, scored alone and without history, has 0; none in a synthetic scene."""
        if not self._filter or cache.scene_type.name != "ORIGINAL":
            return ()
        if cache.human_trajectory is None:
            raise ValueError("the human filter is on, but the metric cache has no human trajectory")
        plan = self._as_array(cache.human_trajectory, cache.ego_state)
        states = self._simulator.simulate_proposals(plan[None], cache.ego_state)
        multiplied, weighted, _ = self._metrics(cache, states, with_past=False)
        of_multiplied = [name for name, i in self._multiplied.items() if multiplied[i, 0] == 0]
        return tuple(of_multiplied + [n for n, i in self._weighted.items() if n != "ec" and weighted[i, 0] == 0])

    def _as_array(self, plan: Any, ego: Any) -> Any:
        moved = self._evaluate.transform_trajectory(plan, ego)
        return self._evaluate.get_trajectory_as_array(moved, self._sampling, ego.time_point)

    def _references(self, poses: Any, ego: Any) -> list[Any]:
        return [self._as_array(self._plan(plan), ego) for plan in poses]

    def _metrics(self, cache: Any, states: Any, with_past: bool = True) -> tuple[Any, Any, Any]:
        """Multiplied ``[M, B]`` and weighted metrics ``[W, B]``, and progress ``[B]`` in metres, of states."""
        scene = [cache.observation, cache.centerline, cache.route_lane_ids, cache.drivable_area_map]
        if self._version == "v2.2":
            scene += [cache.map_parameters, self._traffic.simulate_environment(states[-1], cache)]
            scene += [cache.past_human_trajectory] if with_past else []
        self._scorer.score_proposals(states, *scene)
        scorer = self._scorer
        return scorer._multi_metrics.copy(), scorer._weighted_metrics.copy(), scorer._progress_raw.copy()

    def _compare_frames(self, cache: Any, states: Any, previous: Any) -> Any:
        """EC ``[B]``: the logged ego of the frame before is what that frame's own cache would start from."""
        past = cache.past_human_trajectory.get_sampled_trajectory()
        if len(past) < 2:
            raise ValueError("the metric cache does not know the ego of the frame before")
        before = past[-2]
        gap_s = cache.timepoint.time_s - before.time_point.time_s
        if not 0 < gap_s < _GAP_LIMIT_S:
            raise ValueError(f"the frame before lies {gap_s:g} s back, not within {_GAP_LIMIT_S:g} s")
        earlier = self._simulator.simulate_proposals(np.stack(self._references(previous, before)), before)
        shift = round(gap_s / _STEP_S)
        now, then = states[:, :-shift], earlier[:, shift:]
        return np.asarray(self._is_alike(now, then, np.arange(now.shape[1]) * _STEP_S), dtype=np.float64)


def _indices(index: Any, names: dict[str, str]) -> dict[str, int]:
    return {column: int(getattr(index, name)) for column, name in names.items()}


def find_caches(folder: Path) -> dict[str, Path]:
    """Path of each token's metric cache: as the metadata lists them, else by looking; also in a folder that moved."""
    lines: List[str] = []  # noqa: UP006
    for table in sorted(folder.glob("metadata/*.csv")):
        lines += table.read_text().splitlines()[1:]
    listed = [Path(line.strip()) for line in lines if line.strip()]
    found = {}
    for path in listed or folder.rglob("metric_cache.pkl"):
        moved = [path, folder / path, folder.joinpath(*path.parts[-4:])]
        found[path.parent.name] = next((place for place in moved if place.is_file()), path)
    return found


def installation_problem(version: str) -> str:
    """Why NAVSIM of `version` cannot be run by this interpreter, or nothing. Imports none of its modules."""

    def place(name: str) -> Any:
        try:
            return importlib.util.find_spec(name)
        except Exception:  # a parent that cannot be imported, whatever it raises
            return None

    package = place("navsim")
    if package is None:
        return f"the package navsim is not installed for {sys.executable}; install NAVSIM {version} from its repository"
    where = package.origin or ", ".join(package.submodule_search_locations or [])
    if place("navsim.evaluate.pdm_score") is None:
        return (
            f"navsim in {where} is another project, such as the one that PyPI has under that name: it has no "
            f"navsim.evaluate.pdm_score; install NAVSIM {version} from the repository of its authors"
        )
    found = "v1.1" if place(_POLICY) is None else "v2.2"
    if found != version:
        return f"navsim in {where} is NAVSIM {found[:2]}, not {version}; name the environment that has {version}"
    if place("nuplan") is None:
        return f"nuplan-devkit is not installed for {sys.executable}; NAVSIM needs it"
    return ""


def _describe(error: BaseException) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def score_rows(score: Callable[[Any, Any], Any], poses: Any, previous: Any, width: int) -> tuple[Any, dict[int, str]]:
    """``[B, width]`` and reasons by row: where all rows together fail, each is scored alone."""
    try:
        return score(poses, previous), {}
    except Exception as error:  # whatever NAVSIM raises costs the rows it raises for
        if len(poses) == 1:
            return np.full((1, width), np.nan), {0: _describe(error)}
    values, reasons = np.full((len(poses), width), np.nan), {}
    for row in range(len(poses)):
        alone = slice(row, row + 1)
        values[alone], failed = score_rows(score, poses[alone], None if previous is None else previous[alone], width)
        if failed:
            reasons[row] = failed[0]
    return values, reasons


def answer(official: OfficialScorer, version: str, header: dict[str, Any], arrays: Arrays) -> bytes:
    """The message that answers one."""
    token = header["token"]
    try:
        scene = official.scene(token)
        if "ego_xy" in arrays:
            ego = scene.cache.ego_state.rear_axle
            apart_m = float(np.hypot(ego.x - arrays["ego_xy"][0], ego.y - arrays["ego_xy"][1]))
            if not apart_m < _SAME_PLACE_M:
                raise ValueError(
                    f"the metric cache of token {token!r} is of another scene: its ego is {apart_m:g} m off"
                )
    except Exception as error:  # also what unpickling raises; the scene has no score
        return pack_message({"kind": "failed", "reason": _describe(error)}, {})
    if header["kind"] == "load":
        return pack_message({"kind": "loaded"}, {})

    def score(poses: Any, previous: Any) -> Any:
        return official.score(token, poses, previous)

    values, reasons = score_rows(score, arrays["poses"], arrays.get("previous"), len(COLUMNS[version]))
    return pack_message({"kind": "scored", "reasons": reasons}, {"values": values})


def _serve(source: int, target: int, options: argparse.Namespace) -> None:
    def read(count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            part = os.read(source, count - len(data))
            if not part:
                raise EOFError
            data += part
        return bytes(data)

    def write(message: bytes) -> None:
        view = memoryview(message)
        while len(view):
            view = view[os.write(target, view) :]

    problem, official = installation_problem(options.version), None
    if not problem and not options.check:
        try:
            official = OfficialScorer(options.version, Path(options.cache), options.human_filter == "on")
            problem = "" if official.paths else f"no metric_cache.pkl in {options.cache}"
        except Exception as error:  # an environment that is not complete raises what it likes
            problem = _describe(error)
    write(pack_message({"kind": "refused" if problem else "ready", "reason": problem}, {}))
    while official is not None and not problem:
        try:
            header, arrays = read_message(read)
        except EOFError:
            return
        write(answer(official, options.version, header, arrays))


def main() -> None:
    """Serve until the input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--version", required=True, choices=sorted(COLUMNS))
    parser.add_argument("--cache", required=True)
    parser.add_argument("--human-filter", required=True, choices=["on", "off"])
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    source, target = os.dup(0), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what libraries print must not get between the messages
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if not entry or Path(entry).resolve() != here]
    _serve(source, target, options)


if __name__ == "__main__":
    main()
