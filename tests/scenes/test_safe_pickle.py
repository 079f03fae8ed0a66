"""Pickles read as data: what is rebuilt, and that nothing hostile ever runs."""

from __future__ import annotations

import lzma
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import numpy as np
import pytest

from rlhf_drive.errors import DataError
from rlhf_drive.scenes.importers.navsim_names import CACHE_NAMES, LOG_NAMES
from rlhf_drive.scenes.importers.pickled_values import PickledArray, Record
from rlhf_drive.scenes.importers.safe_pickle import read_lzma, read_plain, rebuild


def text(value: str) -> bytes:
    """SHORT_BINUNICODE."""
    data = value.encode()
    return b"\x8c" + bytes([len(data)]) + data


def command(canary: Path) -> str:
    return f"touch {canary}"


def by_global(canary: Path) -> bytes:
    return b"\x80\x03cos\nsystem\n" + text(command(canary)) + b"\x85R."


def by_stack_global(canary: Path) -> bytes:
    return b"\x80\x04" + text("os") + text("system") + b"\x93" + text(command(canary)) + b"\x85R."


def by_memo(canary: Path) -> bytes:
    """The two halves of the name are memoized apart, overwritten, fetched in the other order, among admitted names."""
    return (
        b"\x80\x04"
        + text("numpy") + b"q\x00" + text("dtype") + b"q\x01" + b"\x93"
        + text("system") + b"q\x00" + text("os") + b"q\x01" + b"00"
        + b"h\x01h\x00\x93" + text(command(canary)) + b"\x85R."
    )  # fmt: skip


def by_eval(canary: Path) -> bytes:
    return b"\x80\x03cbuiltins\neval\n" + text(f"__import__('os').system({command(canary)!r})") + b"\x85R."


def by_newobj(canary: Path) -> bytes:
    return b"\x80\x04" + text("subprocess") + text("Popen") + b"\x93" + text(f"touch {canary}") + b"\x85\x81."


def by_newobj_ex(canary: Path) -> bytes:
    arguments = text(f"touch {canary}") + b"\x85}" + text("shell") + b"\x88s"
    return b"\x80\x04" + text("subprocess") + text("Popen") + b"\x93" + arguments + b"\x92."


def by_inst(canary: Path) -> bytes:
    return b"(X" + struct.pack("<I", len(command(canary))) + command(canary).encode() + b"ios\nsystem\n."


def by_protocol_0_inst(canary: Path) -> bytes:
    return b"(S'" + command(canary).encode() + b"'\nios\nsystem\n."


def by_obj(canary: Path) -> bytes:
    return b"(cos\nsystem\n" + text(command(canary)) + b"o."


def by_dotted_name(canary: Path) -> bytes:
    return b"\x80\x04" + text("pathlib") + text("os.system") + b"\x93" + text(command(canary)) + b"\x85R."


def by_dotted_class(canary: Path) -> bytes:
    module = "navsim.planning.metric_caching.metric_cache"
    name = "MetricCache.dump.__globals__"
    return b"\x80\x04" + text(module) + text(name) + b"\x93" + text(command(canary)) + b"\x85R."


def by_extension(canary: Path) -> bytes:
    return b"\x80\x02\x82\x01" + text(command(canary)) + b"\x85R."


def by_persistent_id(canary: Path) -> bytes:
    return b"Pos.system\n."


def by_binary_persistent_id(canary: Path) -> bytes:
    return b"\x80\x04" + text(command(canary)) + b"Q."


def by_buffer(canary: Path) -> bytes:
    return b"\x80\x05\x97."


def by_state_of_function(canary: Path) -> bytes:
    """BUILD on an admitted name would reach its attributes in Python's unpickler."""
    return b"\x80\x04" + text("numpy") + text("dtype") + b"\x93}" + text("__call__") + text("x") + b"sb."


def by_getattr(canary: Path) -> bytes:
    return b"\x80\x03cbuiltins\ngetattr\ncos\n__dict__\n" + text("system") + b"\x86R."


def by_copyreg(canary: Path) -> bytes:
    return b"\x80\x03ccopyreg\n_reconstructor\n(cos\n_Environ\ncbuiltins\nobject\nNtR."


HOSTILE: list[tuple[Callable[[Path], bytes], str]] = [
    (by_global, "os.system"),
    (by_stack_global, "os.system"),
    (by_memo, "os.system"),
    (by_eval, "builtins.eval"),
    (by_newobj, "subprocess.Popen"),
    (by_newobj_ex, "subprocess.Popen"),
    (by_inst, "os.system"),
    (by_protocol_0_inst, "os.system"),
    (by_obj, "os.system"),
    (by_dotted_name, "pathlib.os.system"),
    (by_dotted_class, "MetricCache.dump.__globals__"),
    (by_extension, "opcode EXT1"),
    (by_persistent_id, "opcode PERSID"),
    (by_binary_persistent_id, "opcode BINPERSID"),
    (by_buffer, "opcode NEXT_BUFFER"),
    (by_state_of_function, "sets the state of a Admitted"),
    (by_getattr, "builtins.getattr"),
    (by_copyreg, "copyreg._reconstructor"),
]


@pytest.mark.parametrize(("make", "named"), HOSTILE, ids=[make.__name__ for make, _ in HOSTILE])
def test_hostile_pickles_are_refused_and_nothing_runs(
    tmp_path: Path, make: Callable[[Path], bytes], named: str
) -> None:
    data = make(tmp_path / "canary")
    for names in (CACHE_NAMES, LOG_NAMES):
        with pytest.raises(DataError, match=r"cache\.pkl: refused: ") as caught:
            rebuild(data, names, tmp_path / "cache.pkl")
        assert named in str(caught.value)
        assert "Nothing of it was run" in str(caught.value)
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "make", [by_global, by_stack_global, by_memo, by_eval, by_inst], ids=lambda make: make.__name__
)
def test_the_hostile_pickles_are_real(tmp_path: Path, make: Callable[[Path], bytes]) -> None:
    """Python's own unpickler runs them, in a process of its own."""
    (tmp_path / "hostile.pkl").write_bytes(make(tmp_path / "canary"))
    code = "import pickle, sys; pickle.load(open(sys.argv[1], 'rb'))"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "hostile.pkl")], check=False, capture_output=True)
    assert (tmp_path / "canary").exists()


def test_a_hostile_name_deep_inside_a_good_pickle_is_refused(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, (command(tmp_path / "canary"),)

    good = {"frames": [{"x": np.arange(5.0)} for _ in range(200)]}
    assert len(rebuild(pickle.dumps(good), LOG_NAMES, "log")["frames"]) == 200
    for protocol in (2, 3, 4, 5):
        with pytest.raises(DataError, match=rf"{os.name}\.system, which is not among the names admitted"):
            rebuild(pickle.dumps({**good, "more": [(Payload(),)]}, protocol), LOG_NAMES, "log")
    assert not (tmp_path / "canary").exists()


def object_dtype(content: bytes, shape: bytes = b"K\x01\x85") -> bytes:
    """An array of objects as NumPy writes it, around `content`."""
    core = "numpy.core.multiarray"
    return (
        b"\x80\x04"
        + text(core) + text("_reconstruct") + b"\x93"
        + text("numpy") + text("ndarray") + b"\x93" + b"K\x00\x85C\x01b\x87R"
        + b"(K\x01" + shape + text("numpy") + text("dtype") + b"\x93" + text("O8") + b"\x89\x88\x87R"
        + b"(K\x03\x8c\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK?tb\x89" + content + b"tb."
    )  # fmt: skip


def test_arrays_of_objects_become_lists() -> None:
    found = rebuild(object_dtype(b"]K\x07a"), LOG_NAMES, "log")
    assert type(found.array) is list
    assert found.array == [7]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (object_dtype(b"C\x08" + struct.pack("<Q", 0xDEADBEEF)), "no plain row of them"),
        (object_dtype(b"]K\x07a", b"K\x02\x85"), "no plain row of them"),
        (object_dtype(b"]K\x07a", b"K\x01K\x01\x86"), "no plain row of them"),
    ],
)
def test_arrays_of_objects_never_point_into_memory(data: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        rebuild(data, LOG_NAMES, "log")


def from_buffer(content: bytes, dtype: bytes, shape: bytes) -> bytes:
    core = text("numpy.core.numeric") + text("_frombuffer") + b"\x93"
    kind = text("numpy") + text("dtype") + b"\x93" + dtype + b"\x85R"
    return b"\x80\x05" + core + b"(C" + bytes([len(content)]) + content + kind + shape + text("C") + b"tR."


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (from_buffer(bytes(16), text("O8"), b"K\x02\x85"), "declared to hold objects"),
        (from_buffer(bytes(16), text("f8"), b"K\x03\x85"), r"shape \[3\] and type float64 comes with 16 bytes"),
        (from_buffer(bytes(16), text("f8"), b"J\xfe\xff\xff\xff\x85"), "no tuple of sizes"),
        (from_buffer(bytes(16), text("f8,f8"), b"K\x01\x85"), "none of plain numbers"),
        (from_buffer(bytes(16), text("M8[ns]"), b"K\x02\x85"), "none of plain numbers"),
        (from_buffer(bytes(16), text("V16"), b"K\x01\x85"), "none of plain numbers"),
        (from_buffer(bytes(16), b"K\x08", b"K\x02\x85"), "none of plain numbers"),
        (from_buffer(b"", text("f8"), b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86"), "comes with 0 bytes"),
    ],
)
def test_arrays_with_tricks_are_refused(data: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        rebuild(data, LOG_NAMES, "log")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\x80\x04r\xff\xff\xff\x7f.", "fills its memo at 2147483647"),
        (b"\x80\x04Nr\xff\xff\xff\x7f.", "fills its memo at 2147483647 after 0 entries"),
        (b"\x80\x04\x8b\x00\x01\x00\x00" + b"\xff" * 256 + b".", "integer of 256 bytes"),
        (b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7f.", "damaged"),  # BYTEARRAY8 of 8 EiB
        (b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.", "damaged"),  # FRAME
        (b"\x80\x04X\xff\xff\xff\x7fa.", "damaged"),
        (b"\x80\x04}" + b")" + b"\x85" * 100 + b"Ns.", "uses a tuple as a key"),  # hashing nested tuples
        (b"\x80\x04}]Ns.", "uses a list as a key"),
        (b"\x80\x04K\x01Na.", "appends to a int"),
        (b"\x80\x04]NNs.", "sets items of a list"),
        (b"\x80\x04(.", "damaged"),
        (b"\x80\x04a.", "damaged"),
        (b"\x80\x04e.", "damaged"),
        (b"\x80\x04h\x05.", "damaged"),
        (b"\x80\x04\xff.", "damaged"),
        (b"\x80\x06N.", "pickle protocol 6"),
        (b"\x80\x04\x8f.", "opcode EMPTY_SET"),
        (b"\x80\x04K\x01)R.", "it calls int"),
        (b"\x80\x04\x8c\x01a\x8c\x02\xff\xfe\x93.", "damaged"),
        (b"", "at byte 0 of 0"),
        (b"hello", "cut off or damaged"),
    ],
)
def test_streams_that_are_broken_or_greedy_are_refused(data: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        rebuild(data, LOG_NAMES, "file")


def of_class(content: bytes) -> bytes:
    """`content` after an admitted class, at 0 of the memo."""
    return b"\x80\x04cnuplan.common.actor_state.state_representation\nPoint2D\nq\x000" + content


def growing_paths(levels: int) -> bytes:
    """A path of 1000 letters, then again and again a path of the last one a hundred times."""
    first = b"\x80\x04cpathlib\nPosixPath\nq\x000" + b"X" + struct.pack("<I", 1000) + b"a" * 1000 + b"q\x010"
    steps = [b"h\x00(" + (b"h" + bytes([k])) * 100 + b"tRq" + bytes([k + 1]) + b"0" for k in range(1, levels + 1)]
    return first + b"".join(steps) + b"h" + bytes([levels + 1]) + b"."


def copied_text(times: int) -> bytes:
    argument = b"(" + b"X" + struct.pack("<I", 10**6) + b"a" * 10**6 + text("latin1") + b"tq\x010"
    return b"\x80\x04c_codecs\nencode\nq\x000" + argument + b"](" + b"h\x00h\x01R" * times + b"e."


def copied_attributes(times: int) -> bytes:
    entries = b"".join(text(f"k{i}") + b"N" for i in range(10_000))
    return of_class(b"}(" + entries + b"uq\x010](" + b"h\x00)Rh\x01b" * times + b"e.")


@pytest.mark.parametrize(
    ("make", "harmless", "greedy"), [(growing_paths, 1, 3), (copied_text, 3, 200), (copied_attributes, 3, 300)]
)
def test_what_grows_by_repetition_is_refused(make: Callable[[int], bytes], harmless: int, greedy: int) -> None:
    assert rebuild(make(harmless), CACHE_NAMES, "file")
    with pytest.raises(DataError, match=r"it repeats its \d+ bytes again and again"):
        rebuild(make(greedy), CACHE_NAMES, "file")


def test_keys_whose_hashes_can_be_chosen_are_refused() -> None:
    assert rebuild(pickle.dumps({2**59: "a", -5: "b", True: "c"}), LOG_NAMES, "file") == {
        2**59: "a",
        -5: "b",
        True: "c",
    }
    for key in (2**61 - 1, -(2**60)):
        with pytest.raises(DataError, match="integer of more than 60 bits as a key"):
            rebuild(pickle.dumps({key: "a"}), LOG_NAMES, "file")


def test_names_reach_no_terminal_as_they_are() -> None:
    for name, shown in (("\x1b[2Jos", r"\x1b[2Jos"), ("o\ud800s", r"o\ud800s")):
        data = (
            b"X" + struct.pack("<I", len(name.encode("utf-8", "surrogatepass"))) + name.encode("utf-8", "surrogatepass")
        )
        with pytest.raises(DataError) as caught:
            rebuild(b"\x80\x04" + data + text("system") + b"\x93.", LOG_NAMES, "file")
        assert f"asks for {shown}.system" in str(caught.value)
    with pytest.raises(DataError) as caught:
        rebuild(b"\x80\x04\x8fc\x1b[2Jos\nsystem\n.", LOG_NAMES, "file")
    assert r"It names \x1b[2Jos.system." in str(caught.value)


def test_deep_nesting_does_not_crash() -> None:
    value = rebuild(b"\x80\x04" + b"]" * 200_000 + b"a" * 199_999 + b".", LOG_NAMES, "file")
    depth = 0
    while value:
        value, depth = value[0], depth + 1
    assert depth == 199_999


def plain(value: object) -> object:
    """With arrays in place of what stands for them."""
    if isinstance(value, PickledArray):
        return value.array
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain(item) for item in value)
    return value


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_come_back_as_they_were(protocol: int) -> None:
    shared = [1, 2]
    arrays = [
        np.arange(12.0).reshape(3, 4),
        np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        np.arange(12.0).reshape(3, 4)[:, ::2],
        np.array([[True, False]]),
        np.arange(3, dtype=np.int64),
        np.arange(3, dtype=">i4"),
        np.zeros((0, 7), dtype=np.float32),
        np.array(["vehicle", "bicycle"]),
        np.array(2.5),
    ]
    value = {
        "ints": [0, -1, 255, 65536, -(2**31), 2**62, -(2**70)],
        "floats": [0.1, float("inf"), -0.0],
        "rest": (None, True, False, "ä" * 300, b"\x00\xff" * 200, ()),
        "shared": [shared, shared],
        "scalars": [np.float64(0.1), np.float32(0.1), np.int64(-5), np.bool_(True), np.str_("a")],
        "path": [Path("/a/b.pkl"), PurePosixPath("c/d")],
        3: {"nested": {}},
    }
    found = rebuild(pickle.dumps({**value, "arrays": arrays}, protocol), LOG_NAMES, "file")
    back = plain(found)
    for array, other in zip(arrays, back.pop("arrays"), strict=True):
        assert (other.dtype, other.shape) == (array.dtype, array.shape)
        assert other.tobytes() == array.tobytes()
    expected = dict(value, scalars=[0.1, float(np.float32(0.1)), -5, True, "a"], path=["/a/b.pkl", "c/d"])
    assert back == expected
    assert [type(item) for item in back["scalars"]] == [float, float, int, bool, str]
    assert found["shared"][0] is found["shared"][1]


def test_names_of_numpy_1_are_read_too() -> None:
    data = pickle.dumps([np.arange(3.0), np.float64(2.0)], 3)
    assert b"numpy._core.multiarray" in data or b"numpy.core.multiarray" in data
    for core in (b"numpy.core.multiarray", b"numpy._core.multiarray"):
        renamed = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
        renamed = renamed.replace(b"numpy.core.multiarray", core)
        array, scalar = rebuild(renamed, LOG_NAMES, "file")
        assert array.array.tolist() == [0.0, 1.0, 2.0]
        assert scalar == 2.0


def test_instances_become_records() -> None:
    module, name = "nuplan.common.actor_state.state_representation", "StateSE2"
    slots = b"N}(" + text("x") + b"G" + struct.pack(">d", 1.5) + text("y") + b"K\x02u\x86b"
    data = b"\x80\x04" + text(module) + text(name) + b"\x93)\x81" + slots + b"."
    found = rebuild(data, CACHE_NAMES, "file")
    assert isinstance(found, Record)
    assert (found.name, found.kind, found.args, found.state) == (f"{module}.{name}", name, (), {"x": 1.5, "y": 2})
    with pytest.raises(DataError, match=r"StateSE2, which is not among the names admitted"):
        rebuild(data, LOG_NAMES, "file")
    with pytest.raises(DataError, match="no mapping of names"):
        rebuild(data.replace(slots, b"]b"), CACHE_NAMES, "file")


def test_truncated_at_every_offset_is_an_error_that_names_the_file() -> None:
    data = pickle.dumps({"a": [np.arange(3.0), "text", (1, 2.5)], "b": {"c": b"bytes"}})
    for size in range(len(data)):
        with pytest.raises(DataError, match=r"^log\.pkl: (cut off or damaged at byte|refused)"):
            rebuild(data[:size], LOG_NAMES, "log.pkl")


def test_flipped_bytes_give_a_value_or_a_data_error() -> None:
    data = pickle.dumps({"a": [np.arange(3.0), np.float32(1.0), "text", (1, 2.5)], "b": {"c": b"bytes"}}, 4)
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(4000):
        broken = bytearray(data)
        for place in rng.integers(0, len(data), rng.integers(1, 4)):
            broken[place] = rng.integers(0, 256)
        try:
            rebuild(bytes(broken), LOG_NAMES, "log.pkl")
        except DataError:
            refused += 1
    assert refused > 2000


def test_lzma_bombs_stop_at_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pkl"
    path.write_bytes(lzma.compress(bytes(50_000_000), preset=0))
    assert path.stat().st_size < 50_000
    with pytest.raises(DataError, match=r"bomb\.pkl: holds more than 1000000 bytes when decompressed"):
        read_lzma(path, max_bytes=1_000_000)
    assert read_lzma(path, max_bytes=50_000_000) == bytes(50_000_000)


def test_lzma_files_that_are_broken(tmp_path: Path) -> None:
    path = tmp_path / "cache.pkl"
    content = np.random.default_rng(0).bytes(5000)
    data = lzma.compress(content)
    path.write_bytes(data)
    assert read_lzma(path) == content
    for size in (0, 1, 6, 20, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(DataError, match=r"cache\.pkl: truncated"):
            read_lzma(path)
    path.write_bytes(data + b"x")
    with pytest.raises(DataError, match=r"cache\.pkl: damaged: more bytes follow"):
        read_lzma(path)
    path.write_bytes(data[:2000] + b"\x00" * 100 + data[2100:])
    with pytest.raises(DataError, match=r"cache\.pkl: (damaged|not an lzma file)"):
        read_lzma(path)
    path.write_bytes(pickle.dumps({}))
    with pytest.raises(DataError, match=r"cache\.pkl: not an lzma file"):
        read_lzma(path)
    with pytest.raises(DataError, match=r"absent\.pkl: cannot be read"):
        read_lzma(tmp_path / "absent.pkl")
    with pytest.raises(DataError, match="holds more than 100 bytes"):
        read_plain(_large(tmp_path), max_bytes=100)


def _large(folder: Path) -> Path:
    (folder / "large.pkl").write_bytes(bytes(101))
    return folder / "large.pkl"
