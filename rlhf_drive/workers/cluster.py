"""Having a Ray to work with: the one in use, one at an address, or one of our own; and leaving nothing behind."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rlhf_drive.errors import ConfigError, RlhfDriveError, describe_error

__all__ = ["Connection", "connect", "wait_for_exit"]

_STORE_BYTES = 200 * 2**20
_REACH_S = 10.0
_EXIT_S = 10.0


@dataclass
class _Shared:
    """A Ray that was started or joined by :func:`connect`."""

    ray: Any
    """The package, or what stands for it in a test."""
    session: str
    """Tells it from a later one of this process."""
    local: bool
    """Whether it was started on this machine, rather than joined."""
    users: int
    """Connections that have not left yet."""


_lock = threading.Lock()
_shared: _Shared | None = None


class Connection:
    """One service's use of Ray. The last one to leave ends what the first has started or joined."""

    def __init__(self, ray: Any, shared: _Shared | None) -> None:
        self._ray, self._shared = ray, shared

    @property
    def owned(self) -> bool:
        """Whether this Ray was started or joined for the services of this process, and ends with them."""
        return self._shared is not None

    @property
    def local(self) -> bool:
        """Whether it was started on this machine for the services of this process alone."""
        return self._shared is not None and self._shared.local

    def leave(self) -> None:
        """Use it no longer; a second call does nothing."""
        global _shared
        with _lock:
            shared, self._shared = self._shared, None
            if shared is None:
                return
            shared.users -= 1
            if shared.users or shared is not _shared:
                return
            _shared = None
            if self._ray.is_initialized() and _session(self._ray) == shared.session:
                self._ray.shutdown()


def connect(
    ray: Any, address: str | None, cpus: int, *, failure: type[RlhfDriveError], store_bytes: int = _STORE_BYTES
) -> Connection:
    """Have a Ray to work with: the one that this process uses already, one at `address`, or a new one.

    Args:
        ray: The package.
        address: `host:port`, `auto`, `local` to start one, or None to join one that runs here or start one.
        cpus: Cores that a Ray which is started must have at least.
        failure: What is raised where Ray cannot be started.
        store_bytes: Room for objects in a Ray which is started.

    Raises:
        ConfigError: `address` does not answer.
    """
    global _shared
    with _lock:
        if ray.is_initialized():
            known = _shared is not None and _shared.ray is ray and _shared.session == _session(ray)
            if known and _shared is not None:
                _shared.users += 1
                return Connection(ray, _shared)
            return Connection(ray, None)
        local = _start_or_join(ray, address, cpus, store_bytes, failure)
        _shared = _Shared(ray, _session(ray), local, users=1)
        return Connection(ray, _shared)


def _start_or_join(ray: Any, address: str | None, cpus: int, store_bytes: int, failure: type[RlhfDriveError]) -> bool:
    """Start or join a Ray; returns whether it was started."""
    if address is not None and address.startswith("ray://"):
        raise ConfigError(
            f"address {address!r}: this program does not work through Ray Client. Run it on a machine of the cluster "
            "and give host:port of its head, or 'auto'."
        )
    # Also for the processes that Ray starts. What the user has set stays.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    # Ray would run workers with niceness 15: next to a busy trainer they would get next to nothing of a shared core.
    os.environ.setdefault("RAY_worker_niceness", "0")
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    sizes = {"num_cpus": max(cpus, os.cpu_count() or 1), "object_store_memory": store_bytes}
    if address in (None, "local"):
        try:
            ray.init(address=address, **quiet, **sizes)
            return True
        except Exception as error:
            if address == "local" or not isinstance(error, ValueError):
                raise failure(f"Ray cannot be started on this machine: {describe_error(error)}") from error
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
    return False


def _session(ray: Any) -> str:
    """What tells the Ray in use from one that this process used before."""
    context = ray.get_runtime_context()
    return f"{context.get_node_id()}/{context.get_job_id()}"


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
