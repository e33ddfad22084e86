"""What the operator of a service may turn: one frozen object, built once where a process starts.

Each field is the environment variable ``INFINITETALK_SERVE_<FIELD>``.  What concerns engines and renderers
is in ``settings``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from pipeline.settings import SERVICE_PREFIX, from_environment


class ServiceSettings(BaseModel):
    """The settings of a service.  Raises ``ConfigurationError`` from ``from_env``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data_dir: Path = Path("~/.local/share/infinitetalk")
    """Jobs, results and the index; the same for all heads.  A service started again on it goes on."""
    database_url: str = ""
    """Of the index (``postgresql+psycopg://...``); default: SQLite in the data directory."""
    max_queued: int = Field(default=1000, ge=1)
    """More waiting jobs than this are refused (429)."""

    tokens: str = ""
    """``name:secret,...``: who may use it; without any token only this machine is answered."""
    tokens_file: Path | None = None
    """The same, a line for each."""
    cors_origins: str = ""
    """Origins of other sites' pages that may use it, by commas; default: none."""
    max_upload_bytes: int = Field(default=2 << 30, ge=1)
    """Of one request, and of one file that is fetched."""
    max_json_bytes: int = Field(default=128 << 20, ge=1)
    """Of one JSON body, which is held in memory (base64 inputs)."""
    max_pixels: int = Field(default=50_000_000, ge=1)
    """Of a picture, and of a frame of a source video."""
    max_seconds: float = Field(default=3 * 3600, gt=0)
    """Of a recording."""
    input_roots: str = ""
    """Folders whose files may be named by path, separated as in PATH; default: none."""
    fetch_seconds: float = Field(default=300, gt=0)
    """How long one URL may take."""
    allowed_hosts: str = ""
    """Hosts, addresses and networks that URLs may reach though they are not public, by commas."""
    job_seconds: float = Field(default=24 * 3600, gt=0)
    """How long a job may be in progress, unless its request says less."""
    queue_seconds: float = Field(default=7 * 24 * 3600, gt=0)
    """How long a job may wait, unless its request says less."""

    metrics_port: int | None = Field(default=None, ge=1024, le=65535)
    """Of the page for Prometheus, where the service starts Ray itself; default: any free port."""
    volume: Path = Path("/runpod-volume")
    """Where RunPod mounts a network volume; results of jobs that ask for it are copied there."""
    runpod_stream: bool = False
    """A worker on RunPod streams: a job's output is the list of its progress with the result last, and
    ``/stream`` works.  Else it is the result alone, as the hub handler's clients expect."""

    webhook_secret: str = ""
    """Signs webhooks (Standard Webhooks: ``whsec_...``); without it they are not signed."""
    keep_days: float = Field(default=30, gt=0)
    """Jobs that are over are deleted after so long."""
    keep_bytes: int = Field(default=200 << 30, ge=0)
    """And the oldest of them as soon as all take more than this."""
    s3_bucket: str = ""
    """Results are copied to this bucket, and a signed link to it is in the result."""
    s3_endpoint: str = ""
    """URL of the S3-compatible server; default: Amazon's."""
    s3_access_key: str = ""
    s3_secret_key: str = ""
    s3_region: str = "us-east-1"

    @property
    def roots(self) -> tuple[Path, ...]:
        """``input_roots``, resolved."""
        return tuple(Path(root).expanduser().resolve() for root in self.input_roots.split(os.pathsep) if root)

    @property
    def allowed(self) -> tuple[str, ...]:
        """``allowed_hosts`` as a tuple."""
        return tuple(host.strip() for host in self.allowed_hosts.split(",") if host.strip())

    @property
    def data(self) -> Path:
        """``data_dir``, absolute."""
        return self.data_dir.expanduser().resolve()

    @property
    def index_url(self) -> str:
        """Where the index is."""
        return self.database_url or f"sqlite:///{self.data / 'index.sqlite'}"

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> ServiceSettings:
        """Read ``INFINITETALK_SERVE_*``; empty values count as not set."""
        return from_environment(cls, SERVICE_PREFIX, env)
