"""A profile counts every part of a step, leaves a trace and a table, and costs nothing when it is off."""

from __future__ import annotations

import gzip
import json
import re
import threading
import time
from pathlib import Path

import pytest
import torch

from rlhf_drive.errors import StorageError
from rlhf_drive.training.profile import part, profiled


def _step() -> torch.Tensor:
    weight = torch.ones(64, 64, requires_grad=True)
    with part("sampling"):
        time.sleep(0.01)
    for _ in range(2):
        with part("update"):
            with part("likelihood"):
                loss = (weight @ weight).sum()
            with part("backward"):
                loss.backward()
                time.sleep(0.05)
    return weight.grad if weight.grad is not None else weight


def test_a_wanted_step_leaves_a_trace_and_a_table_of_its_parts(tmp_path: Path) -> None:
    with profiled(tmp_path / "profiles", 5, (2, 5)):
        _step()
    assert sorted(path.name for path in (tmp_path / "profiles").iterdir()) == ["step-000005.json.gz", "step-000005.txt"]
    trace = json.loads(gzip.decompress((tmp_path / "profiles" / "step-000005.json.gz").read_bytes()))
    marked = [event["name"] for event in trace["traceEvents"] if event.get("cat") == "user_annotation"]
    assert sorted(name for name in marked if name.startswith("part/")) == [
        "part/backward", "part/backward", "part/likelihood", "part/likelihood", "part/sampling", "part/update",
        "part/update",
    ]  # fmt: skip
    text = (tmp_path / "profiles" / "step-000005.txt").read_text()
    assert max(map(len, text.splitlines())) <= 80
    found = {
        m[1].strip(): (m[2], float(m[3])) for m in re.finditer(r"(?m)^ *(.{2,34}?) +(\d*) +([\d.]+) +[\d.]+%$", text)
    }
    whole = float(re.search(r"step 5: ([\d.]+) s", text)[1])  # type: ignore[index]
    assert [found[name][0] for name in ("sampling", "update", "likelihood", "backward")] == ["1", "2", "2", "2"]
    assert 0.01 <= found["sampling"][1] < whole - 0.1  # two sleeps of 0.05 s are elsewhere
    assert 0.1 <= found["backward"][1] <= found["backward"][1] + found["likelihood"][1] <= found["update"][1] + 1e-3
    # Top-level parts and the rest are the whole step: nothing is counted twice.
    parts = found["sampling"][1] + found["update"][1] + found["(everything else)"][1]
    assert parts == pytest.approx(whole, abs=2e-3)
    assert re.search(r"(?m)^aten::mm +\d", text)
    assert found["update"][1] < found["sampling"][1] or text.index("sampling") > text.index(
        "update"
    )  # the most expensive first


def test_a_step_that_is_not_wanted_leaves_nothing(tmp_path: Path) -> None:
    with profiled(tmp_path / "profiles", 4, (2, 5)):
        _step()
    assert list(tmp_path.iterdir()) == []


def test_a_profile_does_not_change_the_numbers(tmp_path: Path) -> None:
    plain = _step()
    with profiled(tmp_path, 1, (1,)):
        seen = _step()
    assert torch.equal(plain, seen)


def test_a_step_that_fails_ends_its_profile(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), profiled(tmp_path, 1, (1,)), part("sampling"):
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []
    with profiled(tmp_path, 2, (2,)):  # another can start
        _step()
    assert (tmp_path / "step-000002.txt").is_file()


def test_parts_of_other_threads_do_not_count_in_the_step(tmp_path: Path) -> None:
    def elsewhere() -> None:
        with part("sampling ahead"):
            time.sleep(0.02)

    with profiled(tmp_path, 1, (1,)), part("update"):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    text = (tmp_path / "step-000001.txt").read_text()
    assert "sampling ahead" not in text
    assert re.search(r"(?m)^update +1 ", text)


def test_a_part_without_a_profile_is_nearly_free() -> None:
    started = time.process_time()
    for _ in range(20_000):
        with part("sampling"):
            pass
    assert time.process_time() - started < 0.2  # 10 us each; about 0.2 us are usual


def test_a_profile_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "profiles").write_text("a file")
    with pytest.raises(StorageError, match="The profile of step 1"), profiled(tmp_path / "profiles", 1, (1,)):
        _step()
