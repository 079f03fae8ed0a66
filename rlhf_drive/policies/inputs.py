"""Observations as fixed-size tensors: the only way a scene reaches the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlhf_drive.scenes import HISTORY_TIMES_S, AgentType, Command, MapElement, Observation

__all__ = [
    "AGENT_FEATURES",
    "EGO_FEATURES",
    "ROUTE_FEATURES",
    "ROUTE_PIECES",
    "ObservationBatch",
    "mirror_batch",
    "polyline_features",
    "stack_features",
    "tensorise",
]

H = len(HISTORY_TIMES_S)
ROUTE_SPACING_M = 4.0
ROUTE_PIECES = 5
"""Route tokens; each holds `ROUTE_PIECE_POINTS` points, 4 m apart: 100 m ahead."""
ROUTE_PIECE_POINTS = 5
EGO_FEATURES = H * 8 + len(Command) + 2
AGENT_FEATURES = H * 8 + 2 + len(AgentType)
ROUTE_FEATURES = ROUTE_PIECE_POINTS * 7
POINT_FEATURES = 6
ELEMENT_FEATURES = len(MapElement) + 3

# Mirrored features change sign where they are lateral; metres are scaled to order one, twice: coarse and fine.
EGO_SCALE = np.array([20.0, 2.0, 0.5, 10.0, 1.0, 2.0, 2.0, 0.3], dtype=np.float32)
AGENT_SCALE = np.array([40.0, 20.0, 10.0, 10.0], dtype=np.float32)


@dataclass(frozen=True)
class ObservationBatch:
    """S observations as padded float32 tensors, order-one scaled, in the ego frame."""

    ego: Tensor
    """``[S, EGO_FEATURES]`` past states, command, speed."""
    speed: Tensor
    """``[S]`` m/s, unscaled: anchors the decoder at constant velocity."""
    route: Tensor
    """``[S, ROUTE_PIECES, ROUTE_FEATURES]`` pieces of the route ahead."""
    agents: Tensor
    """``[S, A, AGENT_FEATURES]``."""
    agents_mask: Tensor
    """``[S, A]`` bool, True where there is an agent."""
    lines: Tensor
    """``[S, M, points * POINT_FEATURES + ELEMENT_FEATURES]`` pieces of map polylines."""
    lines_mask: Tensor
    """``[S, M]`` bool."""

    def __len__(self) -> int:
        return int(self.ego.shape[0])

    def to(self, device: torch.device | str) -> ObservationBatch:
        """The batch on another device."""
        return ObservationBatch(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def polyline_features(points: int) -> int:
    """Width of `ObservationBatch.lines` for pieces of `points` points."""
    return points * POINT_FEATURES + ELEMENT_FEATURES


def _ego(observation: Observation) -> NDArray[np.float32]:
    command = np.eye(len(Command), dtype=np.float32)[observation.command]
    speed = observation.speed_mps
    return np.concatenate(
        [(observation.ego_history / EGO_SCALE).ravel(), command, [speed / 20.0, min(speed, 2.0) / 2.0]]
    )


def _resample(xy: NDArray[np.floating], distances: NDArray[np.floating]) -> NDArray[np.float64]:
    """Points of a polyline at given arclengths, continued straight beyond its end. ``[len(distances), 2]``."""
    segment = np.diff(xy, axis=0)
    length = np.hypot(segment[:, 0], segment[:, 1])
    keep = np.concatenate([[True], length > 1e-6])
    xy = np.asarray(xy[keep], dtype=np.float64)
    if len(xy) < 2:
        return np.repeat(xy[:1], len(distances), axis=0)
    arc = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(xy, axis=0).T))])
    end = (xy[-1] - xy[-2]) / (arc[-1] - arc[-2])
    beyond = np.maximum(distances - arc[-1], 0.0)[:, None] * end
    inside = np.stack([np.interp(distances, arc, xy[:, 0]), np.interp(distances, arc, xy[:, 1])], axis=-1)
    return np.asarray(inside + beyond, dtype=np.float64)


def _route(observation: Observation) -> NDArray[np.float32]:
    count = ROUTE_PIECES * ROUTE_PIECE_POINTS
    xy = observation.route_xy
    if len(xy) < 2:
        return np.zeros((ROUTE_PIECES, ROUTE_FEATURES), dtype=np.float32)
    points = _resample(xy, ROUTE_SPACING_M * np.arange(count + 1))
    step = np.diff(points, axis=0)
    heading = np.arctan2(step[:, 1], step[:, 0])
    bend = np.diff(heading, prepend=0.0)
    bend = (bend + np.pi) % (2 * np.pi) - np.pi
    x, y = points[:-1, 0], points[:-1, 1]
    features = [x / 50.0, y / 20.0, np.tanh(y / 2.0), np.cos(heading), np.sin(heading), 5.0 * bend, np.tanh(y / 0.5)]
    return np.stack(features, axis=-1).reshape(ROUTE_PIECES, -1).astype(np.float32)


def _agents(observation: Observation, limit: int) -> NDArray[np.float32]:
    now = observation.agents[:, -1, :2]
    # An agent ahead matters at a greater distance than one behind.
    nearest = np.argsort(np.hypot(now[:, 0] - 10.0, now[:, 1]), kind="stable")[:limit]
    state = observation.agents[nearest]
    valid = observation.agents_valid[nearest].astype(np.float32)[..., None]
    position, heading, velocity = state[..., :2], state[..., 2:3], state[..., 3:]
    motion = np.concatenate([position, velocity], axis=-1) / AGENT_SCALE
    near = np.tanh(position / np.array([8.0, 3.0], dtype=np.float32))
    parts = np.concatenate([motion, np.cos(heading), np.sin(heading), near], axis=-1) * valid
    kind = np.eye(len(AgentType), dtype=np.float32)[observation.agents_type[nearest]]
    return np.concatenate([parts.reshape(len(nearest), 8 * H), observation.agents_size[nearest] / 5.0, kind], axis=-1)


def _lines(observation: Observation, limit: int, points: int) -> NDArray[np.float32]:
    pieces, keys = [], []
    for m in range(len(observation.map_type)):
        xy = observation.map_xy[observation.map_offsets[m] : observation.map_offsets[m + 1]]
        if len(xy) < 2:
            continue
        element = np.zeros(ELEMENT_FEATURES, dtype=np.float32)
        element[observation.map_type[m]] = 1.0
        route, red = observation.map_on_route[m], observation.map_red[m]
        element[-3:] = observation.map_speed_limit[m] / 15.0, route, red
        length = float(np.hypot(*np.diff(xy, axis=0).T).sum())
        count = max(1, round(length / 25.0))
        line = _resample(xy, np.linspace(0.0, length, count * (points - 1) + 1))
        for c in range(count):
            piece = line[c * (points - 1) : (c + 1) * (points - 1) + 1]
            step = np.diff(piece, axis=0, append=2.0 * piece[-1:] - piece[-2:-1])
            step /= np.maximum(np.hypot(step[:, :1], step[:, 1:]), 1e-6)
            x, y = piece[:, :1], piece[:, 1:]
            shape = np.concatenate([x / 50.0, y / 50.0, np.tanh(x / 10.0), np.tanh(y / 5.0), step], axis=-1)
            pieces.append(np.concatenate([shape.ravel(), element]))
            keys.append(np.hypot(x - 15.0, y).min() - 20.0 * float(red) - 10.0 * float(route))
    if not pieces:
        return np.zeros((0, polyline_features(points)), dtype=np.float32)
    nearest = np.argsort(keys, kind="stable")[:limit]
    return np.stack([pieces[i] for i in nearest]).astype(np.float32)


def tensorise(
    observation: Observation, *, max_agents: int, max_polylines: int, points_per_polyline: int
) -> dict[str, NDArray[np.float32]]:
    """One observation as unpadded feature arrays, nearest agents and map pieces first: :class:`ObservationBatch`."""
    return {
        "ego": _ego(observation).astype(np.float32),
        "speed": np.array(observation.speed_mps, dtype=np.float32),
        "route": _route(observation),
        "agents": _agents(observation, max_agents),
        "lines": _lines(observation, max_polylines, points_per_polyline),
    }


def _pad(arrays: Sequence[NDArray[np.float32]]) -> tuple[Tensor, Tensor]:
    """Stack ``[n_i, F]`` arrays to ``[S, max n, F]`` (at least one row) and a bool mask of what is real."""
    rows = max(1, max(len(a) for a in arrays))
    out = np.zeros((len(arrays), rows, arrays[0].shape[-1]), dtype=np.float32)
    mask = np.zeros((len(arrays), rows), dtype=np.bool_)
    for s, array in enumerate(arrays):
        out[s, : len(array)] = array
        mask[s, : len(array)] = True
    return torch.from_numpy(out), torch.from_numpy(mask)


def stack_features(features: Sequence[dict[str, NDArray[np.float32]]]) -> ObservationBatch:
    """Batch of the S feature dicts that :func:`tensorise` made."""
    agents, agents_mask = _pad([f["agents"] for f in features])
    lines, lines_mask = _pad([f["lines"] for f in features])
    return ObservationBatch(
        ego=torch.from_numpy(np.stack([f["ego"] for f in features])),
        speed=torch.tensor([float(f["speed"]) for f in features], dtype=torch.float32),
        route=torch.from_numpy(np.stack([f["route"] for f in features])),
        agents=agents,
        agents_mask=agents_mask,
        lines=lines,
        lines_mask=lines_mask,
    )


def _signs(batch: ObservationBatch) -> dict[str, Tensor]:
    """Sign of every feature under a left-right mirror, by field."""
    state = [1.0, -1.0, -1.0, 1.0, -1.0, 1.0, -1.0, -1.0]
    agent = [1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0]
    points = (batch.lines.shape[-1] - ELEMENT_FEATURES) // POINT_FEATURES
    return {
        "ego": torch.tensor(state * H + [1.0] * (EGO_FEATURES - 8 * H)),
        "route": torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0, -1.0, -1.0] * ROUTE_PIECE_POINTS),
        "agents": torch.tensor(agent * H + [1.0] * (AGENT_FEATURES - 8 * H)),
        "lines": torch.tensor([1.0, -1.0] * (POINT_FEATURES // 2 * points) + [1.0] * ELEMENT_FEATURES),
    }


def mirror_batch(batch: ObservationBatch, flip: Tensor) -> ObservationBatch:
    """The batch with the scenes in `flip` ``[S]`` bool mirrored left to right, driving command included."""
    mirrored: dict[str, Tensor] = {}
    for name, sign in _signs(batch).items():
        values = getattr(batch, name)
        chosen = flip.view(-1, *[1] * (values.ndim - 1))
        mirrored[name] = torch.where(chosen, values * sign.to(values.device), values)
    left, right = 8 * H + int(Command.LEFT), 8 * H + int(Command.RIGHT)
    ego = mirrored["ego"]
    swapped = ego.clone()
    swapped[:, left], swapped[:, right] = ego[:, right], ego[:, left]
    mirrored["ego"] = torch.where(flip[:, None], swapped, ego)
    return replace(batch, **mirrored)
