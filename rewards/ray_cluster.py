"""Having a Ray to work with: the one in use, one at an address, or one of our own; and leaving nothing behind."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable
from typing import Any

from rewards.isolation import describe_error
from rlhf_drive.errors import ConfigError, RewardError

__all__ = ["connect", "wait_for_exit"]

_STORE_BYTES = 200 * 2**20
_REACH_S = 10.0
_EXIT_S = 10.0


def connect(ray: Any, address: str | None, cpus: int) -> bool:
    """Have a Ray to work with; returns whether it was started or joined for this, and is to be left again.

    Raises:
        ConfigError: `address` does not answer.
        RewardError: Ray cannot be started here.
    """
    if ray.is_initialized():
        return False
    if address is not None and address.startswith("ray://"):
        raise ConfigError(
            f"address {address!r}: the reward service does not work through Ray Client. Run this program on a machine "
            "of the cluster and give host:port of its head, or 'auto'."
        )
    # Also for the processes that Ray starts. What the user has set stays.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    local = {"num_cpus": max(cpus, os.cpu_count() or 1), "object_store_memory": _STORE_BYTES}
    if address in (None, "local"):
        try:
            ray.init(address=address, **quiet, **local)
            return True
        except Exception as error:
            if address == "local" or not isinstance(error, ValueError):
                raise RewardError(f"Ray cannot be started on this machine: {describe_error(error)}") from error
            # There is a cluster to join, for which sizes must not be given.
            address = os.environ.get("RAY_ADDRESS") or "auto"
    _check_reachable(address)
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"No Ray cluster can be joined at address {address!r}: {str(error).rstrip('.')}. Start one with "
            "'ray start --head', or leave the address out to use this machine alone."
        ) from error
    return True


def _check_reachable(address: str) -> None:
    """Raise ConfigError at once where nothing listens; Ray itself would try for a minute."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit():
        if address == "auto":
            return
        raise ConfigError(f"address of the Ray cluster must be host:port, 'auto' or 'local'; got {address!r}.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_S).close()
    except OSError as error:
        raise ConfigError(
            f"No Ray cluster answers at address {address!r}: {error}. Check host and port, and that "
            "'ray start --head' runs there; or leave the address out to use this machine alone."
        ) from error


def wait_for_exit(pids: Iterable[int]) -> None:
    """Wait until processes of this machine that have been ended are gone."""
    deadline = time.monotonic() + _EXIT_S
    for pid in pids:
        while time.monotonic() < deadline and _exists(pid):
            time.sleep(0.01)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
