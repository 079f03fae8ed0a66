"""Scenes as Arrow columns: arrays are stored flat, row by row, and get their shape back from the table below."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf_drive.errors import DataError
from rlhf_drive.scenes.model import HISTORY_TIMES_S, REFERENCE_STEPS, Observation, Scene, SceneReference

__all__ = ["RecordBatchReader", "arrow_schema", "scene_batch"]

_H, _R = len(HISTORY_TIMES_S), REFERENCE_STEPS
_SCALARS = {
    "token": "string",
    "kind": "string",
    "cluster": "string",
    "split": "string",
    "challenging": "bool",
    "obs_command": "int8",
    "ref_t0_us": "int64",
    "ref_prev_t0_us": "int64",
    "ref_speed_limit": "float64",
}
_CAMERAS = "obs_cameras"
"""Text column with a JSON object; stores of format version 1 lack it."""
_ARRAYS: dict[str, tuple[str, tuple[int, ...]]] = {
    "obs_ego_history": ("float32", (_H, 8)),
    "obs_agents": ("float32", (-1, _H, 5)),
    "obs_agents_valid": ("bool", (-1, _H)),
    "obs_agents_size": ("float32", (-1, 2)),
    "obs_agents_type": ("int8", (-1,)),
    "obs_map_xy": ("float32", (-1, 2)),
    "obs_map_offsets": ("int32", (-1,)),
    "obs_map_type": ("int8", (-1,)),
    "obs_map_speed_limit": ("float32", (-1,)),
    "obs_map_on_route": ("bool", (-1,)),
    "obs_map_red": ("bool", (-1,)),
    "obs_route_xy": ("float32", (-1, 2)),
    "ref_ego_init": ("float64", (11,)),
    "ref_prev_ego_init": ("float64", (-1,)),
    "ref_past_times_us": ("int64", (-1,)),
    "ref_past_states": ("float64", (-1, 11)),
    "ref_human_poses": ("float64", (-1, 3)),
    "ref_centerline": ("float64", (-1, 3)),
    "ref_map_xy": ("float64", (-1, 2)),
    "ref_map_offsets": ("int64", (-1,)),
    "ref_map_layer": ("int8", (-1,)),
    "ref_map_on_route": ("bool", (-1,)),
    "ref_red_xy": ("float64", (-1, 2)),
    "ref_red_offsets": ("int64", (-1,)),
    "ref_red_on_route": ("bool", (-1,)),
    "ref_red_active": ("bool", (-1, _R)),
    "ref_agent_pose": ("float64", (-1, _R, 3)),
    "ref_agent_velocity": ("float64", (-1, _R, 2)),
    "ref_agent_valid": ("bool", (-1, _R)),
    "ref_agent_size": ("float64", (-1, 2)),
    "ref_agent_type": ("int8", (-1,)),
    "ref_pdm_reference_v1": ("float64", (-1, 3)),
    "ref_pdm_reference_v2": ("float64", (-1, 3)),
}
"""Type and shape of every array column; -1 is the ragged axis, whose length follows from the stored offsets."""


def arrow_schema(version: int = 2) -> Any:
    """The `pyarrow.Schema` of a shard: one scalar column per name and value, one list column per array.

    Args:
        version: Format version of the store; 1 has no cameras.
    """
    import pyarrow as pa

    scalars = [pa.field(name, pa.type_for_alias(kind)) for name, kind in _SCALARS.items()]
    if version > 1:
        scalars.append(pa.field(_CAMERAS, pa.string()))
    arrays = [pa.field(name, pa.list_(pa.type_for_alias(kind))) for name, (kind, _) in _ARRAYS.items()]
    return pa.schema(scalars + arrays)


def _values(scene: Scene, split: str) -> dict[str, Any]:
    """Column values of one scene; arrays keep their shape."""
    row: dict[str, Any] = {
        "token": scene.token,
        "kind": scene.kind,
        "cluster": scene.cluster,
        "split": split,
        "challenging": bool(scene.challenging),
    }
    row |= {f"obs_{f.name}": getattr(scene.observation, f.name) for f in fields(Observation)}
    row |= {f"ref_{f.name}": getattr(scene.reference, f.name) for f in fields(SceneReference)}
    row[_CAMERAS] = json.dumps(dict(scene.observation.cameras))
    return row


def scene_batch(scenes: Sequence[Scene], splits: Sequence[str]) -> Any:
    """One `pyarrow.Table` with a row per scene.

    Args:
        scenes: B scenes.
        splits: B split names, one per scene.

    Returns:
        A table of :func:`arrow_schema`; every float keeps its bits.
    """
    import pyarrow as pa

    schema = arrow_schema()
    rows = [_values(scene, split) for scene, split in zip(scenes, splits, strict=True)]
    columns = []
    for field in schema:
        if field.name not in _ARRAYS:
            columns.append(pa.array([row[field.name] for row in rows], type=field.type))
            continue
        flat = [row[field.name].reshape(-1) for row in rows]
        offsets = np.concatenate([[0], np.cumsum([len(part) for part in flat])]).astype(np.int32)
        values = pa.array(np.concatenate(flat), type=field.type.value_type)
        columns.append(pa.ListArray.from_arrays(pa.array(offsets), values))
    return pa.Table.from_arrays(columns, schema=schema)


class RecordBatchReader:
    """Scenes of one Arrow record batch, read where they lie: numeric arrays are read-only views of the mapped file."""

    def __init__(self, batch: Any) -> None:
        self._scalars = {name: batch.column(name) for name in _SCALARS}
        self._cameras = batch.column(_CAMERAS) if _CAMERAS in batch.schema.names else None
        self._arrays: list[tuple[str, tuple[int, ...], np.dtype[Any], NDArray[np.int32], Any]] = []
        for name, (kind, shape) in _ARRAYS.items():
            column = batch.column(name)
            # Bits are unpacked by Arrow; numbers are looked at in its buffer, at a fifth of the time and memory.
            values = column.values if kind == "bool" else column.values.buffers()[1]
            self._arrays.append((name, shape, np.dtype(kind), column.offsets.to_numpy(), values))

    def scene(self, row: int) -> Scene:
        """Scene at `row` of the batch.

        Raises:
            DataError: The stored arrays break a rule of the data model.
        """
        values = {name: column[row].as_py() for name, column in self._scalars.items()}
        for name, shape, dtype, offsets, stored in self._arrays:
            first, last = int(offsets[row]), int(offsets[row + 1])
            if dtype == np.bool_:
                flat = stored.slice(first, last - first).to_numpy(zero_copy_only=False)
            elif first == last:
                flat = np.zeros(0, dtype)
            else:
                flat = np.frombuffer(stored, dtype, last - first, first * dtype.itemsize)
            values[name] = flat.reshape(shape)
        values[_CAMERAS] = {} if self._cameras is None else _as_mapping(self._cameras[row].as_py())
        return Scene(
            token=values["token"],
            kind=values["kind"],
            cluster=values["cluster"],
            challenging=values["challenging"],
            observation=Observation(**_strip(values, "obs_")),
            reference=SceneReference(**_strip(values, "ref_")),
        )


def _as_mapping(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(
            f"Column {_CAMERAS} holds {text!r:.100}, which is no JSON: {error}. Make the scenes again."
        ) from error


def _strip(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Entries whose name starts with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
