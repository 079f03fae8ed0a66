"""The opcodes of pickle protocols 2 to 5 that build values, each a function of the machine that runs them."""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rlhf_drive.scenes.importers.pickled_values import PickleRefusedError

if TYPE_CHECKING:
    from rlhf_drive.scenes.importers.pickle_machine import PickleMachine

__all__ = ["HANDLERS"]

_PROTOCOLS = (2, 3, 4, 5)
_MAX_INTEGER_BYTES = 64
_U1, _U2, _U4, _I4, _U8, _F8 = (struct.Struct(code) for code in ("<B", "<H", "<I", "<i", "<Q", ">d"))
_Handler = Callable[["PickleMachine"], None]


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
    "BUILD": lambda m: m.set_state(),
}
_CODES = {op.name: ord(op.code) for op in pickletools.opcodes}
HANDLERS: list[_Handler | None] = [None] * 256
"""What each opcode does, by its number; None for those that are not read."""
for _name, _handler in _OPCODES.items():
    HANDLERS[_CODES[_name]] = _handler
