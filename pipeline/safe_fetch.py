"""Fetching a file that a client names by URL, without letting the client reach what only we can reach.

The address is checked on the connected socket, so neither a redirect nor a resolver that changes its mind
gets around it.  https://cheatsheetseries.owasp.org (server-side request forgery) names the cases.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError
from urllib3.util import connection as sockets

from pipeline.errors import InvalidRequest, JobCancelled
from pipeline.job import finished

MAX_REDIRECTS = 5
CONNECT_SECONDS = 10.0
SILENT_SECONDS = 20.0
CHUNK = 256 << 10

TRANSFER_ERRORS = (requests.RequestException, HTTPError, ValueError)
"""What a request that comes to no answer raises."""


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """What may be fetched."""

    max_bytes: int
    seconds: float
    """In all."""
    allowed: tuple[str, ...] = ()
    """Hosts, addresses and networks (CIDR) that may be private."""


def fetch(url: str, target: Path, field: str, limits: FetchLimits, stop: threading.Event) -> None:
    """Fetch ``url`` into ``target``, which appears when it is whole.

    Raises ``InvalidRequest`` naming ``field``, ``StorageError``, ``JobCancelled``.
    """
    with checked_session(limits.allowed) as session, finished(target) as partial:
        try:
            receive(session, url, partial, field, limits, stop)
        except TRANSFER_ERRORS as error:
            raise InvalidRequest(field, f"{shown(url)} can't be fetched: {reason(error)}") from None


def receive(
    session: requests.Session, url: str, file: Path, field: str, limits: FetchLimits, stop: threading.Event
) -> None:
    """Stream the answer of ``url`` into ``file``; nothing larger than a chunk is held in memory.

    Raises ``TRANSFER_ERRORS`` where the connection fails, ``InvalidRequest`` for another answer than 200, for
    what is too large and for what takes too long, ``JobCancelled``.
    """
    deadline = time.monotonic() + limits.seconds
    with (
        session.get(
            url,
            stream=True,
            timeout=(CONNECT_SECONDS, SILENT_SECONDS),
            headers={"User-Agent": "infinitetalk", "Accept-Encoding": "identity"},
        ) as answer,
        file.open("wb") as target,
    ):
        if answer.status_code != 200:
            raise InvalidRequest(field, f"{shown(url)} answered {answer.status_code}")
        length = answer.headers.get("Content-Length", "")
        if length.isdecimal() and int(length) > limits.max_bytes:
            raise too_large(field, limits)
        received = 0
        for chunk in answer.iter_content(CHUNK):
            received += len(chunk)
            if received > limits.max_bytes:
                raise too_large(field, limits)
            if stop.is_set():
                raise JobCancelled(field)
            if time.monotonic() > deadline:
                raise too_slow(field, limits)
            target.write(chunk)
        if length.isdecimal() and received < int(length):
            raise requests.exceptions.ChunkedEncodingError("the transfer broke off")


def checked_session(allowed: tuple[str, ...]) -> requests.Session:
    """A session that connects to public addresses only, and to what is allowed."""
    session = requests.Session()
    session.trust_env = False  # no proxy: the address must be the one that is checked
    session.max_redirects = MAX_REDIRECTS
    adapter = _Adapter(allowed)
    session.mount("http://", adapter)
    session.mount("https://", adapter)
    return session


def check_address(address: str, host: str, allowed: Sequence[str]) -> None:
    """Raises ``AddressRefused`` unless the address is a public one, or it or its host is allowed.

    >>> check_address("93.184.216.34", "example.org", ())
    >>> check_address("169.254.169.254", "metadata", ())
    Traceback (most recent call last):
    pipeline.safe_fetch.AddressRefused: metadata (169.254.169.254) is not a public address
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        # An IPv4 address in an IPv6 one reaches the same machine.
        ip = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else ip)
    for entry in allowed:
        if entry.lower() == host.lower():
            return
        with contextlib.suppress(ValueError):
            if ip in ipaddress.ip_network(entry, strict=False):
                return
    if not ip.is_global or ip.is_multicast or any(ip in network for network in _NOT_PUBLIC):
        raise AddressRefused(f"{host} ({address}) is not a public address")


_NOT_PUBLIC = tuple(
    ipaddress.ip_network(network)
    for network in (
        "64:ff9b::/96",  # NAT64: any IPv4 address may be behind these two (RFC 6052, RFC 8215)
        "64:ff9b:1::/48",
        "::/96",  # IPv4-compatible, given up (RFC 4291)
        "fec0::/10",  # site-local, given up (RFC 3879)
    )
)
"""Python calls some of them global."""


class AddressRefused(ValueError):
    """The connection would go where clients have no business."""


class _Adapter(HTTPAdapter):
    """Connections that look at the address they are connected to before anything is sent."""

    def __init__(self, allowed: tuple[str, ...]) -> None:
        self._allowed = allowed
        super().__init__(max_retries=0)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {
            "http": _pool_class(HTTPConnectionPool, HTTPConnection, self._allowed),
            "https": _pool_class(HTTPSConnectionPool, HTTPSConnection, self._allowed),
        }


def _pool_class(pool: Any, connection: Any, allowed: tuple[str, ...]) -> Any:
    class Checked(connection):  # type: ignore[misc]
        def _new_conn(self) -> socket.socket:
            return _connect(self._dns_host, self.port, self.timeout, self.socket_options, allowed)

    return type("CheckedPool", (pool,), {"ConnectionCls": Checked})


def _connect(host: str, port: int, seconds: Any, options: Any, allowed: tuple[str, ...]) -> socket.socket:
    # Resolved once; each address is checked before a packet goes to it, and the connected one once more.
    last: Exception = OSError(f"{host} has no address")
    for *_, place in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        address = str(place[0])
        check_address(address, host, allowed)
        try:
            connected = sockets.create_connection((address, port), seconds, socket_options=options)
        except OSError as error:
            last = error
            continue
        try:
            check_address(connected.getpeername()[0], host, allowed)
        except AddressRefused:
            connected.close()
            raise
        return connected
    raise HTTPError(f"no connection: {last}")


def reason(error: BaseException) -> str:
    """The innermost words."""
    seen: list[BaseException] = []
    while error not in seen:
        seen.append(error)
        inner = error.__cause__ or error.__context__
        inner = inner or next((arg for arg in error.args if isinstance(arg, BaseException)), None)
        if inner is None or isinstance(error, AddressRefused):
            break
        error = inner
    return " ".join(str(error).split())[:200]


def shown(url: str) -> str:
    """A URL without what may be secret in it."""
    return url.partition("?")[0].rpartition("@")[2][:200]


def too_large(field: str, limits: FetchLimits) -> InvalidRequest:
    """The error for a file beyond the limit."""
    return InvalidRequest(field, f"larger than the {limits.max_bytes >> 20} MiB that are fetched")


def too_slow(field: str, limits: FetchLimits) -> InvalidRequest:
    """The error for a file that did not come in time."""
    return InvalidRequest(field, f"not fetched within {limits.seconds:g} s")
