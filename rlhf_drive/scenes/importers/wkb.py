"""Polygons in well-known binary, the form in which shapely pickles them."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["joined_ring", "polygon_rings", "quadrilaterals"]

Array = NDArray[np.float64]

_POLYGON, _MULTIPOLYGON = 3, 6
_HAS_Z, _HAS_M, _HAS_SRID = 0x80000000, 0x40000000, 0x20000000
_QUADRILATERAL_BYTES = 13 + 5 * 16
_QUADRILATERAL_HEAD = struct.pack("<BIII", 1, _POLYGON, 1, 5)


class _Cursor:
    """Where reading has got to."""

    def __init__(self, data: bytes) -> None:
        self.data, self.pos, self.order = data, 0, "<"

    def take(self, form: str) -> int:
        (value,) = struct.unpack_from(self.order + form, self.data, self.pos)
        self.pos += struct.calcsize(form)
        return int(value)

    def header(self) -> tuple[int, int]:
        """Geometry type and number of coordinates of a point."""
        flag = self.data[self.pos]
        if flag not in (0, 1):
            raise ValueError(f"byte order {flag}")
        self.order = "<" if flag else ">"
        self.pos += 1
        code = self.take("I")
        extra = bool(code & _HAS_Z) + bool(code & _HAS_M)
        if code & _HAS_SRID:
            self.take("I")
        code &= 0x1FFFFFFF
        return code % 1000, 2 + max(extra, (0, 1, 1, 2)[min(code // 1000, 3)])

    def ring(self, dimensions: int) -> Array:
        """``[n, 2]`` one ring without its closing point."""
        count = self.take("I")
        end = self.pos + 8 * dimensions * count
        if end > len(self.data):
            raise ValueError("cut off")
        points = np.frombuffer(self.data, self.order + "f8", dimensions * count, self.pos).reshape(count, dimensions)
        self.pos = end
        xy = points[:, :2].astype(np.float64)
        return xy[:-1] if count > 1 and np.array_equal(xy[0], xy[-1]) else xy


def polygon_rings(data: bytes) -> list[Array]:
    """Rings ``[n, 2]`` of a polygon or of all parts of a multipolygon, each unclosed; heights are left out.

    Raises:
        ValueError: The bytes are no polygon, or hold a coordinate that is not finite.
    """
    cursor = _Cursor(data)
    try:
        kind, dimensions = cursor.header()
        if kind not in (_POLYGON, _MULTIPOLYGON):
            raise ValueError(f"geometry type {kind} where a polygon belongs")
        rings: list[Array] = []
        for _ in range(cursor.take("I") if kind == _MULTIPOLYGON else 1):
            if kind == _MULTIPOLYGON:
                part, dimensions = cursor.header()
                if part != _POLYGON:
                    raise ValueError(f"geometry type {part} in a multipolygon")
            rings += [cursor.ring(dimensions) for _ in range(cursor.take("I"))]
    except (struct.error, IndexError):
        raise ValueError("well-known binary that is cut off") from None
    if cursor.pos != len(data):
        raise ValueError("well-known binary with bytes after its end")
    if not all(np.isfinite(ring).all() for ring in rings):
        raise ValueError("a polygon with a coordinate that is not finite")
    return rings


def joined_ring(rings: Sequence[Array]) -> Array:
    """``[n, 2]`` one ring with the same inside by the even-odd rule as all `rings` together.

    Rings are joined by bridges that are walked twice, once each way, and so enclose nothing. Without rings, empty.
    """
    parts = [ring for ring in rings if len(ring)]
    if len(parts) < 2:
        return parts[0] if parts else np.zeros((0, 2))
    start = parts[0][:1]
    loops = [parts[0], start]
    for ring in parts[1:]:
        loops += [ring, ring[:1], start]
    return np.concatenate(loops[:-1])


def quadrilaterals(items: Sequence[bytes]) -> Array:
    """``[n, 4, 2]`` corners of n boxes.

    Raises:
        ValueError: One of them is no plain polygon of four corners.
    """
    if not items:
        return np.zeros((0, 4, 2))
    if any(len(item) != _QUADRILATERAL_BYTES or not item.startswith(_QUADRILATERAL_HEAD) for item in items):
        raise ValueError("an agent's outline that is no box")
    raw = np.frombuffer(b"".join(items), np.uint8).reshape(len(items), -1)[:, 13:]
    corners = np.ascontiguousarray(raw).view("<f8").reshape(len(items), 5, 2)
    if not np.isfinite(corners).all():
        raise ValueError("an agent's outline with a coordinate that is not finite")
    return corners[:, :4].astype(np.float64)
