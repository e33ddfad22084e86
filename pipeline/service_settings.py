"""What the operator of a service may turn: one frozen object, built once where a process starts.

Each field is the environment variable ``INFINITETALK_SERVE_<FIELD>``.  What concerns engines and renderers
is in ``settings``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import ConfigurationError
from pipeline.settings import SERVICE_PREFIX as PREFIX


class ServiceSettings(BaseModel):
    """The settings of a service.  Raises ``ConfigurationError`` from ``from_env``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data_dir: Path = Path("~/.local/share/infinitetalk")
    """Jobs, results and the index; the same for all heads.  A service started again on it goes on."""
    database_url: str = ""
    """Of the index (``postgresql+psycopg://...``); default: SQLite in the data directory."""
    max_queued: int = Field(default=1000, ge=1)
    """More waiting jobs than this are refused (429)."""

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
        given = {key.removeprefix(PREFIX).lower(): env[key] for key in env if key.startswith(PREFIX)}
        try:
            return cls.model_validate({key: value for key, value in given.items() if value != ""})
        except ValidationError as error:
            first = error.errors()[0]
            name = PREFIX + "_".join(str(part) for part in first["loc"]).upper()
            if first["type"] == "extra_forbidden":
                known = ", ".join(PREFIX + field.upper() for field in cls.model_fields)
                raise ConfigurationError(f"{name} is not a setting; the settings are {known}") from None
            raise ConfigurationError(f"{name}: {first['msg'].removeprefix('Value error, ')}") from None
