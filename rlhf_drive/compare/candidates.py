"""Plans to score, by scene: from a Parquet or NPZ file, or from a folder of scene files that hold their own."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf_drive.errors import ConfigError, DataError
from rlhf_drive.scenes import NUM_POSES
from rlhf_drive.scenes.importers.vectors import VectorScene, read_vectors

__all__ = ["Candidates", "candidates_of", "read_candidates"]


@dataclass(frozen=True)
class Candidates:
    """B plans for one scene."""

    number: NDArray[np.int64]
    """``[B]`` number of each plan within its scene."""
    poses: NDArray[np.float64]
    """``[B, 8, 3]`` rear-axle poses in the t=0 ego frame at 0.5 … 4.0 s."""
    previous: NDArray[np.float64] | None
    """``[B, 8, 3]`` plans of the frame 0.5 s earlier in its ego frame, NaN throughout in a row that has none; None
    where no row has one."""

    def __len__(self) -> int:
        return len(self.number)


def candidates_of(scene: VectorScene) -> Candidates:
    """The plans that a scene file holds itself.

    Raises:
        DataError: It holds plans of the frame before, but not one for each plan.
    """
    count, earlier = len(scene.candidates), len(scene.prev_candidates)
    if earlier not in (0, count):
        raise DataError(f"Scene {scene.name!r} holds {count} plans but {earlier} of the frame before; give one each.")
    return Candidates(np.arange(count), scene.candidates, scene.prev_candidates if earlier else None)


def read_candidates(path: str | Path) -> dict[str, Candidates]:
    """Plans by scene token, in the order of the file.

    Args:
        path: A `.parquet` file with columns `scene` (text), `poses` (24 numbers: x, y, heading of each pose in turn)
            and, if wanted, `candidate` (whole number) and `previous` (as `poses`, or null); a `.npz` file with arrays
            of these names, ``scene [N]``, ``poses [N, 8, 3]``, …; or a folder of ``<id>.scene.json`` and
            ``<id>.scene.npz``. Without numbers the plans of a scene are counted from 0.

    Raises:
        ConfigError: There is no such file, or it is of another kind.
        DataError: It cannot be read, lacks a column, or a column has the wrong shape; the message names it.
    """
    path = Path(path)
    if path.is_dir():
        return {scene.name: candidates_of(scene) for scene in read_vectors(path)}
    readers: Mapping[str, Callable[[Path], dict[str, Any]]] = {".parquet": _parquet, ".npz": _npz}
    if not path.is_file() or path.suffix not in readers:
        what = f"is no {' or '.join(readers)} file" if path.exists() else "does not exist"
        raise ConfigError(
            f"The candidates {str(path)!r}: this {what}. Give a file of plans, or a folder of scene files."
        )
    columns = readers[path.suffix](path)
    if missing := {"scene", "poses"} - set(columns):
        raise DataError(f"{path} lacks {', '.join(sorted(missing))}; it holds {', '.join(columns) or 'nothing'}.")
    return _by_scene(path, columns)


def _parquet(path: Path) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    return {name: table.column(name).to_pylist() for name in table.column_names}


def _npz(path: Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _by_scene(path: Path, columns: Mapping[str, Any]) -> dict[str, Candidates]:
    names = np.asarray(columns["scene"]).tolist()
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{path}: scene must be text in every row: the token of the plan's scene.")
    poses = _poses(path, "poses", columns["poses"], len(names))
    previous = None
    if "previous" in columns:
        values = columns["previous"]
        like = next((plan for plan in values if plan is not None), np.zeros((NUM_POSES, 3)))
        given = [np.full(np.shape(like), np.nan) if plan is None else plan for plan in values]
        previous = _poses(path, "previous", given, len(names))
    if "candidate" in columns and np.shape(columns["candidate"]) != (len(names),):
        shape = list(np.shape(columns["candidate"]))
        raise DataError(f"{path}: candidate must have one number for each of {len(names)} plans; got shape {shape}.")
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(name, []).append(row)
    found = {}
    for name, mine in rows.items():
        number = np.asarray([columns["candidate"][row] for row in mine] if "candidate" in columns else range(len(mine)))
        if number.dtype.kind not in "iu" or len(set(number.tolist())) != len(mine):
            raise DataError(f"{path}: candidate must number the plans of scene {name!r}, each once.")
        found[name] = Candidates(number.astype(np.int64), poses[mine], None if previous is None else previous[mine])
    return found


def _poses(path: Path, name: str, values: Any, rows: int) -> NDArray[np.float64]:
    """Column `name` as ``[N, 8, 3]``; NaN is let through, the scorer makes such rows invalid."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: {name} must hold {NUM_POSES * 3} numbers in every row ({error}).") from error
    if rows and array.shape not in ((rows, NUM_POSES * 3), (rows, NUM_POSES, 3)):
        raise DataError(
            f"{path}: {name} must be [N, {NUM_POSES}, 3] with N = {rows} rows; got {list(array.shape)}. Plans have "
            f"{NUM_POSES} poses x, y, heading, 0.5 s apart."
        )
    return array.reshape(rows, NUM_POSES, 3)
