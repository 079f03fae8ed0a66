"""Scenes with candidate plans from a folder of ``<id>.scene.json`` and ``<id>.scene.npz`` files."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf_drive.errors import DataError
from rlhf_drive.scenes.model import AgentType, MapLayer, SceneReference

__all__ = ["VectorScene", "read_vector", "read_vectors"]

_SUFFIX = ".scene.json"
_AGENT_TYPES = {"VEHICLE": AgentType.VEHICLE, "PEDESTRIAN": AgentType.PEDESTRIAN, "BICYCLE": AgentType.BICYCLE}
_SAME_NAME = (
    "ego_init",
    "prev_ego_init",
    "past_states",
    "human_poses",
    "centerline",
    "map_offsets",
    "red_offsets",
    "red_active",
    "agent_pose",
    "agent_valid",
)
_RENAMED = {
    "map_xy": "map_vertices",
    "red_xy": "red_vertices",
    "agent_velocity": "agent_vel",
}
_OPTIONAL = {"pdm_reference_v1": "pdm_ref_v1", "pdm_reference_v2": "pdm_ref_v2"}


@dataclass(frozen=True)
class VectorScene:
    """One scene of a vector folder: the world, plans to score in it, and a word about each plan."""

    name: str
    """File name without suffix."""
    kind: str
    """Situation kind."""
    reference: SceneReference
    """The world, in the source's frame."""
    candidates: NDArray[np.float64]
    """``[B, 8, 3]`` plans in the t=0 ego frame."""
    tags: tuple[str, ...]
    """``[B]`` how each plan was made (`stand_still`, `human`, …); empty words if the file does not say."""
    prev_candidates: NDArray[np.float64]
    """``[B, 8, 3]`` companion plans of the previous frame, in its ego frame; may be empty."""
    prev_tags: tuple[str, ...]
    """``[B]`` how each companion plan was made; may be empty."""


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: not readable as JSON ({error}). Restore the file.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: must hold a JSON object; got {type(content).__name__}.")
    return content


def _read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except FileNotFoundError as error:
        raise DataError(f"{path}: missing, though its {_SUFFIX} is there. Restore the file.") from error
    except (OSError, ValueError, TypeError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: not a complete NPZ archive of plain arrays ({error}). Restore the file.") from error
    for key, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise DataError(f"{path}: not a complete NPZ archive of plain arrays ({key} is none). Restore the file.")
    return arrays


def _layer(name: str) -> int:
    try:
        return int(MapLayer[name])
    except KeyError:
        raise DataError(f"unknown map layer {name!r}; known: {', '.join(layer.name for layer in MapLayer)}.") from None


def _reference(info: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> SceneReference:
    """The world of one scene; KeyError names a key that is missing."""
    route = set(info["route_lane_ids"])
    layers = [_layer(element["layer"]) for element in info["map"]]
    lanes = (MapLayer.LANE, MapLayer.LANE_CONNECTOR)
    on_route = [
        element["token"] in route and layer in lanes for element, layer in zip(info["map"], layers, strict=True)
    ]
    agents = info["agents"]
    limit = info.get("speed_limit_mps")
    fields: dict[str, Any] = {name: arrays[name] for name in _SAME_NAME}
    fields |= {name: arrays[key] for name, key in _RENAMED.items()}
    fields |= {name: arrays.get(key, np.zeros((0, 3))) for name, key in _OPTIONAL.items()}
    return SceneReference(
        **fields,
        t0_us=info["t0_us"],
        prev_t0_us=info["prev_t0_us"],
        past_times_us=np.asarray(info["past_times_us"], dtype=np.int64),
        speed_limit=float("nan") if limit is None else float(limit),
        map_layer=np.asarray(layers, dtype=np.int8),
        map_on_route=np.asarray(on_route, dtype=np.bool_),
        red_on_route=np.asarray([light["on_route"] for light in info["red_lights"]], dtype=np.bool_),
        agent_size=np.asarray([[a["length"], a["width"]] for a in agents], dtype=np.float64).reshape(-1, 2),
        agent_type=np.asarray([_AGENT_TYPES.get(a["type"], AgentType.STATIC) for a in agents], dtype=np.int8),
    )


def read_vector(path: Path) -> VectorScene:
    """Read one scene.

    Args:
        path: The ``<id>.scene.json``; its ``.scene.npz`` lies beside it.

    Raises:
        DataError: A file is missing, truncated, or holds wrong keys or shapes; the message names it.
    """
    path = Path(path)
    info = _read_json(path)
    arrays = _read_arrays(path.with_suffix(".npz"))
    try:
        reference = _reference(info, arrays)
        candidates = np.asarray(arrays["cand"], dtype=np.float64)
        prev_candidates = np.asarray(arrays.get("prev_cand", np.zeros((0, 8, 3))), dtype=np.float64)
        tags = tuple(str(tag) for tag in info.get("cand_tags", [""] * len(candidates)))
    except KeyError as error:
        raise DataError(f"{path} (or its .npz) lacks the key {error}.") from error
    except (TypeError, ValueError) as error:
        raise DataError(f"{path} (or its .npz): {error}") from error
    if candidates.shape != (len(tags), 8, 3):
        raise DataError(f"{path}: cand must be [{len(tags)}, 8, 3], one per tag; got {list(candidates.shape)}.")
    if prev_candidates.ndim != 3 or prev_candidates.shape[1:] != (8, 3):
        raise DataError(f"{path}: prev_cand must be [*, 8, 3]; got {list(prev_candidates.shape)}.")
    return VectorScene(
        name=path.name.removesuffix(_SUFFIX),
        kind=str(info.get("kind", "unknown")),
        reference=reference,
        candidates=candidates,
        tags=tags,
        prev_candidates=prev_candidates,
        prev_tags=tuple(str(tag) for tag in info.get("prev_tags", ())),
    )


def read_vectors(folder: Path | str) -> Iterator[VectorScene]:
    """Every scene of a folder, by name.

    Raises:
        DataError: The folder is absent or holds no ``*.scene.json``, or a scene cannot be read.

    Example:
        >>> names = [scene.name for scene in read_vectors("vectors")]  # doctest: +SKIP
    """
    folder = Path(folder)
    paths = sorted(folder.glob(f"*{_SUFFIX}"))
    if not paths:
        raise DataError(f"{folder}: no *{_SUFFIX} file found. Give the folder that holds <id>.scene.json and .npz.")
    for path in paths:
        yield read_vector(path)
