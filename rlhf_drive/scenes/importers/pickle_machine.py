"""The machine that reads pickles: the opcodes of protocols 2 to 5 that build values, and no others.

There is no import, no attribute look-up and no call in it except of the builders on the list of admitted names.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from rlhf_drive.scenes.importers.pickled_values import Admitted, PickledArray, PickledDtype, Record

__all__ = ["PickleMachine", "PickleRefusedError"]

_MAX_OPCODES = 20_000_000
_MAX_INTEGER_BYTES = 64
_MAX_LINE = 1000
_STOP, _MEMOIZE = ord("."), 0x94
_PROTOCOLS = (2, 3, 4, 5)
_KEYS = (str, int, float, bytes, type(None), Record)
"""What may be a key: hashing anything nested could take for ever or overflow the stack."""
_STATEFUL = (Record, PickledArray, PickledDtype)


class PickleRefusedError(Exception):
    """A pickle asks for something that is not admitted."""


class PickleMachine:
    """A stack machine for the opcodes of pickle protocols 2 to 5 that build values."""

    def __init__(self, data: bytes, admitted: Mapping[tuple[str, str], Admitted]) -> None:
        self.data = data
        self.admitted = admitted
        self.pos = 0
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: list[Any] = []
        self._named: dict[tuple[str, str], Admitted] = {}

    def run(self) -> Any:
        """The value on top of the stack at STOP."""
        data, table, memo = self.data, _HANDLERS, self.memo
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
            raise PickleRefusedError(
                f"it asks for {module[:100]}.{name[:100]}, which is not among the names admitted here"
            )
        return found

    def call(self, callee: object, args: object) -> Any:
        if not isinstance(callee, Admitted) or callee.build is None or type(args) is not tuple:
            what = callee.name if isinstance(callee, Admitted) else type(callee).__name__
            raise PickleRefusedError(f"it calls {what}, which is nothing to call")
        try:
            return callee.build(args)
        except (ValueError, TypeError) as error:
            raise PickleRefusedError(str(error)) from error

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
        target.update(zip(keys, values, strict=True))

    def set_state(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if not isinstance(target, _STATEFUL):
            raise PickleRefusedError(f"it sets the state of a {type(target).__name__}")
        try:
            target.set_state(state)
        except (ValueError, TypeError) as error:
            raise PickleRefusedError(str(error)) from error


_U1, _U2, _U4, _I4, _U8, _F8 = (struct.Struct(code) for code in ("<B", "<H", "<I", "<i", "<Q", ">d"))
_Handler = Callable[[PickleMachine], None]


def _protocol(m: PickleMachine) -> None:
    if (protocol := m.number(_U1)) not in _PROTOCOLS:
        raise PickleRefusedError(f"it is of pickle protocol {protocol}; 2 to 5 are read")


def _frame(m: PickleMachine) -> None:
    if m.number(_U8) > len(m.data) - m.pos:
        raise IndexError


def _pushed(read: Callable[[PickleMachine], Any]) -> _Handler:
    def handle(m: PickleMachine) -> None:
        value = read(m)  # first, since reading may end the stack's present frame
        m.stack.append(value)

    return handle


def _sized(form: struct.Struct, make: Callable[[bytes], Any]) -> _Handler:
    """Bytes after their length."""
    return lambda m: m.stack.append(make(m.take(m.number(form))))


def _integer(content: bytes) -> int:
    if len(content) > _MAX_INTEGER_BYTES:
        raise PickleRefusedError(f"it holds an integer of {len(content)} bytes")
    return int.from_bytes(content, "little", signed=True)


def _text(content: bytes) -> str:
    return content.decode("utf-8", "surrogatepass")


def _tuple1(m: PickleMachine) -> None:
    stack = m.stack
    stack.append((stack.pop(),))


def _tuple2(m: PickleMachine) -> None:
    stack = m.stack
    last = stack.pop()
    stack.append((stack.pop(), last))


def _tuple3(m: PickleMachine) -> None:
    stack = m.stack
    last, middle = stack.pop(), stack.pop()
    stack.append((stack.pop(), middle, last))


def _recall(m: PickleMachine) -> None:
    m.stack.append(m.memo[m.data[m.pos]])
    m.pos += 1


def _recall_far(m: PickleMachine) -> None:
    (index,) = _U4.unpack_from(m.data, m.pos)
    m.stack.append(m.memo[index])
    m.pos += 4


def _short_bytes(m: PickleMachine) -> None:
    start = m.pos + 1
    end = start + m.data[m.pos]
    if end > len(m.data):
        raise IndexError
    m.stack.append(m.data[start:end])
    m.pos = end


def _mark(m: PickleMachine) -> None:
    m.marks.append(m.stack)
    m.stack = []


def _append(m: PickleMachine) -> None:
    value = m.stack.pop()
    _extend(m, [value])


def _extend(m: PickleMachine, values: list[Any]) -> None:
    target = m.stack[-1]
    if type(target) is not list:
        raise PickleRefusedError(f"it appends to a {type(target).__name__}")
    target.extend(values)


def _set_item(m: PickleMachine) -> None:
    value, key = m.stack.pop(), m.stack.pop()
    m.put_items(m.stack[-1], [key], [value])


def _set_items(m: PickleMachine) -> None:
    items = m.items()
    m.put_items(m.stack[-1], items[::2], items[1::2])


def _call(m: PickleMachine) -> None:
    args, callee = m.stack.pop(), m.stack.pop()
    m.stack.append(m.call(callee, args))


def _name_from_stack(m: PickleMachine) -> None:
    name, module = m.stack.pop(), m.stack.pop()
    m.stack.append(m.name(module, name))


def _name_spelled_out(m: PickleMachine) -> None:
    module = m.line()
    m.stack.append(m.name(module, m.line()))


def _refuse_instance(m: PickleMachine) -> None:
    module = m.line()
    m.name(module, m.line())
    raise PickleRefusedError("it uses the pickle opcode INST, which no NAVSIM file needs")


_OPCODES: dict[str, _Handler] = {
    "PROTO": _protocol,
    "FRAME": _frame,
    "BINPUT": lambda m: m.keep(m.number(_U1)),
    "LONG_BINPUT": lambda m: m.keep(m.number(_U4)),
    "BINGET": _recall,
    "LONG_BINGET": _recall_far,
    "MARK": _mark,
    "POP": lambda m: [m.stack.pop()].clear(),
    "POP_MARK": lambda m: m.items().clear(),
    "NONE": lambda m: m.stack.append(None),
    "NEWTRUE": lambda m: m.stack.append(True),
    "NEWFALSE": lambda m: m.stack.append(False),
    "BININT": _pushed(lambda m: m.number(_I4)),
    "BININT1": _pushed(lambda m: m.number(_U1)),
    "BININT2": _pushed(lambda m: m.number(_U2)),
    "LONG1": _sized(_U1, _integer),
    "LONG4": _sized(_U4, _integer),
    "BINFLOAT": _pushed(lambda m: m.number(_F8)),
    "SHORT_BINUNICODE": _sized(_U1, _text),
    "BINUNICODE": _sized(_U4, _text),
    "BINUNICODE8": _sized(_U8, _text),
    "SHORT_BINBYTES": _short_bytes,
    "BINBYTES": _sized(_U4, bytes),
    "BINBYTES8": _sized(_U8, bytes),
    "BYTEARRAY8": _sized(_U8, bytes),
    "EMPTY_TUPLE": lambda m: m.stack.append(()),
    "TUPLE1": _tuple1,
    "TUPLE2": _tuple2,
    "TUPLE3": _tuple3,
    "TUPLE": _pushed(lambda m: tuple(m.items())),
    "EMPTY_LIST": lambda m: m.stack.append([]),
    "APPEND": _append,
    "APPENDS": lambda m: _extend(m, m.items()),
    "EMPTY_DICT": lambda m: m.stack.append({}),
    "SETITEM": _set_item,
    "SETITEMS": _set_items,
    "GLOBAL": _name_spelled_out,
    "STACK_GLOBAL": _name_from_stack,
    "INST": _refuse_instance,
    "REDUCE": _call,
    "NEWOBJ": _call,
    "BUILD": PickleMachine.set_state,
}
_CODES = {op.name: ord(op.code) for op in pickletools.opcodes}
_HANDLERS: list[_Handler | None] = [None] * 256
for _name, _handler in _OPCODES.items():
    _HANDLERS[_CODES[_name]] = _handler
