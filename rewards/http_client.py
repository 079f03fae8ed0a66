"""JSON over HTTP with a timeout and retries; what goes wrong has a kind and one line, fit for a row's reason."""

from __future__ import annotations

import email.utils
import ipaddress
import json
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from types import ModuleType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rewards.carriers import FailureKind
from rlhf_drive.errors import ConfigError

if TYPE_CHECKING:
    import httpx2

__all__ = ["MAX_WAIT_S", "HttpCallError", "JsonClient", "check_url", "secret_from"]

MAX_WAIT_S = 30.0
"""Longest pause before another attempt; a server that asks for more is given up."""
_MAX_REPLY_BYTES = 32 * 2**20
_GRACE_S = 0.1
"""How much later the thread is given up than the attempt in it ends itself."""


class HttpCallError(Exception):
    """A call that failed for good."""

    def __init__(self, kind: FailureKind, reason: str) -> None:
        """Say how and why."""
        super().__init__(kind, reason)
        self.kind: FailureKind = kind
        """`timeout`, `unavailable` or `wrong_output`."""
        self.reason = reason
        """One line; never holds a secret."""

    def __str__(self) -> str:
        return self.reason


class _TransientError(Exception):
    """An attempt that failed and may be repeated."""

    def __init__(self, kind: FailureKind, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.kind: FailureKind = kind
        self.wait_s = wait_s


class JsonClient:
    """Posts JSON to one address; threads may share it.

    Connection errors, timeouts, 429 and 5xx are tried again after ``backoff_s * 2**k`` seconds, or after what
    `Retry-After` asks for if that is longer. There is no jitter: the same answers give the same waits. Redirects are
    not followed, other answers are final. An attempt is given up after `timeout_s`, whatever the server does meanwhile,
    so a call takes at most ``(retries + 1) * timeout_s`` plus the waits.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float,
        retries: int,
        backoff_s: float,
        token: str = "",
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Check the settings; nothing is connected before the first call.

        Args:
            url: Where to post.
            timeout_s: Time for one attempt, above 0.
            retries: Further attempts after the first.
            backoff_s: Wait before the second attempt; doubles from then on.
            token: Sent as `Authorization: Bearer`; empty sends none.
            sleep: Waits.

        Raises:
            ConfigError: A setting is wrong; the message lists all.
        """
        self.url = check_url(url)
        """The address."""
        self.name = url.partition("?")[0].partition("#")[0]
        """The address as messages show it: a query may hold a key."""
        problems = [] if 0 < timeout_s < float("inf") else [f"timeout_s must be above 0; got {timeout_s}."]
        problems += [] if retries >= 0 else [f"retries must be at least 0; got {retries}."]
        problems += [] if 0 <= backoff_s < float("inf") else [f"backoff_s must be at least 0; got {backoff_s}."]
        if problems:
            raise ConfigError(" ".join(problems))
        self._timeout_s, self._retries, self._backoff_s = timeout_s, retries, backoff_s
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        self._headers |= {"Authorization": f"Bearer {token}"} if token else {}
        self._sleep = sleep
        self._client: httpx2.Client | None = None
        self._lock = threading.Lock()

    def post(self, body: object) -> Any:
        """The JSON that the server answers `body` with.

        Raises:
            HttpCallError: There is no answer, or one that cannot be used.
            ValueError: `body` holds NaN or something that is not JSON.
        """
        content = json.dumps(body, allow_nan=False, separators=(",", ":")).encode()
        for attempt in range(self._retries + 1):
            try:
                return _parsed(self._in_time(content), self.name)
            except _TransientError as error:
                wait_s = max(self._backoff_s * 2.0**attempt, error.wait_s)
                if attempt == self._retries or wait_s > MAX_WAIT_S:
                    tried = f"{attempt + 1} attempt{'s' if attempt else ''}"
                    raise HttpCallError(error.kind, f"{error} ({tried})") from error
                self._sleep(wait_s)
        raise AssertionError("not reached")

    def close(self) -> None:
        """End kept connections; a later call opens new ones."""
        with self._lock:
            if self._client is not None:
                self._client.close()
                self._client = None

    def _open(self) -> httpx2.Client:
        with self._lock:
            if self._client is None:
                # A proxy from the environment must not stand between this machine and itself.
                self._client = _httpx().Client(timeout=self._timeout_s, trust_env=not _is_loopback(self.url))
            return self._client

    def _in_time(self, content: bytes) -> bytes:
        """One attempt, from a thread that is left behind where the server holds it with a header that never ends."""
        answer: Future[bytes] = Future()

        def attempt() -> None:
            try:
                answer.set_result(self._attempt(content))
            except Exception as error:  # raised again by the caller
                answer.set_exception(error)

        threading.Thread(target=attempt, daemon=True, name="http-attempt").start()
        try:
            return answer.result(self._timeout_s + _GRACE_S)
        except FutureTimeoutError as error:
            raise _TransientError("timeout", f"{self.name} did not answer within {self._timeout_s:g} s") from error

    def _attempt(self, content: bytes) -> bytes:
        """The body of one answer with status 200."""
        httpx2 = _httpx()
        client = self._open()
        deadline = time.monotonic() + self._timeout_s
        late = f"{self.name} did not answer within {self._timeout_s:g} s"
        try:
            with client.stream("POST", self.url, content=content, headers=self._headers) as response:
                data = bytearray()
                for chunk in response.iter_bytes():
                    data += chunk
                    if time.monotonic() > deadline:
                        raise _TransientError("timeout", late)
                    if len(data) > _MAX_REPLY_BYTES:
                        raise HttpCallError("wrong_output", f"{self.name} answered with more than 32 MiB")
                _check_status(response, bytes(data), self.name)
                return bytes(data)
        except httpx2.TimeoutException as error:
            raise _TransientError("timeout", late) from error
        except httpx2.RequestError as error:
            reason = f"{self.name} cannot be reached: {type(error).__name__}: {error}"
            raise _TransientError("unavailable", reason) from error


def check_url(url: str) -> str:
    """`url`, if it is an absolute http or https address without user name or password.

    Raises:
        ConfigError: It is not; the message says why.
    """
    form = f"Write it as http://host:port/path; got {url!r}."
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
        _httpx().URL(url)
    except (ValueError, _httpx().InvalidURL) as error:
        raise ConfigError(f"url is no address: {error}. {form}") from error
    if parts.scheme not in ("http", "https") or not host or any(c.isspace() for c in url):
        raise ConfigError(f"url is no http or https address. {form}")
    if parts.username is not None or parts.password is not None:
        raise ConfigError("url holds a user name or password; put the token into an environment variable instead.")
    return url


def secret_from(variable: str, option: str) -> str:
    """The secret that environment variable `variable` holds; empty if no variable is named.

    Raises:
        ConfigError: The variable is not set, or holds something that no header can.
    """
    if not variable:
        return ""
    value = os.environ.get(variable, "").strip()
    if not value or not value.isascii() or not value.isprintable():
        state = "holds text that no header can" if value else "is not set"
        raise ConfigError(f"{option}: environment variable {variable} {state}. Export the token there.")
    return value


def _httpx() -> ModuleType:
    """The HTTP library, loaded when first needed."""
    try:
        import httpx2
    except ImportError as error:
        raise ConfigError("Rewards over HTTP need the package httpx2. Install it: pip install httpx2") from error
    return httpx2


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_status(response: httpx2.Response, data: bytes, url: str) -> None:
    """Nothing for status 200, else an error that says whether to try again."""
    status = response.status_code
    if status == 200:
        return
    said = " ".join(data[:400].decode("utf-8", "replace").split())[:160]
    reason = f"{url} answered {status} {response.reason_phrase}".rstrip() + (f": {said}" if said else "")
    if status == 429 or status >= 500:
        raise _TransientError("unavailable", reason, _retry_after_s(response.headers.get("Retry-After", "")))
    raise HttpCallError("unavailable", reason)


def _retry_after_s(value: str) -> float:
    """Seconds that a `Retry-After` header asks for, as a number or a date; 0 if it says nothing."""
    if value.strip().isdecimal():
        return float(value)
    try:
        when = email.utils.parsedate_to_datetime(value)
    except (TypeError, ValueError):
        return 0.0
    return max(0.0, when.timestamp() - time.time())


def _parsed(data: bytes, url: str) -> Any:
    """The JSON in `data`; NaN and infinity are not JSON."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(data, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        said = " ".join(data[:400].decode("utf-8", "replace").split())[:80]
        reason = f"{url} answered with something that is not JSON ({error}): {said!r}"
        raise HttpCallError("wrong_output", reason) from error
