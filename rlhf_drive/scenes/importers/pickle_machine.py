"""The machine that reads pickles: the opcodes of protocols 2 to 5 that build values, and no others.

There is no import, no attribute look-up and no call in it except of the builders on the list of admitted names.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Mapping
from typing import Any, NoReturn

from rlhf_drive.scenes.importers.pickle_opcodes import HANDLERS
from rlhf_drive.scenes.importers.pickled_values import (
    Admitted,
    PickledArray,
    PickledDtype,
    PickleRefusedError,
    Record,
    printable,
)

__all__ = ["PickleMachine"]

_MAX_OPCODES = 20_000_000
_MAX_LINE = 1000
_COPIED_PER_BYTE = 8
_COPIED_ANYWAY = 2**26
_ATTRIBUTE_BYTES = 64
"""What builders may copy (bytes): a multiple of the pickle itself, and some more. A value that is named again and again
is copied each time it becomes text, a path or attributes, so a kilobyte could grow to any size."""
_MAX_KEY = 2**60
"""Whole numbers beyond have hashes that can be chosen, and a mapping of equal hashes takes for ever to fill."""
_STOP, _MEMOIZE = ord("."), 0x94
_KEYS = (str, int, float, bytes, type(None), Record)
"""What may be a key: hashing anything nested could take for ever or overflow the stack."""
_STATEFUL = (Record, PickledArray, PickledDtype)


class PickleMachine:
    """A stack machine for the opcodes of pickle protocols 2 to 5 that build values."""

    def __init__(self, data: bytes, admitted: Mapping[tuple[str, str], Admitted]) -> None:
        self.data = data
        self.admitted = admitted
        self.pos = 0
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: list[Any] = []
        self._left_to_copy = _COPIED_PER_BYTE * len(data) + _COPIED_ANYWAY

    def run(self) -> Any:
        """The value on top of the stack at STOP."""
        data, table, memo = self.data, HANDLERS, self.memo
        for _ in range(_MAX_OPCODES):
            opcode = data[self.pos]
            self.pos += 1
            if opcode == _MEMOIZE:  # a third of all
                memo.append(self.stack[-1])
                continue
            handler = table[opcode]
            if handler is None:
                if opcode == _STOP:
                    return self.stack.pop()
                self.unknown(opcode)
            handler(self)
        raise PickleRefusedError(f"it has more than {_MAX_OPCODES} steps")

    def unknown(self, opcode: int) -> NoReturn:
        name = next((op.name for op in pickletools.opcodes if op.code == chr(opcode)), None)
        if name is None:
            raise IndexError
        raise PickleRefusedError(f"it uses the pickle opcode {name}, which no NAVSIM file needs")

    def take(self, size: int) -> bytes:
        """The next `size` bytes."""
        end = self.pos + size
        if end > len(self.data):
            raise IndexError
        part = self.data[self.pos : end]
        self.pos = end
        return part

    def number(self, form: struct.Struct) -> Any:
        (value,) = form.unpack_from(self.data, self.pos)
        self.pos += form.size
        return value

    def line(self) -> str:
        """Text up to the next newline."""
        end = self.data.find(b"\n", self.pos, self.pos + _MAX_LINE)
        if end < 0:
            raise IndexError
        text = self.data[self.pos : end].decode()
        self.pos = end + 1
        return text

    def name(self, module: object, name: object) -> Admitted:
        """The admitted name, or refusal."""
        if type(module) is not str or type(name) is not str:
            raise PickleRefusedError("it names something by what is no text")
        found = self.admitted.get((module, name))
        if found is None:
            asked = f"{printable(module)}.{printable(name)}"
            raise PickleRefusedError(f"it asks for {asked}, which is not among the names admitted here")
        return found

    def call(self, callee: object, args: object) -> Any:
        if not isinstance(callee, Admitted) or callee.build is None or type(args) is not tuple:
            what = callee.name if isinstance(callee, Admitted) else type(callee).__name__
            raise PickleRefusedError(f"it calls {what}, which is nothing to call")
        self.copy(len(args) + sum(len(part) for part in args if isinstance(part, str | bytes | bytearray)))
        try:
            return callee.build(args)
        except (ValueError, TypeError) as error:
            raise PickleRefusedError(str(error)) from error

    def copy(self, size: int) -> None:
        """Take note that about `size` bytes are copied; refusal once they are too many."""
        self._left_to_copy -= size
        if self._left_to_copy < 0:
            raise PickleRefusedError(f"it repeats its {len(self.data)} bytes again and again")

    def items(self) -> list[Any]:
        """Everything above the last mark."""
        above = self.stack
        self.stack = self.marks.pop()
        return above

    def keep(self, index: int) -> None:
        """Put the top of the stack into the memo; indices follow each other, so nobody can ask for a huge memo."""
        if index > len(self.memo):
            raise PickleRefusedError(f"it fills its memo at {index} after {len(self.memo)} entries")
        if index == len(self.memo):
            self.memo.append(self.stack[-1])
        else:
            self.memo[index] = self.stack[-1]

    def put_items(self, target: object, keys: list[Any], values: list[Any]) -> None:
        if type(target) is not dict or len(keys) != len(values):
            raise PickleRefusedError(f"it sets items of a {type(target).__name__}")
        for key in keys:
            if type(key) is not str and not isinstance(key, _KEYS):
                raise PickleRefusedError(f"it uses a {type(key).__name__} as a key")
            if type(key) is int and abs(key) >= _MAX_KEY:
                raise PickleRefusedError("it uses an integer of more than 60 bits as a key")
        target.update(zip(keys, values, strict=True))

    def set_state(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if not isinstance(target, _STATEFUL):
            raise PickleRefusedError(f"it sets the state of a {type(target).__name__}")
        parts = state if isinstance(state, tuple) else (state,)
        self.copy(_ATTRIBUTE_BYTES * sum(len(part) for part in parts[:2] if isinstance(part, dict)))
        try:
            target.set_state(state)
        except (ValueError, TypeError) as error:
            raise PickleRefusedError(str(error)) from error
