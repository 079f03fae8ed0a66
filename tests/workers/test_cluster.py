"""Joining a Ray cluster: wrong addresses are told from right ones at once."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import pytest

from rlhf_drive.errors import ConfigError, RewardError
from rlhf_drive.workers import cluster, connect, wait_for_exit


class NoRay:
    """A ray that must not be asked for anything."""

    @staticmethod
    def is_initialized() -> bool:
        return False


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_address_where_nothing_listens_is_refused_within_a_second() -> None:
    address, started = f"127.0.0.1:{free_port()}", time.monotonic()
    with pytest.raises(ConfigError, match=f"No Ray cluster answers at address '{address}'.*ray start --head"):
        connect(NoRay, address, 1, failure=RewardError)
    assert time.monotonic() - started < 1.0


@pytest.mark.parametrize(
    ("address", "match"),
    [
        ("ray://head:10001", "does not work through Ray Client"),
        ("head", "must be host:port, 'auto' or 'local'; got 'head'"),
        ("head:port", "must be host:port"),
    ],
)
def test_address_of_a_kind_that_is_not_served(address: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        connect(NoRay, address, 1, failure=RewardError)


def test_ray_that_is_in_use_is_taken_and_not_owned() -> None:
    class InUse:
        @staticmethod
        def is_initialized() -> bool:
            return True

    connection = connect(InUse, "127.0.0.1:1", 1, failure=RewardError)
    assert (connection.owned, connection.local) == (False, False)
    connection.leave()


@pytest.fixture(autouse=True)
def nothing_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has not used Ray yet."""
    monkeypatch.setattr(cluster, "_shared", None)


class Recorder:
    """A ray that notes what it is asked for, and answers like one that finds a cluster, starts or cannot."""

    def __init__(self, *outcomes: Exception | None) -> None:
        self.outcomes = list(outcomes)
        self.calls: list[tuple[object, set[str]]] = []
        self.up = False
        self.stops = 0

    def is_initialized(self) -> bool:
        return self.up

    def get_runtime_context(self) -> Recorder:
        return self

    def get_node_id(self) -> str:
        return "node"

    def get_job_id(self) -> str:
        return f"job {self.stops}"

    def shutdown(self) -> None:
        self.up = False
        self.stops += 1

    def init(self, address: str | None = None, **options: object) -> None:
        self.calls.append((address, set(options) & {"num_cpus", "object_store_memory"}))
        if (outcome := self.outcomes.pop(0)) is not None:
            raise outcome
        self.up = True


def test_cluster_that_runs_is_joined_and_one_started_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    sizes = {"num_cpus", "object_store_memory"}
    none_runs, one_runs = Recorder(None), Recorder(ValueError("must not be provided"), None)
    assert connect(none_runs, None, 1, failure=RewardError).local is True
    assert none_runs.calls == [(None, sizes)]
    joined = connect(one_runs, None, 1, failure=RewardError)
    assert (joined.owned, joined.local) == (True, False)
    assert one_runs.calls == [(None, sizes), ("auto", set())]


def test_ray_that_does_not_start_or_answer_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(RewardError, match="cannot be started on this machine: OSError: no space"):
        connect(Recorder(OSError("no space")), "local", 1, failure=RewardError)
    with pytest.raises(
        ConfigError, match=r"joined at address 'auto': nobody there\. Start one with 'ray start --head'"
    ):
        connect(Recorder(ConnectionError("nobody there.")), "auto", 1, failure=RewardError)


def test_the_last_of_several_services_ends_what_the_first_has_started() -> None:
    ray = Recorder(None, None)
    first = connect(ray, "local", 1, failure=RewardError)
    second = connect(ray, None, 1, failure=RewardError)
    assert (first.local, second.local, len(ray.calls)) == (True, True, 1)
    first.leave()
    first.leave()  # which counts once
    assert (ray.up, ray.stops) == (True, 0)
    second.leave()
    assert (ray.up, ray.stops) == (False, 1)
    third = connect(ray, "local", 1, failure=RewardError)
    assert (third.local, len(ray.calls)) == (True, 2)


def test_ray_that_somebody_else_has_started_since_is_not_ended() -> None:
    ray = Recorder(None, None)
    mine = connect(ray, "local", 1, failure=RewardError)
    ray.shutdown()
    ray.init("elsewhere")
    theirs = connect(ray, None, 1, failure=RewardError)
    assert (theirs.owned, theirs.local) == (False, False)
    for connection in (theirs, mine):
        connection.leave()
    assert (ray.up, ray.stops) == (True, 1)


def test_waiting_for_the_end_of_a_process() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.5)"])
    reaper = __import__("threading").Thread(target=child.wait)
    reaper.start()
    started = time.monotonic()
    wait_for_exit([child.pid])
    assert 0.3 < time.monotonic() - started < 8.0
    assert child.poll() == 0
    reaper.join()
    with pytest.raises(ProcessLookupError):
        os.kill(child.pid, 0)
