"""What a pickle may become here: records with a name, arrays of plain numbers, text. Nothing of it can be called."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "NUMPY_NAMES",
    "PATH_NAMES",
    "Admitted",
    "Builder",
    "PickleRefusedError",
    "PickledArray",
    "PickledDtype",
    "Record",
    "printable",
    "record_class",
]

Builder = Callable[[tuple[Any, ...]], Any]
"""Makes a value of the arguments that a pickle gives; raises ValueError if they are not what NumPy would write."""

_PLAIN_DTYPE = re.compile(r"[<>|=]?(b1|i[1248]|u[1248]|f[248]|[US]\d{1,5})")
_OBJECT_DTYPE = re.compile(r"\|?O8?")
_MAX_DIMENSIONS = 8


class PickleRefusedError(Exception):
    """A pickle asks for something that is not admitted."""


def printable(text: str) -> str:
    """The beginning of `text` as a message may show it: no control characters, nothing that a terminal cannot print."""
    return ascii(text[:100])[1:-1]


class Record:
    """An instance of a class that is not loaded: its name, constructor arguments and attributes."""

    __slots__ = ("args", "name", "state")

    def __init__(self, name: str, args: tuple[Any, ...]) -> None:
        self.name = name
        """``module.Class`` as the pickle gives it."""
        self.args = args
        """What its constructor would have got."""
        self.state: dict[str, Any] = {}
        """Attributes by name, slots included."""

    @property
    def kind(self) -> str:
        """The class name without its module."""
        return self.name.rpartition(".")[2]

    def set_state(self, state: object) -> None:
        """Take the attributes of a pickle: a dict, or a pair of dict or None and dict of slots.

        Raises:
            ValueError: The state has another form.
        """
        parts = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
        for part in parts:
            if part is None:
                continue
            if not isinstance(part, dict) or not set(map(type, part)) <= {str}:
                raise ValueError(f"the attributes of a {self.name} are no mapping of names")
            self.state.update(part)


class PickledDtype:
    """A NumPy dtype as data: plain numbers and text, or objects, of which only lists are ever made."""

    __slots__ = ("code",)

    def __init__(self, code: str) -> None:
        self.code = code
        """Such as ``<f8``; ``O`` for objects."""

    @property
    def of_objects(self) -> bool:
        """Whether elements are objects."""
        return self.code == "O"

    def plain(self) -> np.dtype[Any]:
        """The real dtype.

        Raises:
            ValueError: Elements are objects.
        """
        if self.of_objects:
            raise ValueError("an array of numbers is declared to hold objects")
        return np.dtype(self.code)

    def set_state(self, state: object) -> None:
        """Take the byte order; fields and subarrays are refused."""
        if not isinstance(state, tuple) or len(state) < 5 or state[1] not in ("<", ">", "|", "="):
            raise ValueError("the state of a numpy.dtype has another form than NumPy writes")
        if any(part is not None for part in state[2:5]):
            raise ValueError("a numpy.dtype has fields or subarrays, which no NAVSIM file needs")
        if not self.of_objects:
            self.code = state[1] + self.code.lstrip("<>|=")


class PickledArray:
    """A NumPy array in the making; arrays of objects become lists."""

    __slots__ = ("array",)

    def __init__(self, array: NDArray[Any] | list[Any]) -> None:
        self.array = array
        """The numbers, or a list where the pickle has an array of objects with one dimension."""

    def set_state(self, state: object) -> None:
        """Take shape, dtype and content as `ndarray.__reduce__` writes them."""
        if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[2], PickledDtype):
            raise ValueError("the state of a numpy.ndarray has another form than NumPy writes")
        _, shape, dtype, fortran, content = state
        if dtype.of_objects:
            if not isinstance(content, list) or shape != (len(content),):
                raise ValueError("an array of objects is no plain row of them")
            self.array = content
        else:
            self.array = _numbers(content, dtype, shape, "F" if fortran is True else "C")


@dataclass(frozen=True)
class Admitted:
    """One name a pickle may use."""

    name: str
    """``module.name``."""
    build: Builder | None
    """What a call of it makes; None if it may only be mentioned."""


def record_class(module: str, name: str) -> Admitted:
    """A class whose instances become :class:`Record`."""
    full = f"{module}.{name}"
    return Admitted(full, lambda args: Record(full, args))


def _numbers(content: object, dtype: PickledDtype, shape: object, order: object) -> NDArray[Any]:
    """An array over `content`, which must hold exactly what `shape` needs."""
    if not isinstance(content, bytes | bytearray):
        raise ValueError("the content of an array is no bytes")
    if (
        not isinstance(shape, tuple)
        or len(shape) > _MAX_DIMENSIONS
        or not all(type(n) is int and 0 <= n < 2**31 for n in shape)
    ):
        raise ValueError("the shape of an array is no tuple of sizes")
    plain, count = dtype.plain(), 1
    for size in shape:
        count *= size
    if count * plain.itemsize != len(content):
        raise ValueError(f"an array of shape {list(shape)} and type {plain} comes with {len(content)} bytes")
    flat = np.frombuffer(content, plain) if count else np.zeros(0, plain)
    return flat.reshape(shape, order="F" if order == "F" else "C")


def _dtype(args: tuple[Any, ...]) -> PickledDtype:
    text = args[0] if args else None
    if isinstance(text, str) and _OBJECT_DTYPE.fullmatch(text):
        return PickledDtype("O")
    if not isinstance(text, str) or not _PLAIN_DTYPE.fullmatch(text):
        raise ValueError("a numpy.dtype is none of plain numbers or text")
    return PickledDtype(text)


def _scalar(args: tuple[Any, ...]) -> float | int | bool | str:
    """A NumPy scalar as the Python number it equals."""
    if len(args) != 2 or not isinstance(args[0], PickledDtype) or not isinstance(args[1], bytes):
        raise ValueError("a NumPy scalar has other parts than a type and bytes")
    dtype, content = args
    if dtype.code == "<f8" and len(content) == 8:
        value: float = struct.unpack("<d", content)[0]
        return value
    item: float | int | bool | str = _numbers(content, dtype, (1,), "C")[0].item()
    return item


def _from_buffer(args: tuple[Any, ...]) -> PickledArray:
    if len(args) != 4 or not isinstance(args[1], PickledDtype):
        raise ValueError("an array has other parts than bytes, type, shape and order")
    return PickledArray(_numbers(*args))


def _reconstruct(args: tuple[Any, ...]) -> PickledArray:
    if len(args) != 3 or not isinstance(args[0], Admitted) or args[0].name != "numpy.ndarray":
        raise ValueError("numpy's _reconstruct is asked for something else than an array")
    return PickledArray(np.zeros(0))


def _encode(args: tuple[Any, ...]) -> bytes:
    """Bytes as pickles of protocol 2 write them: text in Latin-1."""
    if len(args) != 2 or not isinstance(args[0], str) or args[1] != "latin1":
        raise ValueError("_codecs.encode is used for something else than bytes")
    return args[0].encode("latin1")


def _empty(args: tuple[Any, ...]) -> bytes:
    """No bytes at all, which protocol 2 writes as a call."""
    if args:
        raise ValueError("__builtin__.bytes is called with arguments")
    return b""


def _posix_path(args: tuple[Any, ...]) -> str:
    if not all(isinstance(part, str) for part in args):
        raise ValueError("a path has parts that are no text")
    return str(PurePosixPath(*args))


def _windows_path(args: tuple[Any, ...]) -> str:
    if not all(isinstance(part, str) for part in args):
        raise ValueError("a path has parts that are no text")
    return str(PureWindowsPath(*args))


def _named(builders: Mapping[tuple[str, str], Builder | None]) -> dict[tuple[str, str], Admitted]:
    return {(module, name): Admitted(f"{module}.{name}", build) for (module, name), build in builders.items()}


NUMPY_NAMES: dict[tuple[str, str], Admitted] = _named(
    {
        ("numpy", "ndarray"): None,
        ("numpy", "dtype"): _dtype,
        ("_codecs", "encode"): _encode,
        ("__builtin__", "bytes"): _empty,
    }
    | {
        (f"numpy.{core}.{module}", name): build
        for core in ("core", "_core")
        for module, name, build in (
            ("multiarray", "scalar", _scalar),
            ("multiarray", "_reconstruct", _reconstruct),
            ("numeric", "_frombuffer", _from_buffer),
        )
    }
)
"""What NumPy 1 and 2 write for arrays and scalars of plain numbers."""

PATH_NAMES: dict[tuple[str, str], Admitted] = _named(
    {
        (module, f"{pure}{flavour}Path"): build
        for module in ("pathlib", "pathlib._local")
        for pure in ("", "Pure")
        for flavour, build in (("Posix", _posix_path), ("Windows", _windows_path))
    }
)
"""Paths, which become text."""
