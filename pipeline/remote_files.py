"""Files that are somewhere else: ``http(s)://`` and ``s3://`` addresses, streamed from and to this machine.

For what the *operator* names (a batch, a bucket): private addresses and proxies are allowed here.  What a
client of the service names goes through ``safe_fetch``, which checks the address.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import obstore
import requests
from obstore.exceptions import BaseError, NotFoundError
from obstore.store import S3Store
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from pipeline.errors import ConfigurationError, InvalidRequest, JobCancelled, StorageError
from pipeline.job import finished
from pipeline.safe_fetch import (
    CHUNK,
    CONNECT_SECONDS,
    MAX_REDIRECTS,
    TRANSFER_ERRORS,
    FetchLimits,
    reason,
    receive,
    shown,
    too_large,
    too_slow,
)

SCHEMES = ("http", "https", "s3")
ATTEMPTS = 4
"""Of a transfer that breaks off, or a server that is busy; waits of 1, 2 and 4 seconds between them."""
BUSY = (408, 429, 500, 502, 503, 504)
"""Answers after which another attempt makes sense."""
BROKEN = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)

ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
"""Variables that name another S3 server than Amazon's, the first that is set."""


def is_remote(text: str) -> bool:
    """Whether this is an address that ``download`` knows, and no path.

    >>> is_remote("s3://bucket/a.wav"), is_remote("talks/a.wav"), is_remote("ftp://host/a.wav")
    (True, False, False)
    """
    return urlsplit(text).scheme.lower() in SCHEMES


def s3_place(url: str) -> tuple[str, str]:
    """Bucket and key.  Raises ``ValueError`` with a reason for people.

    >>> s3_place("s3://videos/talks/a%20b.mp4")
    ('videos', 'talks/a b.mp4')
    """
    parts = urlsplit(url)
    if parts.scheme.lower() != "s3" or not parts.netloc or parts.query or parts.fragment:
        raise ValueError(f"{shown(url)} is no s3://bucket/key")
    return parts.netloc, unquote(parts.path.strip("/"))


def open_bucket(name: str, endpoint: str = "", seconds: float = 3600, **keys: Any) -> S3Store:
    """A bucket on ``endpoint`` (empty: Amazon's); ``keys`` are obstore's, else the usual AWS_* variables.

    One transfer may take ``seconds``.

    Raises ``ConfigurationError`` for an endpoint that is none, ``BaseError`` for settings that don't fit.
    """
    if endpoint and urlsplit(endpoint).scheme not in ("http", "https"):
        raise ConfigurationError(f"{endpoint!r} is no address of an S3 server")
    return S3Store(
        name,
        endpoint=endpoint or None,
        virtual_hosted_style_request=False,
        client_options={
            "allow_http": endpoint.startswith("http://"),
            "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
            "read_timeout": timedelta(minutes=2),
            "timeout": timedelta(seconds=seconds),  # of a whole body; the default is 30 s
        },
        retry_config={"max_retries": ATTEMPTS - 1, "retry_timeout": timedelta(seconds=60)},
        **keys,
    )


def download(url: str, target: Path, field: str, limits: FetchLimits, stop: threading.Event) -> None:
    """Fetch ``url`` into ``target``, which appears when it is whole; busy servers are asked again.

    Raises ``InvalidRequest`` naming ``field``, ``ConfigurationError``, ``StorageError``, ``JobCancelled``.
    """
    with finished(target) as partial:
        if urlsplit(url).scheme.lower() == "s3":
            _from_bucket(url, partial, field, limits, stop)
        else:
            _from_web(url, partial, field, limits, stop)


def upload(file: Path, url: str, content_type: str) -> None:
    """Store a file as ``url`` (s3://), in parts where it is large.

    Raises ``StorageError`` with the server's words, ``ConfigurationError``.
    """
    bucket, key = s3_place(url)
    try:
        put(open_bucket(bucket, endpoint_of()), key, file, content_type)
    except (BaseError, ValueError) as error:
        raise StorageError(url, in_words(error)) from None


def put(store: S3Store, key: str, file: Path, content_type: str) -> None:
    """Store a file in an open bucket; raises obstore's errors."""
    obstore.put(store, key, file, attributes={"Content-Type": content_type})


def read_whole(url: str) -> bytes | None:
    """What is stored as ``url`` (s3://), or None.  Raises ``StorageError``, ``ConfigurationError``."""
    bucket, key = s3_place(url)
    try:
        return bytes(obstore.get(open_bucket(bucket, endpoint_of()), key).bytes())
    except (NotFoundError, FileNotFoundError):
        return None
    except (BaseError, ValueError) as error:
        raise StorageError(url, in_words(error)) from None


def endpoint_of(env: Mapping[str, str] = os.environ) -> str:
    """The S3 server that the environment names; empty: Amazon's.

    >>> endpoint_of({"AWS_ENDPOINT_URL": "http://store:9000"})
    'http://store:9000'
    """
    return next((env[name] for name in ENDPOINTS if env.get(name)), "")


def in_words(error: Exception) -> str:
    """The first line of what obstore says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def _from_bucket(url: str, file: Path, field: str, limits: FetchLimits, stop: threading.Event) -> None:
    deadline = time.monotonic() + limits.seconds
    try:
        bucket, key = s3_place(url)
        found = obstore.get(open_bucket(bucket, endpoint_of(), limits.seconds), key)
        if found.meta["size"] > limits.max_bytes:
            raise too_large(field, limits)
        with file.open("wb") as target:
            for chunk in found.stream(CHUNK):
                if stop.is_set():
                    raise JobCancelled(field)
                if time.monotonic() > deadline:
                    raise too_slow(field, limits)
                target.write(chunk)
    except (NotFoundError, FileNotFoundError):
        raise InvalidRequest(field, f"there is no {shown(url)}") from None
    except (BaseError, ValueError) as error:
        raise InvalidRequest(field, f"{shown(url)} can't be fetched: {in_words(error)}") from None


def _from_web(url: str, file: Path, field: str, limits: FetchLimits, stop: threading.Event) -> None:
    # Busy servers are urllib3's business (Retry-After and all), broken connections ours: it sees no bodies.
    busy = Retry(
        total=None,
        connect=0,
        read=0,
        redirect=MAX_REDIRECTS,
        status=ATTEMPTS - 1,
        status_forcelist=BUSY,
        backoff_factor=0.5,
        raise_on_status=False,
        retry_after_max=60,
    )
    with requests.Session() as session:
        session.max_redirects = MAX_REDIRECTS
        for scheme in ("http://", "https://"):
            session.mount(scheme, HTTPAdapter(max_retries=busy))
        for attempt in range(ATTEMPTS):
            try:
                return receive(session, url, file, field, limits, stop)
            except TRANSFER_ERRORS as error:
                if not isinstance(error, BROKEN) or attempt + 1 == ATTEMPTS:
                    raise InvalidRequest(field, f"{shown(url)} can't be fetched: {reason(error)}") from None
            if stop.wait(2.0**attempt):
                raise JobCancelled(field)
    raise AssertionError("the last attempt returns or raises")
