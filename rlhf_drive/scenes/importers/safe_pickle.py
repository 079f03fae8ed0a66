"""Pickles read as data: a machine that knows only the opcodes that build values, and a fixed list of names.

Python's own unpickler is not used, so there is nothing in a file that could be imported, looked up or called. A name
that is not on the list, an opcode that is not needed, a broken stream: the file is refused.
"""

from __future__ import annotations

import lzma
import pickletools
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_drive.errors import DataError
from rlhf_drive.scenes.importers.pickle_machine import PickleMachine
from rlhf_drive.scenes.importers.pickled_values import Admitted, PickleRefusedError, printable

__all__ = ["MAX_BYTES", "read_lzma", "read_plain", "rebuild"]

MAX_BYTES = 256 * 2**20
"""Default limit for the content of one file; a metric cache has a few megabytes."""
_LZMA_MEMORY = 512 * 2**20
_CHUNK = 2**20
_CUT = "cut off or damaged"
_RESTORE = "Restore it from a copy or make it again."
_ORIGIN = "Use only files that NAVSIM itself has written."


def read_lzma(path: Path, *, max_bytes: int = MAX_BYTES) -> bytes:
    """The decompressed content of an lzma file, which may not exceed `max_bytes`.

    Raises:
        DataError: The file is missing, not lzma, cut off, or holds more.
    """
    decompressor = lzma.LZMADecompressor(memlimit=_LZMA_MEMORY)
    parts: list[bytes] = []
    size, begun = 0, False
    try:
        with Path(path).open("rb") as file:
            while not decompressor.eof:
                chunk = file.read(_CHUNK) if decompressor.needs_input else b""
                if decompressor.needs_input and not chunk:
                    raise DataError(f"{path}: truncated: the lzma stream has no end. {_RESTORE}")
                parts.append(decompressor.decompress(chunk, max_bytes + 1 - size))
                size, begun = size + len(parts[-1]), True
                if size > max_bytes:
                    raise DataError(
                        f"{path}: holds more than {max_bytes} bytes when decompressed, far beyond any NAVSIM file. "
                        "Raise max_bytes if it is genuine."
                    )
            rest = decompressor.unused_data or file.read(1)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}.") from error
    except lzma.LZMAError as error:
        what = f"damaged: the lzma stream breaks off ({error})" if begun else f"not an lzma file ({error})"
        raise DataError(f"{path}: {what}. {_RESTORE}") from error
    if rest:
        raise DataError(f"{path}: damaged: more bytes follow the end of its lzma stream. {_RESTORE}")
    return b"".join(parts)


def read_plain(path: Path, *, max_bytes: int = MAX_BYTES) -> bytes:
    """The content of a file, which may not exceed `max_bytes`.

    Raises:
        DataError: The file is missing or larger.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}.") from error
    if len(content) > max_bytes:
        raise DataError(f"{path}: holds more than {max_bytes} bytes. Raise max_bytes if it is genuine.")
    return content


def rebuild(data: bytes, admitted: Mapping[tuple[str, str], Admitted], source: Path | str) -> Any:
    """The value that the pickle `data` describes, with :class:`Record` in place of every instance of a class.

    Args:
        data: The pickle, protocol 2 to 5.
        admitted: What may be named, by module and name.
        source: File it came from, for messages.

    Raises:
        DataError: The pickle names something else, uses an opcode that builds no value, is damaged or too large.
    """
    machine = PickleMachine(data, admitted)
    try:
        return machine.run()
    except PickleRefusedError as refusal:
        named = _foreign_names(data, admitted)
        asks = f" It names {named}." if named and named not in str(refusal) else ""
        raise DataError(f"{source}: refused: {refusal}.{asks} Nothing of it was run. {_ORIGIN}") from None
    except (IndexError, struct.error, UnicodeDecodeError):
        raise DataError(f"{source}: {_CUT} at byte {machine.pos} of {len(data)}. {_RESTORE}") from None


def _foreign_names(data: bytes, admitted: Mapping[tuple[str, str], Admitted]) -> str:
    """Names that the beginning of the pickle spells out in full and that are not admitted, for the message alone."""
    found: list[str] = []
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if opcode.name in ("GLOBAL", "INST") and tuple(str(argument).split(" ", 1)) not in admitted:
                found.append(".".join(map(printable, str(argument).split(" ", 1))))
            if count > 100_000 or len(found) > 4:
                break
    except Exception:  # the stream is known to be bad: whatever was found until it broke is shown
        return ", ".join(found)
    return ", ".join(found)
