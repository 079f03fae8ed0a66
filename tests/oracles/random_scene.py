"""Scenes of random numbers, and all that is in one, to the bit."""

from __future__ import annotations

from dataclasses import fields

import numpy as np

from rlhf_drive.scenes import Observation, Scene, SceneReference


def make_scene(seed: int, *, token: str | None = None, cluster: str | None = None) -> Scene:
    """A scene of random numbers and ragged sizes; seed 0 has no agent, no red light, no observed map."""
    rng = np.random.default_rng(seed)
    agents, lines, polygons, reds = (0, 0, 1, 0) if seed == 0 else (int(n) for n in rng.integers(1, 6, 4))
    line_sizes, polygon_sizes, red_sizes = (rng.integers(2, 7, n) for n in (lines, polygons, reds))

    def offsets(sizes: np.ndarray) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(sizes)])

    observation = Observation(
        ego_history=rng.normal(size=(4, 8)),
        agents=rng.normal(size=(agents, 4, 5)),
        agents_valid=rng.random((agents, 4)) < 0.5,
        agents_size=rng.random((agents, 2)),
        agents_type=rng.integers(0, 4, agents),
        map_xy=rng.normal(size=(line_sizes.sum(), 2)),
        map_offsets=offsets(line_sizes),
        map_type=rng.integers(0, 4, lines),
        map_speed_limit=rng.random(lines),
        map_on_route=rng.random(lines) < 0.5,
        map_red=rng.random(lines) < 0.5,
        route_xy=rng.normal(size=(seed % 5, 2)),
        command=seed % 3,
        cameras={"CAM_F0": f"log/CAM_F0/{seed}.jpg", "CAM_Ä": ""} if seed % 2 else {},
    )
    reference = SceneReference(
        t0_us=1_700_000_000_123_457 + seed,
        ego_init=rng.normal(size=11) * 1e6,
        prev_t0_us=1_700_000_000_123_456 - seed,
        prev_ego_init=np.full(11, -0.0),
        past_times_us=rng.integers(0, 2**60, 4),
        past_states=rng.normal(size=(4, 11)),
        human_poses=rng.normal(size=(8, 3)),
        centerline=rng.normal(size=(2 + seed, 3)),
        speed_limit=float("nan") if seed % 2 else 13.4,
        map_xy=rng.normal(size=(polygon_sizes.sum(), 2)) * 1e6,
        map_offsets=offsets(polygon_sizes),
        map_layer=rng.integers(0, 6, polygons),
        map_on_route=rng.random(polygons) < 0.5,
        red_xy=rng.normal(size=(red_sizes.sum(), 2)),
        red_offsets=offsets(red_sizes),
        red_on_route=rng.random(reds) < 0.5,
        red_active=rng.random((reds, 51)) < 0.5,
        agent_pose=rng.normal(size=(agents, 51, 3)),
        agent_velocity=rng.normal(size=(agents, 51, 2)),
        agent_valid=rng.random((agents, 51)) < 0.5,
        agent_size=rng.random((agents, 2)),
        agent_type=rng.integers(0, 4, agents),
        pdm_reference_v1=rng.normal(size=(41 * (seed % 2), 3)),
        pdm_reference_v2=rng.normal(size=(41, 3)),
    )
    token = token or f"scene-{seed}"
    return Scene(token, f"kind-{seed % 3}", cluster or token, bool(seed % 2), observation, reference)


def bits(scene: Scene) -> dict[str, object]:
    """Everything in a scene, arrays as type, shape and bytes."""
    named = {f.name: getattr(scene, f.name) for f in fields(scene) if f.name not in ("observation", "reference")}
    for part in (scene.observation, scene.reference):
        for f in fields(part):
            if f.name == "cameras":
                named[f.name] = dict(part.cameras)
                continue
            value = np.asarray(getattr(part, f.name))
            named[f"{type(part).__name__}.{f.name}"] = (value.dtype.str, value.shape, value.tobytes())
    return named
