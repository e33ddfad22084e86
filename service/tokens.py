"""Who may use the service: bearer tokens with names; and short-lived signatures for links to videos.

A browser's video element can't send a header, so the page asks for a link that carries its own proof.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import time
from dataclasses import dataclass

from fastapi import Request

from pipeline.errors import ConfigurationError
from pipeline.service_settings import ServiceSettings
from service.errors import Refused

LINK_SECONDS = 6 * 3600
UNTIL_DIGITS = 12
"""Python refuses to read numbers of thousands of digits."""
LOCAL = "local"
"""The owner of what is asked without tokens, from this machine."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """The known tokens: secrets by name."""

    secrets: tuple[tuple[str, str], ...]

    @classmethod
    def read(cls, settings: ServiceSettings) -> Tokens:
        """From ``tokens`` and ``tokens_file``: ``name:secret``, by commas or lines.

        Raises ``ConfigurationError`` for a line that is none, or a name that is there twice.
        """
        lines = settings.tokens.split(",")
        if settings.tokens_file is not None:
            try:
                text = settings.tokens_file.expanduser().read_text()
            except OSError as error:
                raise ConfigurationError(
                    f"INFINITETALK_SERVE_TOKENS_FILE: {settings.tokens_file}: {error.strerror}"
                ) from None
            lines += [line for line in text.splitlines() if not line.lstrip().startswith("#")]
        found: dict[str, str] = {}
        for line in filter(None, (line.strip() for line in lines)):
            name, colon, secret = (part.strip() for part in line.partition(":"))
            if not colon or not name or len(secret) < 8 or name in found:
                raise ConfigurationError(
                    "INFINITETALK_SERVE_TOKENS: each token is name:secret, names differ, "
                    "and a secret has 8 characters or more"
                )
            found[name] = secret
        return cls(tuple(found.items()))

    def owner(self, given: str) -> str | None:
        """The name of a token; compared with all in constant time."""
        match = None
        for name, secret in self.secrets:
            if hmac.compare_digest(secret.encode(), given.encode()):
                match = name
        return match

    def _key(self) -> bytes:
        return hashlib.sha256("\n".join(secret for _, secret in self.secrets).encode()).digest()

    def signature(self, path: str, until: int) -> str:
        """Proof that the holder was given this path until then."""
        return hmac.new(self._key(), f"{path}?{until}".encode(), hashlib.sha256).hexdigest()

    def signed(self, path: str, until: int | None = None) -> str:
        """A link to a path that works without a header until then; without a time, for some hours."""
        if not self.secrets:
            return path
        until = int(time.time()) + LINK_SECONDS if until is None else until
        return f"{path}?until={until}&sig={self.signature(path, until)}"


def is_loopback(host: str | None) -> bool:
    """Whether a client's address is this machine's own."""
    try:
        return host is not None and ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


async def requested_by(request: Request) -> str:
    """``owner_of`` as a FastAPI dependency; async, or it would cost a turn on a thread."""
    return owner_of(request)


def owner_of(request: Request) -> str:
    """Whose request this is.  Raises ``Refused`` 401 or 403.

    ``Authorization: Bearer SECRET``, or the bare secret, as RunPod's clients send it.
    """
    tokens: Tokens = request.app.state.tokens
    if not tokens.secrets:
        if not is_loopback(request.client.host if request.client else None):
            raise Refused(
                403, "forbidden", "without INFINITETALK_SERVE_TOKENS only this machine itself is answered"
            )
        return LOCAL
    given = request.headers.get("authorization", "").strip()
    scheme, space, rest = given.partition(" ")
    if space and scheme.lower() == "bearer":
        given = rest.strip()
    owner = tokens.owner(given)
    if owner is None:
        raise Refused(401, "unauthorized", "give a known token: Authorization: Bearer TOKEN")
    return owner


def owner_or_link(request: Request) -> str | None:
    """Like ``owner_of``, or None where the path itself is signed and still valid."""
    tokens: Tokens = request.app.state.tokens
    sig, until = request.query_params.get("sig"), _until(request)
    if sig and until is not None and tokens.secrets:
        expected = tokens.signature(request.url.path, until)
        if hmac.compare_digest(expected.encode(), sig.encode()) and until > time.time():
            return None
        raise Refused(403, "forbidden", "this link is over, or was changed; ask for a new one")
    return owner_of(request)


def link_end(request: Request) -> int:
    """Until when links that this request gives out shall work.

    As long as its own link, where it came by one (that ``owner_or_link`` let pass); else 6 to 12 hours, equal
    for all requests of 6 hours: a playlist that is asked for again shall not change.
    """
    until = _until(request)
    if request.query_params.get("sig") and until is not None:
        return until
    return (int(time.time()) // LINK_SECONDS + 2) * LINK_SECONDS


def _until(request: Request) -> int | None:
    """The end of a link, in seconds since 1970; None where there is none, or what is there is no such."""
    text = request.query_params.get("until", "")
    return int(text) if text.isdecimal() and len(text) <= UNTIL_DIGITS else None
