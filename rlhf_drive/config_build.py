"""Strict conversion of plain YAML data into the recipe's dataclasses; all problems are collected."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from rlhf_drive.config_schema import Bounds

__all__ = ["build"]

_INVALID: Any = object()
"""Stands for a value that had a problem, until the problems are raised together."""


def build(kind: Any, value: object, path: str, problems: list[str]) -> Any:
    """`value` as an instance of the annotation `kind`.

    Args:
        kind: A dataclass, or any annotation used in `config_schema`.
        value: What YAML gave.
        path: Full key path of the value; empty for the recipe itself.
        problems: One line is added for each problem found, ``path: what is wrong``.

    Returns:
        The instance; where problems were added, a recipe without the values that had them, else meaningless.
    """
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, path, problems)
    origin = get_origin(kind)
    if origin is Annotated:
        return _build_bounded(kind, value, path, problems)
    if origin is Literal:
        return _build_choice(get_args(kind), value, path, problems)
    if origin in (Union, types.UnionType):
        inner = next(member for member in get_args(kind) if member is not type(None))
        return None if value is None else build(inner, value, path, problems)
    if origin is tuple:
        return _build_list(get_args(kind)[0], value, path, problems)
    if origin is Mapping:
        return _build_mapping(get_args(kind)[1], value, path, problems)
    return value if kind is object else _build_scalar(kind, value, path, problems)


def _build_dataclass(kind: Any, value: object, path: str, problems: list[str]) -> Any:
    """A section: unknown and missing keys are problems, then every value."""
    if not isinstance(value, Mapping):
        problems.append(f"{path or 'recipe'}: must be a mapping of keys; got {_shown(value)}")
        return _INVALID
    hints = get_type_hints(kind, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key in value:
        if key not in fields:
            problems.append(f"{_join(path, key)}: unknown key. {_suggest(str(key), path, fields)}")
    built: dict[str, Any] = {}
    for name, field in fields.items():
        if name in value and value[name] == "???":
            problems.append(f"{_join(path, name)}: has no value")
            built[name] = _INVALID
        elif name in value:
            built[name] = build(hints[name], value[name], _join(path, name), problems)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            problems.append(f"{_join(path, name)}: missing. A recipe is complete; add the key")
            built[name] = _INVALID
    if not path:  # the recipe itself: what is right is kept, so that rules between its keys are checked in the same go
        return kind(**{name: None if item is _INVALID else item for name, item in built.items()})
    return _INVALID if any(item is _INVALID for item in built.values()) else kind(**built)


def _build_bounded(kind: Any, value: object, path: str, problems: list[str]) -> Any:
    """A number with a range."""
    inner, bounds = get_args(kind)
    number = build(inner, value, path, problems)
    if number is not _INVALID and isinstance(bounds, Bounds) and (problem := bounds.problem(number)):
        problems.append(f"{path}: {problem}")
        return _INVALID
    return number


def _build_choice(choices: Sequence[str], value: object, path: str, problems: list[str]) -> Any:
    """One of a few words."""
    if value in choices and not isinstance(value, bool):
        return value
    close = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    problems.append(f"{path}: must be one of {', '.join(choices)}; got {_shown(value)}.{hint}")
    return _INVALID


def _build_list(kind: Any, value: object, path: str, problems: list[str]) -> Any:
    """A list, as a tuple."""
    if isinstance(value, str | Mapping) or not isinstance(value, Sequence):
        problems.append(f"{path}: must be a list, such as [a, b]; got {_shown(value)}")
        return _INVALID
    items = tuple(build(kind, item, f"{path}[{i}]", problems) for i, item in enumerate(value))
    return _INVALID if any(item is _INVALID for item in items) else items


def _build_mapping(kind: Any, value: object, path: str, problems: list[str]) -> Any:
    """A mapping whose keys the user chooses."""
    if not isinstance(value, Mapping):
        problems.append(f"{path}: must be a mapping, such as {{name: value}}; got {_shown(value)}")
        return _INVALID
    items = {str(key): build(kind, item, _join(path, key), problems) for key, item in value.items()}
    return _INVALID if any(item is _INVALID for item in items.values()) else items


def _build_scalar(kind: Any, value: object, path: str, problems: list[str]) -> Any:
    """A word, truth value or number; true is no number, and 3 is also 3.0."""
    words = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if not fits:
        problems.append(f"{path}: must be {words[kind]}; got {_shown(value)}")
        return _INVALID
    if isinstance(value, float) and not math.isfinite(value):
        problems.append(f"{path}: must be a finite number; got {value!r}")
        return _INVALID
    if isinstance(value, str) and "${" in value:
        problems.append(f"{path}: a recipe is read as it stands, without ${{…}}; got {value!r}. Write the value itself")
        return _INVALID
    return value


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _shown(value: object) -> str:
    """A value with its YAML type, for messages."""
    kinds = {str: "text", bool: "true/false", int: "whole number", float: "number", dict: "mapping", list: "list"}
    if value is None:
        return "null"
    return f"{value!r} ({kinds.get(type(value), type(value).__name__)})"


def _suggest(key: str, path: str, fields: Mapping[str, object]) -> str:
    """Offer the closest key, else list those that exist."""
    close = difflib.get_close_matches(key, fields, n=1, cutoff=0.6)
    if close:
        return f"Did you mean {_join(path, close[0])!r}?"
    return f"Keys here: {', '.join(fields)}"
