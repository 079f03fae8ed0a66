"""Road users and red lights over the steps of a metric cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlhf_drive.scenes.importers.navsim_names import NotAsWrittenError, argument, array_of, attribute, name_of
from rlhf_drive.scenes.importers.navsim_states import STEP_S, Sightings, detected, sightings
from rlhf_drive.scenes.importers.wkb import polygon_rings, quadrilaterals
from rlhf_drive.scenes.model import REFERENCE_STEPS

__all__ = ["Agents", "Lights", "agents_of_outlines", "agents_of_tracks", "red_lights"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Agents:
    """A road users over 51 steps, in the order in which they appear."""

    tokens: tuple[str, ...]
    """``[A]``."""
    pose: Array
    """``[A, 51, 3]`` box centres; zero where not valid."""
    velocity: Array
    """``[A, 51, 2]``."""
    valid: NDArray[np.bool_]
    """``[A, 51]``."""
    size: Array
    """``[A, 2]``."""
    type: NDArray[np.int8]
    """``[A]``."""


@dataclass(frozen=True)
class Lights:
    """Red connectors on the route; R may be 0."""

    tokens: tuple[str, ...]
    """``[R]`` ids of the lane connectors."""
    xy: Array
    """``[V, 2]`` their outlines."""
    offsets: NDArray[np.int64]
    """``[R + 1]``."""
    active: NDArray[np.bool_]
    """``[R, 51]``."""


def agents_of_tracks(tracks: Sequence[object]) -> Agents:
    """From the boxes of every step (v2.2). Size and type are those of the first sighting."""
    steps = [sightings(detected(step)) for step in tracks]
    number = {token: n for n, token in enumerate(dict.fromkeys(token for step in steps for token in step.tokens))}
    count = len(number)
    pose, velocity = np.zeros((count, REFERENCE_STEPS, 3)), np.zeros((count, REFERENCE_STEPS, 2))
    valid = np.zeros((count, REFERENCE_STEPS), dtype=np.bool_)
    size, kind = np.zeros((count, 2)), np.zeros(count, dtype=np.int8)
    for k, step in reversed(list(enumerate(steps))):
        rows = np.array([number[token] for token in step.tokens], dtype=np.int64)
        if len(set(rows.tolist())) != len(rows):
            raise NotAsWrittenError(f"a track token that occurs twice at step {k}")
        pose[rows, k], velocity[rows, k], valid[rows, k] = step.pose, step.velocity, True
        size[rows], kind[rows] = step.size, step.type
    return Agents(tuple(number), pose, velocity, valid, size, kind)


def agents_of_outlines(occupancy: Sequence[object], unique: dict[str, object]) -> Agents:
    """From the outline of every box at every step and the objects as first seen (v1.1).

    The cache has one velocity for each object, that of its first sighting, which is what the rules use. Velocities of
    later steps are differences of positions.
    """
    first = sightings(unique.values())
    if first.tokens != tuple(unique):
        raise NotAsWrittenError("unique objects whose track tokens are not their keys")
    number = {token: n for n, token in enumerate(first.tokens)}
    rows, steps, outlines = _outlines(occupancy, number)
    corners = quadrilaterals(outlines)
    count = len(number)
    pose, valid = np.zeros((count, REFERENCE_STEPS, 3)), np.zeros((count, REFERENCE_STEPS), dtype=np.bool_)
    # Corners: front left, rear left, rear right, front right.
    ahead = corners[:, 0] + corners[:, 3] - corners[:, 1] - corners[:, 2]
    pose[rows, steps, :2], pose[rows, steps, 2] = corners.mean(axis=1), np.arctan2(ahead[:, 1], ahead[:, 0])
    valid[rows, steps] = True
    if not valid.any(axis=1).all():
        raise NotAsWrittenError("an object that is at no step")
    return Agents(first.tokens, pose, _velocities(first, pose, valid), valid, first.size, first.type)


def _outlines(
    occupancy: Sequence[object], number: dict[str, int]
) -> tuple[NDArray[np.int64], NDArray[np.int64], list[bytes]]:
    """Object, step and well-known binary of every box."""
    rows: list[int] = []
    steps: list[int] = []
    outlines: list[bytes] = []
    for k, step in enumerate(occupancy):
        named, shapes = (array_of(argument(step, "PDMOccupancyMap", index)) for index in (0, 1))
        tokens = [name_of(token) for token in named]
        if len(tokens) != len(shapes) or len(set(tokens)) != len(tokens):
            raise NotAsWrittenError(f"tokens and outlines that do not match at step {k}")
        if unknown := set(tokens) - set(number):
            raise NotAsWrittenError(f"an object that is not described: {sorted(unknown)[0][:60]}")
        rows += [number[token] for token in tokens]
        steps += [k] * len(tokens)
        outlines += [well_known_binary(shape) for shape in shapes]
    return np.array(rows, dtype=np.int64), np.array(steps, dtype=np.int64), outlines


def well_known_binary(shape: object) -> bytes:
    """The bytes of a pickled geometry."""
    data = argument(shape, "from_wkb")
    if type(data) is not bytes:
        raise NotAsWrittenError("a geometry that is no bytes")
    return data


def _velocities(first: Sightings, pose: Array, valid: NDArray[np.bool_]) -> Array:
    """``[A, 51, 2]`` that of the first sighting there, differences to the step before afterwards."""
    velocity = np.zeros((*valid.shape, 2))
    velocity[:, 1:] = np.diff(pose[..., :2], axis=1) / STEP_S
    both = valid.copy()
    both[:, 1:] &= valid[:, :-1]
    velocity[~both] = 0.0
    velocity[np.arange(len(valid)), valid.argmax(axis=1)] = first.velocity
    return velocity


def red_lights(steps: Sequence[object], prefix: str) -> Lights:
    """From token lists and outlines of every step (v2.2), where all are red and on the route already."""
    shapes: dict[str, Array] = {}
    seen: list[set[str]] = []
    for step in steps:
        pair = array_of(step)
        if len(pair) != 2:
            raise NotAsWrittenError("traffic lights that are no pair of tokens and outlines")
        tokens, outlines = (array_of(part) for part in pair)
        if len(tokens) != len(outlines) or not all(isinstance(token, str) for token in tokens):
            raise NotAsWrittenError("traffic lights whose tokens and outlines do not match")
        seen.append(set(tokens))
        for token, outline in zip(tokens, outlines, strict=True):
            if token not in shapes:
                rings = polygon_rings(well_known_binary(outline))
                if len(rings) != 1:
                    raise NotAsWrittenError(f"a red lane connector made of {len(rings)} rings, where one belongs")
                shapes[token] = rings[0]
    active = np.zeros((len(shapes), REFERENCE_STEPS), dtype=np.bool_)
    for r, token in enumerate(shapes):
        active[r, : len(seen)] = [token in step for step in seen]
    offsets = np.concatenate([[0], np.cumsum([len(ring) for ring in shapes.values()])]).astype(np.int64)
    names = tuple(token.removeprefix(f"{prefix}_") for token in shapes)
    return Lights(names, np.concatenate([np.zeros((0, 2)), *shapes.values()]), offsets, active)


def step_list(observation: object, name: str, steps: int) -> list[object]:
    """An attribute of the observation with one entry for each step."""
    found = list(array_of(attribute(observation, name)))
    if len(found) != steps:
        raise NotAsWrittenError(f"{name} of {len(found)} steps, where {steps} belong")
    return found
