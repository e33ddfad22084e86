"""Fetching weights from the hub: look up, check the space, transfer, go on after an interruption, compare.

Addresses, tokens, redirects and retries are huggingface_hub's (so ``HF_ENDPOINT``, ``HF_TOKEN``, ``HF_HOME``
and proxies count).  The unfinished file is ours: since 2.x the library throws it away when its process ends.
"""

from __future__ import annotations

import fcntl
import io
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import httpx2
from huggingface_hub import constants, get_hf_file_metadata, get_token, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import http_get
from huggingface_hub.utils._headers import build_hf_headers
from huggingface_hub.utils.tqdm import disable_progress_bars

from pipeline.errors import ConfigurationError, DownloadError, PipelineError, StorageError
from pipeline.models import PART_SUFFIX, OnBytes, Weight, in_gb, sha256_of

SPARE_BYTES = 1_000_000_000
"""What a download leaves free on the disk."""

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A weight as the hub describes it."""

    weight: Weight
    url: str
    etag: str
    size: int

    @property
    def sha256(self) -> str | None:
        """The checksum to compare with: of a large file the hub's ETag is its SHA-256."""
        return self.etag if _SHA256.fullmatch(self.etag) else self.weight.sha256


def look_up(weight: Weight, *, any_version: bool = False, hub: str | None = None) -> RemoteFile:
    """Ask the hub (default: the one of ``HF_ENDPOINT``) for a weight's size and checksum.

    Raises ``ConfigurationError`` where the hub can't be reached, refuses, has no such file, or (without
    ``any_version``) has another file than the manifest names.
    """
    url = hf_hub_url(weight.repository, weight.path, endpoint=hub)
    with _hub_errors(weight, url):
        found = get_hf_file_metadata(url, token=get_token(), endpoint=hub)
    if found.etag is None or found.size is None:
        raise ConfigurationError(f"{url} gives no ETag or size; is HF_ENDPOINT a mirror of the hub?")
    remote = RemoteFile(weight, url, found.etag, found.size)
    differs = _difference(remote)
    if differs and not any_version:
        raise ConfigurationError(
            f"{weight.repository} now has another {weight.file} ({differs}) than the one this version was "
            "made for; --any-version takes it all the same"
        )
    return remote


def _difference(remote: RemoteFile) -> str:
    weight = remote.weight
    if weight.size not in (None, remote.size):
        return f"{remote.size} bytes, not {weight.size}"
    if weight.sha256 is not None and _SHA256.fullmatch(remote.etag) and remote.etag != weight.sha256:
        return f"sha256 {remote.etag[:12]}..., not {weight.sha256[:12]}..."
    return ""


def part_of(remote: RemoteFile, folder: Path) -> Path:
    """Where the unfinished file lies; another version has another name."""
    label = re.sub(r"\W", "", remote.etag)[:12]
    return folder / remote.weight.folder / f"{remote.weight.file}.{label}{PART_SUFFIX}"


def bytes_left(remotes: Iterable[RemoteFile], folder: Path) -> int:
    """Bytes that the transfers still have to bring."""
    left = 0
    for remote in remotes:
        part = part_of(remote, folder)
        left += remote.size - (part.stat().st_size if part.is_file() else 0)
    return left


def check_space(remotes: Iterable[RemoteFile], folder: Path) -> None:
    """Raises ``StorageError`` where the disk of ``folder`` has no room for what is left to bring."""
    remotes = tuple(remotes)
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    needed = bytes_left(remotes, folder)
    if needed + SPARE_BYTES > free:
        raise StorageError(
            str(folder),
            f"{in_gb(needed)} are to come, {in_gb(SPARE_BYTES)} stay free, but only {in_gb(free)} are free; "
            "make room, take fewer modes (--mode), or another disk (INFINITETALK_COMFYUI_MODELS)",
        )


def fetch(
    remote: RemoteFile, folder: Path, on_bytes: OnBytes | None = None, on_check: OnBytes | None = None
) -> Path:
    """Bring one file to its place below ``folder``, going on where an earlier try stopped.

    ``on_bytes`` is told of the transfer, ``on_check`` of the reading back that follows.

    Raises ``DownloadError``, ``ConfigurationError`` (refused, or another download of it runs),
    ``StorageError``.
    """
    weight = remote.weight
    target = folder / weight.folder / weight.file
    part = part_of(remote, folder)
    with _writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(part) as file:
            _transfer(remote, file, _bound(on_bytes, remote))
            if remote.sha256 is not None:
                digest = sha256_of(part, _bound(on_check, remote))
                if digest != remote.sha256:
                    part.unlink()
                    raise DownloadError(
                        f"{weight.file} arrived damaged (sha256 {digest[:12]}..., should be "
                        f"{remote.sha256[:12]}...) and was deleted; run the command again"
                    )
            part.replace(target)
        for old in target.parent.glob(f"{weight.file}.*{PART_SUFFIX}"):
            old.unlink(missing_ok=True)  # of other versions
    return target


def _bound(told: OnBytes | None, remote: RemoteFile) -> Callable[[int], None]:
    def report(done: int) -> None:
        if told is not None:
            told(remote.weight, done, remote.size)

    return report


def _transfer(remote: RemoteFile, file: _PartFile, report: Callable[[int], None]) -> None:
    disable_progress_bars()
    have = file.seek(0, os.SEEK_END)
    if have > remote.size:
        have = file.seek(0)
        file.truncate()
    report(have)
    file.report = report
    with _hub_errors(remote.weight, remote.url):
        # The hub's own address each time, not the one it redirects to: that one expires within the hour.
        http_get(
            remote.url,
            cast(BinaryIO, file),
            resume_size=have,
            headers=build_hf_headers(token=get_token()),
            expected_size=remote.size,
        )
    file.flush()


class _PartFile(io.BufferedRandom):
    """A file that tells how long it has become."""

    report: Callable[[int], None] | None = None

    def write(self, data: object, /) -> int:
        """Write, and tell."""
        written = super().write(data)  # type: ignore[arg-type]
        if self.report is not None:
            self.report(self.tell())
        return written


@contextmanager
def _locked(part: Path) -> Iterator[_PartFile]:
    descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    with _PartFile(io.FileIO(descriptor, "r+")) as file:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigurationError(f"another download writes {part}; wait for it or end it") from None
        yield file


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(str(path), error.strerror or str(error)) from None


@contextmanager
def _hub_errors(weight: Weight, url: str) -> Iterator[None]:
    """The library's errors become ours."""
    try:
        yield
    except HfHubHTTPError as error:
        raise _refused(weight, url, error.response.status_code) from None
    except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
        raise ConfigurationError(
            f"the hub can't be reached: {_words(error)} ({url}); HF_ENDPOINT can name a mirror"
        ) from None
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise DownloadError(
            f"the transfer of {weight.file} broke: {_words(error)}; the same command goes on from there"
        ) from None
    except ConnectionError as error:  # HF_HUB_OFFLINE
        raise ConfigurationError(f"{_words(error)}") from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise DownloadError(
            f"{weight.file} did not arrive whole ({_words(error)}); the same command goes on from there"
        ) from None


def _refused(weight: Weight, url: str, status: int) -> PipelineError:
    if status in (401, 403):
        token = "the token it was given (HF_TOKEN, or `hf auth login`) is not accepted"  # noqa: S105
        if get_token() is None:
            token = "set HF_TOKEN to a token of an account that may read it, or run `hf auth login`"  # noqa: S105
        gate = f"; a gated repository must be agreed to once on its page, {weight.repository}"
        return ConfigurationError(f"the hub refuses {weight.file} ({status}): {token}{gate}")
    if status == 404:
        return ConfigurationError(
            f"{weight.repository} has no {weight.path} (404 at {url}); was it moved, or is HF_ENDPOINT an "
            "incomplete mirror?"
        )
    return DownloadError(f"the hub answers {status} for {url}; try again later")


def _words(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def endpoint() -> str:
    """The hub's address in force."""
    return str(constants.ENDPOINT)
