"""Joining a Ray cluster: wrong addresses are told from right ones at once."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import pytest

from rewards.ray_cluster import connect, wait_for_exit
from rlhf_drive.errors import ConfigError


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
        connect(NoRay, address, 1)
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
        connect(NoRay, address, 1)


def test_ray_that_is_in_use_is_taken_and_not_owned() -> None:
    class InUse:
        @staticmethod
        def is_initialized() -> bool:
            return True

    assert connect(InUse, "127.0.0.1:1", 1) is False


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
