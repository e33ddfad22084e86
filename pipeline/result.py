"""What a finished job gives: the object of the API, of ``--json`` and of ``result.json``."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.messages import NodeRuns
from pipeline.seam import SeamReport
from pipeline.timeline import FPS


@dataclass(frozen=True, slots=True)
class RenderResult:
    """What a job gives; ``as_dict`` is the object of the API and of ``--json``."""

    job: str
    video_path: str
    engine: str
    gpu_count: int
    segments_processed: int
    frames: int
    width: int
    height: int
    seams: tuple[SeamReport, ...]
    timings: dict[str, float] = field(default_factory=dict)
    nodes: dict[str, NodeRuns] = field(default_factory=dict)
    """How often the nodes of each class ran for the segments of this start."""
    fps: int = FPS

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        plural = "" if self.gpu_count == 1 else "s"
        return {
            "success": True,
            "video_path": self.video_path,
            "gpu_count": self.gpu_count,
            "segments_processed": self.segments_processed,
            "message": f"video created successfully using {self.gpu_count} GPU{plural}"
            + (" (draft engine: a preview, not the model)" if self.engine == "draft" else ""),
            "engine": self.engine,
            "job": self.job,
            "frames": self.frames,
            "fps": self.fps,
            "duration": self.frames / self.fps,
            "width": self.width,
            "height": self.height,
            "seams": [asdict(seam) for seam in self.seams],
            "nodes": {name: asdict(runs) for name, runs in sorted(self.nodes.items())},
            "timings": {name: round(seconds, 3) for name, seconds in self.timings.items()},
        }
