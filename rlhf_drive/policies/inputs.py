"""Observations as fixed-size tensors: the only way a scene reaches the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlhf_drive.policies.route import ROUTE_PIECE_POINTS, ROUTE_PIECES, along_route, resample, route_points
from rlhf_drive.scenes import HISTORY_TIMES_S, AgentType, Command, MapElement, Observation

__all__ = [
    "AGENT_FEATURES",
    "EGO_FEATURES",
    "ROUTE_FEATURES",
    "ObservationBatch",
    "mirror_batch",
    "polyline_features",
    "stack_features",
    "tensorise",
]

H = len(HISTORY_TIMES_S)
LEADERS = 2
"""Agents on the route ahead that are put beside the ego's own state."""
LEADER_FEATURES = 5
EGO_FEATURES = H * 8 + len(Command) + 2 + LEADERS * LEADER_FEATURES + 2
AGENT_FEATURES = H * 8 + 6 + len(AgentType)
CORRIDOR_HALF_WIDTH_M = 1.6
"""An agent or red lane whose middle is within this of the route, beyond its own half width, is in the way."""
ROUTE_FEATURES = ROUTE_PIECE_POINTS * 7
POINT_FEATURES = 6
ELEMENT_FEATURES = len(MapElement) + 3 + 4

# Mirrored features change sign where they are lateral; metres are scaled to order one, twice: coarse and fine.
EGO_SCALE = np.array([20.0, 2.0, 0.5, 10.0, 1.0, 2.0, 2.0, 0.3], dtype=np.float32)
AGENT_SCALE = np.array([40.0, 20.0, 10.0, 10.0], dtype=np.float32)


@dataclass(frozen=True)
class ObservationBatch:
    """S observations as padded float32 tensors, order-one scaled, in the ego frame."""

    ego: Tensor
    """``[S, EGO_FEATURES]`` past states, command, speed, and what is in the way on the route ahead."""
    anchor: Tensor
    """``[S, L]`` metres: the numbers that encode driving on along the route at the present speed."""
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


def _ego(observation: Observation, route: NDArray[np.float64]) -> NDArray[np.float32]:
    command = np.eye(len(Command), dtype=np.float32)[observation.command]
    speed = observation.speed_mps
    past = (observation.ego_history / EGO_SCALE).ravel()
    pace = [speed / 20.0, min(speed, 2.0) / 2.0]
    return np.concatenate([past, command, pace, _leaders(observation, route), _red(observation, route)])


def _leaders(observation: Observation, route: NDArray[np.float64]) -> NDArray[np.float64]:
    """The nearest agents in the way, nearest first: present, distance, speed along the route, offset, static."""
    found = np.zeros((LEADERS, LEADER_FEATURES))
    if len(observation.agents):
        now = observation.agents[:, -1]
        s, d, direction = along_route(route, now[:, :2])
        speed = (now[:, 3:] * direction).sum(axis=-1)
        ahead = np.flatnonzero((s > 0) & (np.abs(d) < CORRIDOR_HALF_WIDTH_M + observation.agents_size[:, 1] / 2))
        nearest = ahead[np.argsort(s[ahead], kind="stable")[:LEADERS]]
        static = observation.agents_type[nearest] == AgentType.STATIC
        columns = [np.ones(len(nearest)), s[nearest] / 30.0, speed[nearest] / 10.0, np.tanh(d[nearest]), static]
        found[: len(nearest)] = np.stack(columns, axis=-1)
    return found.ravel()


def _red(observation: Observation, route: NDArray[np.float64]) -> NDArray[np.float64]:
    """Whether a lane ahead on the route is red, and how far its beginning is."""
    drawn = np.diff(observation.map_offsets) > 0  # a polyline without points has no beginning
    starts = observation.map_xy[observation.map_offsets[:-1][observation.map_red & observation.map_on_route & drawn]]
    if not len(starts):
        return np.zeros(2)
    s, d, _ = along_route(route, starts)
    near = s[(np.abs(d) < 2.0 * CORRIDOR_HALF_WIDTH_M) & (s > -5.0)]
    return np.array([1.0, near.min() / 30.0]) if len(near) else np.zeros(2)


def _route(points: NDArray[np.float64]) -> NDArray[np.float32]:
    step = np.diff(points, axis=0)
    heading = np.arctan2(step[:, 1], step[:, 0])
    bend = np.diff(heading, prepend=0.0)
    bend = (bend + np.pi) % (2 * np.pi) - np.pi
    x, y = points[:-1, 0], points[:-1, 1]
    features = [x / 50.0, y / 20.0, np.tanh(y / 2.0), np.cos(heading), np.sin(heading), 5.0 * bend, np.tanh(y / 0.5)]
    return np.stack(features, axis=-1).reshape(ROUTE_PIECES, -1).astype(np.float32)


def _agents(observation: Observation, route: NDArray[np.float64], limit: int) -> NDArray[np.float32]:
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
    s, d, direction = along_route(route, state[:, -1, :2])
    velocity = state[:, -1, 3:]
    forward = (velocity * direction).sum(axis=-1)
    sideways = direction[:, 0] * velocity[:, 1] - direction[:, 1] * velocity[:, 0]
    placed = np.stack([s / 30.0, forward / 10.0, np.tanh(d / 2.0), np.tanh(sideways / 2.0)], axis=-1)
    size = observation.agents_size[nearest] / 5.0
    return np.concatenate([parts.reshape(len(nearest), 8 * H), size, placed, kind], axis=-1, dtype=np.float32)


def _lines(observation: Observation, route: NDArray[np.float64], limit: int, points: int) -> NDArray[np.float32]:
    pieces, keys, ends = [], [], []
    for m in range(len(observation.map_type)):
        xy = observation.map_xy[observation.map_offsets[m] : observation.map_offsets[m + 1]]
        if len(xy) < 2:
            continue
        element = np.zeros(ELEMENT_FEATURES - 4, dtype=np.float32)
        element[observation.map_type[m]] = 1.0
        on_route, red = observation.map_on_route[m], observation.map_red[m]
        element[-3:] = observation.map_speed_limit[m] / 15.0, on_route, red
        length = float(np.hypot(*np.diff(xy, axis=0).T).sum())
        count = max(1, round(length / 25.0))
        line = resample(xy, np.linspace(0.0, length, count * (points - 1) + 1))
        for c in range(count):
            piece = line[c * (points - 1) : (c + 1) * (points - 1) + 1]
            step = np.diff(piece, axis=0, append=2.0 * piece[-1:] - piece[-2:-1])
            step /= np.maximum(np.hypot(step[:, :1], step[:, 1:]), 1e-6)
            x, y = piece[:, :1], piece[:, 1:]
            shape = np.concatenate([x / 50.0, y / 50.0, np.tanh(x / 10.0), np.tanh(y / 5.0), step], axis=-1)
            pieces.append(np.concatenate([shape.ravel(), element]))
            ends.append(piece[[0, -1]])
            keys.append(np.hypot(x - 15.0, y).min() - 20.0 * float(red) - 10.0 * float(on_route))
    if not pieces:
        return np.zeros((0, polyline_features(points)), dtype=np.float32)
    nearest = np.argsort(keys, kind="stable")[:limit]
    s, d, _ = along_route(route, np.concatenate([ends[i] for i in nearest]))
    placed = np.stack([s / 30.0, np.tanh(d / 3.0)], axis=-1).reshape(len(nearest), 4)
    return np.concatenate([np.stack([pieces[i] for i in nearest]), placed], axis=-1, dtype=np.float32)


def tensorise(
    observation: Observation, *, max_agents: int, max_polylines: int, points_per_polyline: int
) -> dict[str, NDArray[np.float32]]:
    """One observation as unpadded feature arrays, nearest agents and map pieces first; without the anchor."""
    route = route_points(observation)
    return {
        "ego": _ego(observation, route).astype(np.float32),
        "route": _route(route),
        "agents": _agents(observation, route, max_agents),
        "lines": _lines(observation, route, max_polylines, points_per_polyline),
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
        anchor=torch.from_numpy(np.stack([f["anchor"] for f in features])),
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
        "ego": torch.tensor(state * H + [1.0] * (len(Command) + 2) + [1.0, 1.0, 1.0, -1.0, 1.0] * LEADERS + [1.0] * 2),
        "route": torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0, -1.0, -1.0] * ROUTE_PIECE_POINTS),
        "anchor": torch.tensor([1.0, -1.0] * (batch.anchor.shape[-1] // 2)),
        "agents": torch.tensor(agent * H + [1.0] * 4 + [-1.0] * 2 + [1.0] * len(AgentType)),
        "lines": torch.tensor(
            [1.0, -1.0] * (POINT_FEATURES // 2 * points) + [1.0] * (ELEMENT_FEATURES - 4) + [1.0, -1.0] * 2
        ),
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
