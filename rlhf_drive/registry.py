"""Names that stand for things: a typed registry, and functions loaded from a user's module or file."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

from rlhf_drive.errors import ConfigError, PluginError, UnknownNameError, did_you_mean

__all__ = ["Registry", "is_plugin", "load_function"]

T = TypeVar("T")


class Registry(Generic[T]):
    """Entries of one kind by name; a name is given once.

    Example:
        >>> planners: Registry[str] = Registry("planner")
        >>> planners.add("idm", "Intelligent Driver Model")
        'Intelligent Driver Model'
        >>> planners.get("idm")
        'Intelligent Driver Model'
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        """What the entries are, as messages call them (`reward`, `baseline`)."""
        self._entries: dict[str, T] = {}

    def add(self, name: str, entry: T, *, replace: bool = False) -> T:
        """Register `entry` under `name` and return it; the same entry may be added again.

        Args:
            name: What users write.
            entry: What it stands for.
            replace: Whether `entry` takes the place of one already registered (a function that was defined anew).

        Raises:
            ConfigError: The name is empty or already stands for something else.
        """
        if not name:
            raise ConfigError(f"A {self.kind} needs a name; got an empty string. Give it one.")
        known = self._entries.get(name)
        if known is not None and known is not entry and not replace:
            raise ConfigError(f"The {self.kind} name {name!r} is taken by {_describe(known)}. Choose another name.")
        self._entries[name] = entry
        return entry

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator form of :meth:`add`."""
        return lambda entry: self.add(name, entry)

    def get(self, name: str, *, where: str = "") -> T:
        """The entry called `name`.

        Args:
            name: What the user wrote.
            where: Key path the name was read from, for the message (`reward.terms[2].name`).

        Raises:
            UnknownNameError: No such entry; the message offers the closest name.
        """
        if name in self._entries:
            return self._entries[name]
        place = f" in {where}" if where else ""
        raise UnknownNameError(f"Unknown {self.kind} {name!r}{place}. {did_you_mean(name, self._entries)}")

    def names(self) -> tuple[str, ...]:
        """All names, sorted."""
        return tuple(sorted(self._entries))

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self._entries)


def is_plugin(name: str) -> bool:
    """Whether `name` points at a user's function (`package.module:function` or `path/file.py:function`)."""
    return ":" in name


def load_function(target: str, *, where: str = "") -> Callable[..., Any]:
    """The function that `target` names.

    A file is loaded under a private module name made from its path and content: it can shadow nothing, an edited file
    is loaded anew, and `sys.path` stays as it is. A relative path starts at the working directory.

    Args:
        target: `package.module:function` or `path/to/file.py:function`.
        where: Key path the target was read from, for the message.

    Raises:
        PluginError: The module or file cannot be found or fails while it loads, or it has no such function.

    Example:
        >>> load_function("math:hypot")(3.0, 4.0)
        5.0
    """
    place = f" (from {where})" if where else ""
    source, colon, attribute = target.rpartition(":")
    if not colon or not source or not attribute:
        raise PluginError(
            f"{target!r}{place} names no function. Write 'package.module:function' or 'path/to/file.py:function'."
        )
    module = _load_file(Path(source), target, place) if source.endswith(".py") else _load_module(source, target, place)
    if not hasattr(module, attribute):
        public = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise PluginError(f"{source} has no function {attribute!r}{place}. {did_you_mean(attribute, public)}")
    function = getattr(module, attribute)
    if not callable(function):
        raise PluginError(f"{target!r}{place} is a {type(function).__name__}, not a function. Name a function.")
    return function  # type: ignore[no-any-return]


def _load_file(path: Path, target: str, place: str) -> ModuleType:
    """Module of the file at `path`, under a private name."""
    full = path.expanduser().resolve()
    if not full.is_file():
        raise PluginError(
            f"{target!r}{place}: there is no file {full}. Check the path; relative ones start at {Path.cwd()}."
        )
    digest = hashlib.sha256(str(full).encode() + b"\0" + full.read_bytes()).hexdigest()[:16]
    name = f"_rlhf_drive_plugin_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, full)
    if spec is None or spec.loader is None:
        raise PluginError(f"{target!r}{place}: {full} cannot be loaded as Python. Check the file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up while it loads
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise PluginError(f"{target!r}{place}: {full} failed while loading: {_short(error)}. Mend the file.") from error
    return module


def _load_module(name: str, target: str, place: str) -> ModuleType:
    """Module `name` by the ordinary import system."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise PluginError(
                f"{target!r}{place}: there is no module {name!r} in this environment. Install it, or name a file: "
                f"'path/to/file.py:function'."
            ) from error
        raise PluginError(f"{target!r}{place}: module {name!r} failed while loading: {_short(error)}.") from error
    except Exception as error:
        raise PluginError(f"{target!r}{place}: module {name!r} failed while loading: {_short(error)}.") from error


def _short(error: Exception) -> str:
    """Error type and message in one line."""
    return f"{type(error).__name__}: {error}".replace("\n", " ").rstrip(".")


def _describe(entry: object) -> str:
    """Where an entry comes from, in words."""
    module = getattr(entry, "__module__", None)
    name = getattr(entry, "__qualname__", None)
    return f"{module}.{name}" if module and name else repr(entry)
