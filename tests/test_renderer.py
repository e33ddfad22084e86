"""One renderer by itself: what a job that can't be rendered leaves to the next one."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from actors.renderer import Renderer
from pipeline.errors import ConfigurationError
from pipeline.settings import Settings
from pipeline.workflow import load
from pipeline.workflow_family import workflow_for
from tests.draft_process import ROOT
from tests.free_ports import free_ports
from tests.test_segment import task_of

MAIN = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pipeline.draft.__main__ import main
sys.exit(main())
"""
"""A checkout's program that is the draft engine."""


def test_a_pack_that_is_not_there_costs_nobody_the_engine(tmp_path: Path, portrait: Path) -> None:
    """A job of the wrapper family where its nodes are not installed: an error, and the engine goes on."""
    (tmp_path / "ComfyUI" / "models").mkdir(parents=True)
    (tmp_path / "ComfyUI" / "main.py").write_text(MAIN)
    settings = Settings(
        comfyui_dir=tmp_path / "ComfyUI",
        comfyui_python=Path(sys.executable),
        comfyui_args="--cpu",
        scratch_dir=tmp_path,
        ports=free_ports(5),
    )
    renderer = Renderer(0, settings)
    try:
        before = renderer.start()
        recipe = replace(task_of(portrait).recipe, workflow=load(*workflow_for("wrapper", "image", "single")))
        for lease in (1, 2):
            with pytest.raises(ConfigurationError, match="ComfyUI-WanVideoWrapper is not in"):
                renderer.render(task_of(portrait, recipe=recipe), "job", lease)
        assert renderer.trouble() is None
        assert renderer.start().engine_pid == before.engine_pid
    finally:
        renderer.stop()
