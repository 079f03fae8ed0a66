"""A stand-in for the official package: the modules that the worker imports, with rules that a test can work out.

A plan's last pose dictates its scores: x is its progress in metres, y its NC and the heading its TTC. Everything else
is 1. Two frames are alike where x is. Some x do harm: see `RAISES`, `ENDS`, `HANGS`.
"""

from __future__ import annotations

import lzma
import pickle
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

RAISES, ENDS, HANGS = 777.0, 666.0, 555.0
"""Progress of plans that the stand-in raises on, ends its process on, and never returns from."""
_PDM = "navsim/planning/simulation/planner/pdm_planner"
_COMMON = {
    "nuplan/planning/simulation/trajectory/trajectory_sampling.py": """
class TrajectorySampling:
    def __init__(self, num_poses, interval_length):
        assert (num_poses, interval_length) == (40, 0.1)
""",
    "navsim/common/dataclasses.py": """
class Trajectory:
    def __init__(self, poses):
        assert poses.shape == (8, 3)
        self.poses = poses
""",
    "navsim/evaluate/pdm_score.py": """
import os, time
import numpy as np
print("imported", flush=True)

def transform_trajectory(plan, ego):
    return plan.poses

def get_trajectory_as_array(plan, sampling, time_point):
    x = plan[-1, 0]
    if x == 777.0:
        raise ArithmeticError("seven" + chr(10) + "more")
    if x == 666.0:
        os.write(2, b"out of luck" + b"!" + bytes([10]))
        os._exit(3)
    if x == 555.0:
        time.sleep(600)
    states = np.zeros((41, 11))
    states[:, :3] = plan[-1]
    states[:, 3] = np.arange(41)
    return states
""",
    f"{_PDM}/simulation/pdm_simulator.py": """
class PDMSimulator:
    def __init__(self, sampling): pass
    def simulate_proposals(self, states, ego):
        os_write = __import__("os").write
        os_write(1, b"NVS1 a library writes past sys.stdout" + bytes([10]))
        return states.copy()
""",
}
_V1 = {
    f"{_PDM}/utils/pdm_enums.py": """
class MultiMetricIndex: NO_COLLISION, DRIVABLE_AREA = 0, 1
class WeightedMetricIndex: PROGRESS, TTC, COMFORTABLE, DRIVING_DIRECTION = 0, 1, 2, 3
""",
    f"{_PDM}/scoring/pdm_scorer.py": """
import numpy as np
class PDMScorerConfig:
    progress_distance_threshold = 5.0
    weighted_metrics_array = np.array([5.0, 5.0, 2.0, 0.0])
class PDMScorer:
    def __init__(self, sampling, config): pass
    def score_proposals(self, states, observation, centerline, lanes, area):
        n = len(states)
        self._progress_raw = states[:, -1, 0].copy()
        self._multi_metrics, self._weighted_metrics = np.ones((2, n)), np.ones((4, n))
        self._multi_metrics[0], self._weighted_metrics[1] = states[:, -1, 1], states[:, -1, 2]
        self._weighted_metrics[0] = self._progress_raw / self._progress_raw.max()
""",
}
_V2 = {
    f"{_PDM}/utils/pdm_enums.py": """
class MultiMetricIndex: NO_COLLISION, DRIVABLE_AREA, TRAFFIC_LIGHT_COMPLIANCE, DRIVING_DIRECTION = 0, 1, 2, 3
class WeightedMetricIndex:
    PROGRESS, TTC, LANE_KEEPING, HISTORY_COMFORT, TWO_FRAME_EXTENDED_COMFORT = 0, 1, 2, 3, 4
""",
    f"{_PDM}/scoring/pdm_scorer.py": """
import numpy as np
class PDMScorerConfig:
    progress_distance_threshold = 5.0
    weighted_metrics_array = np.array([5.0, 5.0, 2.0, 2.0, 2.0])
class PDMScorer:
    def __init__(self, sampling, config): pass
    def score_proposals(self, states, observation, centerline, lanes, area, parameters, tracks, past=None):
        assert tracks == "logged" and parameters == "parameters"
        assert (past is None) == (len(states) == 1)
        n = len(states)
        self._progress_raw = states[:, -1, 0].copy()
        self._multi_metrics, self._weighted_metrics = np.ones((4, n)), np.ones((5, n))
        self._multi_metrics[0], self._weighted_metrics[1] = states[:, -1, 1], states[:, -1, 2]
        self._weighted_metrics[0] = self._progress_raw / self._progress_raw.max()
        self._weighted_metrics[4] = 0.0
""",
    f"{_PDM}/scoring/pdm_comfort_metrics.py": """
import numpy as np
def ego_is_two_frame_extended_comfort(now, then, times):
    assert now.shape == then.shape == (len(now), 36, 11) and np.allclose(times, np.arange(36) * 0.1)
    assert (now[:, 0, 3] == 0).all() and (then[:, 0, 3] == 5).all()
    return now[:, 0, 0] == then[:, 0, 0]
""",
    "navsim/traffic_agents_policies/log_replay_traffic_agents.py": """
class LogReplayTrafficAgents:
    def __init__(self, sampling): pass
    def simulate_environment(self, states, cache): return "logged"
""",
}


def write_environment(folder: Path, version: str, *, without: str = "", broken: str = "") -> str:
    """An interpreter that finds the stand-in of `version`; returns its path.

    Args:
        folder: Where to.
        version: `v1.1` or `v2.2`.
        without: Beginning of the paths of modules to leave out.
        broken: Path of a module that raises when it is imported.
    """
    for name, text in (_COMMON | (_V1 if version == "v1.1" else _V2)).items():
        if without and name.startswith(without):
            continue
        path = folder / "site" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("raise RuntimeError('half an installation')" if name == broken else text)
        for parent in path.relative_to(folder / "site").parents:
            if parent.name:
                (folder / "site" / parent / "__init__.py").touch()
    return write_interpreter(folder)


def write_interpreter(folder: Path) -> str:
    """An interpreter that looks for packages in ``folder/site`` first."""
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{folder / "site"}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return str(python)


def plan(x: float, nc: float = 1.0, ttc: float = 1.0) -> NDArray[np.float64]:
    """``[8, 3]`` a plan that the stand-in gives these scores."""
    return np.tile([x, nc, ttc], (8, 1))


def write_cache(
    folder: Path, token: str, version: str, *, reference: NDArray[np.float64] | None = None, **changes: object
) -> Path:
    """A metric cache as the official package lays it out, of plain objects; returns its file."""
    now, before = SimpleNamespace(time_s=10.0), SimpleNamespace(time_s=9.5)
    fields: dict[str, Any] = {
        "trajectory": plan(20.0) if reference is None else reference,
        "ego_state": SimpleNamespace(rear_axle=SimpleNamespace(x=3.0, y=4.0), time_point=now),
        "observation": None,
        "centerline": None,
        "route_lane_ids": [],
        "drivable_area_map": None,
    }
    if version == "v2.2":
        past = [SimpleNamespace(time_point=before), SimpleNamespace(time_point=now)]
        fields |= {
            "timepoint": now,
            "scene_type": SimpleNamespace(name="ORIGINAL"),
            "human_trajectory": SimpleNamespace(poses=plan(20.0)),
            "past_human_trajectory": SimpleNamespace(get_sampled_trajectory=partial(list, past)),
            "map_parameters": "parameters",
        }
    path = folder / "log" / "unknown" / token / "metric_cache.pkl"
    path.parent.mkdir(parents=True)
    path.write_bytes(lzma.compress(pickle.dumps(SimpleNamespace(**(fields | changes))), preset=0))
    return path
