"""What an operator may turn: one frozen object, built once where a program starts.

Nobody else reads the environment for the project's own settings.  What one *job* wants is in ``request``.
"""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from pipeline.errors import ConfigurationError

PREFIX = "INFINITETALK_"
SERVICE_PREFIX = "INFINITETALK_SERVE_"
"""Of ``service_settings``."""

EngineChoice = Literal["auto", "comfyui", "draft"]


class Settings(BaseModel):
    """The operator's settings; each field is the environment variable ``INFINITETALK_<FIELD>``.

    Raises ``ConfigurationError`` from ``from_env`` for an unknown variable or an unusable value.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine: EngineChoice = "auto"
    """``auto`` takes ComfyUI where ``comfyui_dir`` is set, else the draft engine."""
    comfyui_dir: Path | None = None
    """A ComfyUI checkout (the folder with ``main.py``)."""
    comfyui_python: Path | None = None
    """The Python that has ComfyUI's packages; default: the checkout's own ``venv`` or ``.venv``."""
    comfyui_models: Path | None = None
    """The folder of the weights; default: the checkout's ``models``."""
    comfyui_args: str = ""
    """More flags for ComfyUI, as on a command line (``--lowvram``)."""
    node_pack: bool = True
    """Whether engines load our own nodes (``workflows/comfyui_nodes``); without them: one speaker only."""
    draft_args: str = ""
    """More flags for the draft engine (``python -m pipeline.draft --help``)."""
    ports: str = "8188-8699"
    """Engines take the first free port of this range, both ends included."""
    ready_seconds: float = Field(default=300, gt=0)
    """How long an engine may take to answer after its start."""
    profile: str = "auto"
    """How much is kept on the GPU (``pipeline.profiles``); auto goes by the GPU's memory."""
    silent_seconds: float = Field(default=120, gt=0)
    """How long an engine may leave every question unanswered before it counts as dead."""
    max_attempts: int = Field(default=3, ge=1)
    """How many renderers one segment may lose before the job fails."""
    stalled_seconds: float = Field(default=1800, gt=0)
    """How long a prompt may run without any progress before its engine counts as hung."""
    idle_seconds: float = Field(default=900, gt=0)
    """Engines that nobody used for so long end, unless a service keeps them warm."""
    max_gpus: int = Field(default=0, ge=0)
    """On an autoscaling cluster: ask Ray for nodes with at most so many GPUs; 0: use those that are there."""
    speeds_file: Path | None = None
    """Where measured speeds of GPUs are kept; default: ``infinitetalk/speeds.json`` in the user's cache."""
    scratch_dir: Path | None = None
    """Where engines keep their base directories, and logs; default: each node's own folder for such."""
    vocal_separator: str = ""
    """The command that takes the music away from a track, with ``{input}`` and ``{folder}``: ``vocals``."""
    vocal_separator_seconds: float = Field(default=3600, gt=0)
    """How long it may take for one track."""
    log: Literal["text", "json"] = "text"
    """``json``: logs are JSON lines, with the job, segment, GPU and node they are about."""
    ray_address: str = "local"
    """``local`` starts Ray on this machine; ``auto`` or ``HOST:PORT`` joins a running cluster."""

    @field_validator("ports")
    @classmethod
    def _ports_are_a_range(cls, text: str) -> str:
        first, dash, last = text.partition("-")
        numbers = first.isdecimal() and last.isdecimal() and bool(dash)
        if not numbers or not 1024 <= int(first) <= int(last) <= 65535:
            raise ValueError(f"{text!r} is no range of ports such as 8188-8699")
        return text

    @field_validator("vocal_separator")
    @classmethod
    def _separator_is_a_template(cls, text: str) -> str:
        if missing := [word for word in ("{input}", "{folder}") if text and word not in text]:
            raise ValueError(f"{missing[0]} is not in the command {text!r}")
        return text

    @field_validator("comfyui_args", "draft_args", "vocal_separator")
    @classmethod
    def _arguments_can_be_split(cls, text: str) -> str:
        shlex.split(text)
        return text

    @property
    def scratch(self) -> Path:
        """``scratch_dir``, or this machine's own folder for temporary files."""
        return (self.scratch_dir or Path(tempfile.gettempdir())).resolve()

    @property
    def speeds_path(self) -> Path:
        """``speeds_file``, or its place in the user's cache (XDG)."""
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return self.speeds_file or Path(cache) / "infinitetalk" / "speeds.json"

    def of_engines(self) -> dict[str, Any]:
        """The settings that an engine which is running can't take on any more."""
        drivers = {"max_attempts", "ray_address", "vocal_separator", "vocal_separator_seconds"}
        pools = {"speeds_file", "idle_seconds", "max_gpus", "log"}
        return self.model_dump(mode="json", exclude=drivers | pools)

    @property
    def port_range(self) -> tuple[int, int]:
        """First and last port."""
        first, _, last = self.ports.partition("-")
        return int(first), int(last)

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> Settings:
        """Read ``INFINITETALK_*``; empty values count as not set."""
        own = {key: value for key, value in env.items() if not key.startswith(SERVICE_PREFIX)}
        return from_environment(cls, PREFIX, own)

    @property
    def comfyui_flags(self) -> list[str]:
        """``comfyui_args`` as a list."""
        return shlex.split(self.comfyui_args)

    @property
    def draft_flags(self) -> list[str]:
        """``draft_args`` as a list."""
        return shlex.split(self.draft_args)

    @property
    def vocal_separator_command(self) -> list[str]:
        """``vocal_separator`` as a list; empty where there is none."""
        return shlex.split(self.vocal_separator)


S = TypeVar("S", bound=BaseModel)


def from_environment(kind: type[S], prefix: str, env: Mapping[str, str]) -> S:
    """Settings from the variables that begin with ``prefix``; empty values count as not set.

    Raises ``ConfigurationError`` for an unknown variable or an unusable value.
    """
    given = {key.removeprefix(prefix).lower(): env[key] for key in env if key.startswith(prefix)}
    try:
        return kind.model_validate({key: value for key, value in given.items() if value != ""})
    except ValidationError as error:
        first = error.errors()[0]
        name = prefix + "_".join(str(part) for part in first["loc"]).upper()
        if first["type"] == "extra_forbidden":
            known = ", ".join(prefix + field.upper() for field in kind.model_fields)
            raise ConfigurationError(f"{name} is not a setting; the settings are {known}") from None
        raise ConfigurationError(f"{name}: {first['msg'].removeprefix('Value error, ')}") from None
