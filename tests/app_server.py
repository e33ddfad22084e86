"""The HTTP application on a real socket, without Ray: its jobs wait for ever."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import uvicorn

from pipeline.service_settings import ServiceSettings
from service.app import create_app


class NoRenderers:
    """A backend with two GPUs that nobody asks to work."""

    def ensure(self) -> None:
        """There is nothing to start."""

    def state(self) -> dict[str, Any]:
        """As a runner would say."""
        return {"gpus": 2, "starting": 0, "trouble": None}

    def pool(self) -> dict[str, Any] | None:
        lane = {"gpu": 0, "node": "here", "device": "a GPU", "state": "busy", "job": "secret", "speed": 1.0}
        return {"lanes": [lane], "jobs": [{"job": "secret"}]}


def main() -> None:
    """Serve until it is ended."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("port", type=int)
    parser.add_argument("--tokens", default="")
    parser.add_argument("--max-upload", type=int, default=2 << 30)
    parser.add_argument("--max-queued", type=int, default=1000)
    parser.add_argument("--roots", default="")
    options = parser.parse_args()
    settings = ServiceSettings(
        data_dir=options.data,
        tokens=options.tokens,
        max_upload_bytes=options.max_upload,
        max_queued=options.max_queued,
        input_roots=options.roots,
    )
    uvicorn.run(create_app(settings, NoRenderers()), host="127.0.0.1", port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
