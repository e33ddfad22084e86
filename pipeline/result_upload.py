"""A finished video to S3-compatible storage, and a link to it that works without a key for some days."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import obstore
from obstore.exceptions import BaseError

from pipeline.errors import StorageError
from pipeline.remote_files import in_words, open_bucket, put
from pipeline.service_settings import ServiceSettings

LINK_LIFE = timedelta(days=7)
"""S3 signs for no longer."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Where videos go."""

    name: str
    endpoint: str
    """URL of the server; empty: Amazon's."""
    access_key: str
    secret_key: str
    region: str = "us-east-1"

    @classmethod
    def of(cls, settings: ServiceSettings) -> Bucket | None:
        """The operator's, or None."""
        if not settings.s3_bucket:
            return None
        return cls(
            settings.s3_bucket,
            settings.s3_endpoint,
            settings.s3_access_key,
            settings.s3_secret_key,
            settings.s3_region,
        )


def upload(video: Path, key: str, bucket: Bucket) -> str:
    """Store ``video`` under ``key``; a signed link to it.

    Raises ``StorageError`` with the server's words, ``ConfigurationError`` for an endpoint that is none.
    """
    place = f"s3://{bucket.name}/{key}"
    try:
        store = open_bucket(
            bucket.name,
            bucket.endpoint,
            access_key_id=bucket.access_key,
            secret_access_key=bucket.secret_key,
            region=bucket.region,
        )
        put(store, key, video, "video/mp4")
        link: str = obstore.sign(store, "GET", key, LINK_LIFE)
    except (BaseError, ValueError) as error:
        raise StorageError(place, in_words(error)) from None
    return link
