"""NAVSIM metric caches of v1.1 and v2.2 as scenes, without NAVSIM, nuPlan or shapely.

What a cache holds goes over bit by bit; what it lacks stays empty: v1.1 has neither red lights nor past nor the
human's drive, neither version has a speed limit, and v2.2 ends after 4 s instead of 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rlhf_drive.errors import DataError
from rlhf_drive.scenes.importers.navsim_agents import (
    Agents,
    Lights,
    agents_of_outlines,
    agents_of_tracks,
    red_lights,
    step_list,
    well_known_binary,
)
from rlhf_drive.scenes.importers.navsim_names import (
    CACHE_NAMES,
    OTHER_FORM,
    NotAsWrittenError,
    argument,
    array_of,
    attribute,
    enum_value,
    is_a,
    name_of,
)
from rlhf_drive.scenes.importers.navsim_states import (
    Sightings,
    detected,
    ego_state,
    ego_states,
    first_seen_us,
    resampled_reference,
    se2,
    sightings,
    time_us,
)
from rlhf_drive.scenes.importers.pickled_values import Record
from rlhf_drive.scenes.importers.safe_pickle import MAX_BYTES, read_lzma, rebuild
from rlhf_drive.scenes.importers.wkb import joined_ring, polygon_rings
from rlhf_drive.scenes.model import REFERENCE_STEPS, MapLayer, SceneReference
from rlhf_drive.scenes.trajectories import NUM_POSES

__all__ = ["NavsimCache", "NavsimVersion", "read_navsim_cache"]

Array = NDArray[np.float64]
NavsimVersion = Literal["v1.1", "v2.2"]
"""Versions of NAVSIM whose metric caches are read; v2.2 also reads what v2.0 and later wrote in its form."""

_STEPS = {"v1.1": 51, "v2.2": 41}
_LAYERS = {
    0: MapLayer.LANE,
    1: MapLayer.INTERSECTION,
    5: MapLayer.DRIVABLE_AREA,
    11: MapLayer.LANE_CONNECTOR,
    15: MapLayer.CARPARK_AREA,
    17: MapLayer.ROADBLOCK,
}
"""By the number of nuPlan's `SemanticMapLayer`; the scorer knows no others."""
_LANES = (MapLayer.LANE, MapLayer.LANE_CONNECTOR)
_ONLY_V2 = ("human_trajectory", "past_human_trajectory", "timepoint")
_SYNTHETIC = 1
_FRAME_US = 250_000


@dataclass(frozen=True)
class NavsimCache:
    """One metric cache."""

    token: str
    """Token of the scene: the name of the folder that holds the cache."""
    version: NavsimVersion
    """Version of NAVSIM that wrote it."""
    log: str
    """Name of the log the scene is from."""
    synthetic: bool
    """Whether it is a scene of the second stage, which no human drove."""
    reference: SceneReference
    """What the scorer needs, world frame."""
    agent_tokens: tuple[str, ...]
    """``[A]`` track tokens, in the order of the reference."""
    map_tokens: tuple[str, ...]
    """``[P]`` ids of the map polygons, in the order of the reference."""
    red_tokens: tuple[str, ...]
    """``[R]`` ids of the red lane connectors, in the order of the reference."""
    seen: tuple[Sightings | None, ...]
    """Road users annotated at -1.5, -1, -0.5 and 0 s; None where the cache does not say."""


def read_navsim_cache(
    path: Path | str, *, version: NavsimVersion | None = None, max_bytes: int = MAX_BYTES
) -> NavsimCache:
    """Read one metric cache. No code of the file runs and no class of it is loaded.

    Args:
        path: A ``<log>/<type>/<token>/metric_cache.pkl``.
        version: Version it must be of; None takes either.
        max_bytes: Limit for its decompressed size.

    Raises:
        DataError: It is missing, cut off, no lzma file, no metric cache, of another version, names a class that no
            metric cache holds, or lacks something; the message names file and reason.

    Example:
        >>> read_navsim_cache("cache/log/unknown/token/metric_cache.pkl").version  # doctest: +SKIP
        'v1.1'
    """
    path = Path(path)
    if version not in (None, "v1.1", "v2.2"):
        raise DataError(f"NAVSIM {version!r} has no metric cache that can be read. Known: v1.1, v2.2.")
    value = rebuild(read_lzma(path, max_bytes=max_bytes), CACHE_NAMES, path)
    if not is_a(value, "MetricCache"):
        raise DataError(
            f"{path}: holds a {value.kind if isinstance(value, Record) else type(value).__name__}, not a MetricCache. "
            "Give a folder of metric caches; logs are given as logs."
        )
    present = [name for name in _ONLY_V2 if name in value.state]
    found: NavsimVersion = "v2.2" if present else "v1.1"
    if version not in (None, found):
        raise DataError(
            f"{path}: is a metric cache of NAVSIM {found}, not {version}. Ask for {found}, or make the caches again "
            f"with NAVSIM {version}."
        )
    try:
        return _CacheReader(path, value, found).read()
    except OTHER_FORM as error:
        raise DataError(
            f"{path}: is no metric cache of NAVSIM {found} that can be scored: {str(error).rstrip('.')}."
        ) from error


@dataclass(frozen=True)
class _CacheReader:
    """Turns the record of one cache into arrays."""

    path: Path
    cache: Record
    version: NavsimVersion

    def read(self) -> NavsimCache:
        cache, observation = self.cache, attribute(self.cache, "observation")
        if not is_a(observation, "PDMObservation"):
            raise NotAsWrittenError("its observation is no PDMObservation")
        state = attribute(cache, "ego_state")
        t0_us = time_us(attribute(cache, "timepoint") if self.version == "v2.2" else attribute(state, "_time_point"))
        agents, lights, seen = self._traffic(observation, t0_us)
        tokens, map_fields = self._map()
        reference = SceneReference(
            **map_fields,
            **_agent_fields(agents),
            **_light_fields(lights),
            **self._past_and_future(),
            **self._progress(t0_us),
            t0_us=t0_us,
            ego_init=ego_state(state),
            speed_limit=float("nan"),
        )
        kind = attribute(cache, "scene_type") if self.version == "v2.2" else None
        synthetic = kind is not None and enum_value(kind, "SceneFrameType") == _SYNTHETIC
        return NavsimCache(
            token=self.path.parent.name,
            version=self.version,
            log=self._log(),
            synthetic=synthetic,
            reference=reference,
            agent_tokens=agents.tokens,
            map_tokens=tokens,
            red_tokens=lights.tokens,
            seen=seen,
        )

    def _log(self) -> str:
        """Name of the log: v2.2 says it, v1.1 has it in the path, ``<log>/<type>/<token>/metric_cache.pkl``."""
        if self.version == "v2.2":
            name = attribute(self.cache, "log_name")
        else:
            above = Path(name_of(self.cache.state.get("file_path", ""))).parts[-4:]
            name = above[0] if len(above) == 4 else self.path.absolute().parents[2].name
        if type(name) is not str or not name:
            raise NotAsWrittenError("its log has no name")
        return name

    def _traffic(self, observation: object, t0_us: int) -> tuple[Agents, Lights, tuple[Sightings | None, ...]]:
        """Road users and lights over the steps, and who was annotated at the observed times."""
        steps = _STEPS[self.version]
        occupancy = step_list(observation, "_occupancy_maps", steps)
        if self.version == "v2.2":
            agents = agents_of_tracks(step_list(observation, "_detections_tracks", steps))
            lights = red_lights(
                step_list(observation, "_occupancy_maps_tl", steps), name_of(attribute(observation, "_red_light_token"))
            )
            return agents, lights, self._seen()
        unique = attribute(observation, "_unique_objects")
        if not isinstance(unique, dict):
            raise NotAsWrittenError("its unique objects are no mapping")
        agents = agents_of_outlines(occupancy, unique)
        # An object that is annotated once only is put at every step, even if that is seconds later.
        first = np.array([first_seen_us(item) for item in unique.values()], dtype=np.int64)
        here = agents.valid[:, 0] & (np.abs(first - t0_us) < _FRAME_US)
        now = sightings(unique.values()).chosen(here)
        return agents, red_lights([], ""), (None, None, None, now)

    def _seen(self) -> tuple[Sightings | None, ...]:
        past = list(array_of(attribute(self.cache, "past_detections_tracks")))[-3:]
        current = list(array_of(attribute(self.cache, "current_tracked_objects")))
        if len(current) != 1:
            raise NotAsWrittenError(f"{len(current)} frames of current objects, where one belongs")
        known = [sightings(detected(tracks)) for tracks in [*past, *current]]
        return (*[None] * (4 - len(known)), *known)

    def _map(self) -> tuple[tuple[str, ...], dict[str, Any]]:
        """Ids and arrays of the map polygons."""
        area = attribute(self.cache, "drivable_area_map")
        tokens, layers, shapes = (array_of(argument(area, "PDMDrivableMap", index)) for index in (0, 1, 2))
        if not len(tokens) == len(layers) == len(shapes):
            raise NotAsWrittenError("map polygons whose ids, layers and outlines do not match")
        route = {name_of(token) for token in array_of(attribute(self.cache, "route_lane_ids"))}
        names, kinds, rings = [], [], []
        for token, layer, shape in zip(tokens, layers, shapes, strict=True):
            kind = _LAYERS.get(enum_value(layer, "SemanticMapLayer"))
            if kind is not None:
                names.append(name_of(token))
                kinds.append(kind)
                rings.append(joined_ring(polygon_rings(well_known_binary(shape))))
        on_route = [name in route and kind in _LANES for name, kind in zip(names, kinds, strict=True)]
        return tuple(names), {
            "map_xy": np.concatenate([np.zeros((0, 2)), *rings]),
            "map_offsets": np.concatenate([[0], np.cumsum([len(ring) for ring in rings])]).astype(np.int64),
            "map_layer": np.array(kinds, dtype=np.int8),
            "map_on_route": np.array(on_route, dtype=np.bool_),
        }

    def _past_and_future(self) -> dict[str, Any]:
        """The logged past, the frame before and the human's drive; empty where the cache has none."""
        if self.version == "v1.1":
            return {
                "past_times_us": np.zeros(0, dtype=np.int64),
                "past_states": np.zeros((0, 11)),
                "prev_t0_us": 0,
                "prev_ego_init": np.zeros(0),
                "human_poses": np.zeros((0, 3)),
            }
        times, states = ego_states(attribute(self.cache, "past_human_trajectory"))
        human = attribute(self.cache, "human_trajectory")
        poses = np.zeros((0, 3)) if human is None else array_of(attribute(human, "poses"))
        if isinstance(poses, list):
            raise NotAsWrittenError("a list of human poses where an array belongs")
        if len(states) != 4 or poses.shape not in ((0, 3), (NUM_POSES, 3)):
            raise NotAsWrittenError(
                f"{len(states)} past states and human poses of shape {list(poses.shape)}, where 4 and [8, 3] belong"
            )
        return {
            "past_times_us": times,
            "past_states": states,
            "prev_t0_us": int(times[-2]),
            "prev_ego_init": states[-2],
            "human_poses": poses,
        }

    def _progress(self, t0_us: int) -> dict[str, Any]:
        """Centreline and the reference planner's trajectory; the other version's stays empty."""
        path = array_of(argument(attribute(self.cache, "centerline"), "PDMPath"))
        planned = resampled_reference(attribute(self.cache, "trajectory"), t0_us)
        mine, other = ("v1", "v2") if self.version == "v1.1" else ("v2", "v1")
        return {
            "centerline": np.array([se2(pose) for pose in path]).reshape(-1, 3),
            f"pdm_reference_{mine}": planned,
            f"pdm_reference_{other}": np.zeros((0, 3)),
        }


def _agent_fields(agents: Agents) -> dict[str, Any]:
    return {
        "agent_pose": agents.pose,
        "agent_velocity": agents.velocity,
        "agent_valid": agents.valid,
        "agent_size": agents.size,
        "agent_type": agents.type,
    }


def _light_fields(lights: Lights) -> dict[str, Any]:
    if lights.active.shape[1] != REFERENCE_STEPS:
        raise NotAsWrittenError("red lights of another number of steps")
    return {
        "red_xy": lights.xy,
        "red_offsets": lights.offsets,
        "red_on_route": np.ones(len(lights.active), dtype=np.bool_),
        "red_active": lights.active,
    }
