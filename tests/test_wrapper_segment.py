"""A segment in the wrapper family, on a stand-in that counts frames and samples as the wrapper's nodes do.

The nodes themselves ran nowhere here: this checks our side of what docs/workflows.md says of them.
"""

from __future__ import annotations

import io
import threading
import wave
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageSequence

from pipeline.comfy_answers import OutputFile, Outputs
from pipeline.comfy_client import ComfyClient
from pipeline.comfy_events import PromptProgress
from pipeline.errors import GraphError, JobCancelled, WorkflowError
from pipeline.frames import read_stack
from pipeline.messages import Recipe, SegmentProgress, SegmentTask, WindowCheckpoint
from pipeline.segment_files import SegmentFiles
from pipeline.workflow import Graph, load
from pipeline.workflow_family import workflow_for
from pipeline.wrapper_segment import EXTRA_SAMPLES, render_segment, rendered_frames, window_count

SIZE = 32
STEPS = 4


def frames_heard(samples: int, num_frames: int) -> int:
    """Frames of speech that MultiTalkWav2VecEmbeds finds in a track: its own arithmetic, in floats."""
    return int(min(samples, int(num_frames / 25.0 * 16_000)) / 16_000 * 25.0)


def frames_given(heard: int) -> int:
    """Frames that come out of the loop over windows of 81 that repeat 9."""
    made, end = 81, 81
    while end < heard:
        made, end = made + 72, end + 72
    return made


def wav(samples: int, value: int = 0) -> bytes:
    target = io.BytesIO()
    with wave.open(target, "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(np.full(samples, value, np.int16).tobytes())
    return target.getvalue()


def png(value: int, width: int = SIZE) -> bytes:
    target = io.BytesIO()
    Image.new("RGB", (width, SIZE), (value, value, value)).save(target, format="PNG")
    return target.getvalue()


class Wrapper(ComfyClient):
    """An engine with the wrapper's nodes: every frame's grey level is its number, modulo 256."""

    def __init__(self, lost: int = 0) -> None:
        super().__init__("http://127.0.0.1:9")
        self.files: dict[str, bytes] = {}
        self.graph: Graph = {}
        self.lost = lost

    def node(self, kind: str) -> dict[str, Any]:
        return next(node["inputs"] for node in self.graph.values() if node["class_type"] == kind)

    def behind(self, kind: str, name: str) -> bytes:
        """The uploaded file that an input leads to."""
        source = self.graph[self.node(kind)[name][0]]["inputs"]
        while "image" in source and isinstance(source["image"], list):
            source = self.graph[source["image"][0]]["inputs"]
        return self.files[source.get("image") or source["audio"]]

    def upload(self, name: str, data: bytes, subfolder: str = "") -> str:
        self.files[name] = data
        return name

    def run(
        self,
        graph: Graph,
        *,
        on_progress: Callable[[PromptProgress], None] | None = None,
        cancelled: threading.Event,
        silent_after: float,
        job: str = "",
    ) -> Outputs:
        self.graph = graph
        with wave.open(io.BytesIO(self.behind("MultiTalkWav2VecEmbeds", "audio_1"))) as speech:
            heard = frames_heard(speech.getnframes(), self.node("MultiTalkWav2VecEmbeds")["num_frames"])
        made = frames_given(heard)
        steps = self.node("WanVideoSampler")["steps"] * ((made - 9) // 72)
        assert on_progress is not None
        sampler = next(key for key, node in graph.items() if node["class_type"] == "WanVideoSampler")
        estimate = self.node("WanVideoSampler")["steps"] * (1 if heard <= 81 else heard // 72 + 1)
        on_progress(PromptProgress("p", "running", node="6", value=3, maximum=3))
        on_progress(PromptProgress("p", "running", node=sampler, value=700, maximum=1109))
        for value in range(1, steps + 1):
            on_progress(PromptProgress("p", "running", node=sampler, value=value, maximum=estimate))
        saver = next(key for key, node in graph.items() if node["class_type"] == "SaveImage")
        on_progress(PromptProgress("p", "success", done=frozenset(graph), ended=True))
        names = [f"{number:05d}.png" for number in range(made - self.lost)]
        return {saver: [OutputFile(filename=name, subfolder="", type="output") for name in names]}

    def view(self, file: OutputFile) -> bytes:
        return png(int(file["filename"][:5]) % 256)


def task_of(mode: str = "image", people: str = "single", **changes: object) -> SegmentTask:
    file, names = workflow_for("wrapper", mode, people)
    recipe = Recipe("job", load(file, names), "she | he", 7, STEPS, SIZE, SIZE, 9)
    fields = {
        "recipe": recipe,
        "index": 2,
        "frames": 150,
        "windows": (81, 81),
        "head": 150,  # lossless, so that every frame can be looked at
        "tail": 0,
        "portraits": (png(10),),
        "speech": (wav(153 * 640),),
        **changes,
    }
    return SegmentTask(**fields)  # type: ignore[arg-type]


def run(
    engine: Wrapper, task: SegmentTask, folder: Path, cancelled: threading.Event | None = None
) -> tuple[np.ndarray, list[SegmentProgress], list[OutputFile]]:
    seen: list[SegmentProgress] = []
    gone: list[OutputFile] = []
    windows: list[WindowCheckpoint] = []
    seconds, nodes = render_segment(
        task,
        engine,
        folder / "segment",
        report=seen.append,
        discard=gone.extend,
        cancelled=cancelled or threading.Event(),
        silent_after=5,
        keep=windows.append,
    )
    [whole] = windows
    files = SegmentFiles.store(folder / "whole", whole.files)
    assert len(seconds) == seen[-1].windows_done
    assert nodes["WanVideoSampler"].ran == 1
    return read_stack(files.path("head"), task.head), seen, gone


def test_frames_and_samples_are_counted_as_the_nodes_do() -> None:
    """For every number of windows: as many frames heard as made, and wav2vec's 2N - 1 features of them."""
    naive = []
    for windows in range(1, 138):
        total = rendered_frames(windows, 81, 9)
        samples = 640 * total + EXTRA_SAMPLES
        assert frames_heard(samples, total + 1) == frames_given(total) == total
        assert (samples - 400) // 320 + 1 == 2 * total - 1
        assert window_count(total, 81, 9) == windows == window_count(total - 71, 81, 9)
        if frames_heard(640 * total, total) != total:
            naive.append(total)
    assert 945 in naive  # what the exact length in samples would do


def test_a_segment_is_one_prompt(tmp_path: Path) -> None:
    """Its frames arrive in order, the surplus is dropped, and nothing is left in the engine."""
    engine = Wrapper()
    frames, seen, gone = run(engine, task_of(), tmp_path)
    assert frames.mean(axis=(1, 2, 3)).tolist() == list(range(150))
    assert [file["filename"] for file in gone] == [f"{number:05d}.png" for number in range(153)]
    assert engine.node("MultiTalkWav2VecEmbeds")["num_frames"] == 154
    with wave.open(io.BytesIO(engine.behind("MultiTalkWav2VecEmbeds", "audio_1"))) as speech:
        assert speech.getnframes() == 153 * 640 + EXTRA_SAMPLES
    assert engine.node("WanVideoTextEncodeCached")["positive_prompt"] == "she , he"
    places = [(progress.windows_done, progress.fraction) for progress in seen]
    assert places == sorted(places)  # the other counters of the engine are not shown
    assert places == [(0, 0), *((0, n / 4) for n in (1, 2, 3)), *((1, n / 4) for n in range(5)), (2, 0)]


def test_segments_differ_in_their_noise_and_attempts_do_not(tmp_path: Path) -> None:
    """The sampler's seed depends on job and segment only; yet no attempt takes frames from the cache."""
    first, again, other = Wrapper(), Wrapper(), Wrapper()
    run(first, task_of(frames=4, head=4), tmp_path / "a")
    run(again, task_of(frames=4, head=4, attempt=2), tmp_path / "b")
    run(other, task_of(frames=4, head=4, index=3), tmp_path / "c")
    seeds = [engine.node("WanVideoSampler")["seed"] for engine in (first, again, other)]
    assert seeds[0] == seeds[1] != seeds[2]
    assert first.node("LoadAudio") != again.node("LoadAudio")


def test_video_gives_each_window_its_picture(tmp_path: Path) -> None:
    """One batch of pictures in the windows' order, equal neighbours kept; the encoder sees the first."""
    engine = Wrapper()
    task = task_of("video", portraits=tuple(map(png, (10, 10, 90))), frames=200, head=200)
    run(engine, task, tmp_path)
    with Image.open(io.BytesIO(engine.behind("WanVideoImageToVideoMultiTalk", "start_image"))) as batch:
        greys = [page.convert("L").getpixel((0, 0)) for page in ImageSequence.Iterator(batch)]
    assert greys == [10, 10, 90]
    assert engine.node("ImageFromBatch")["batch_index"] == 0


def test_two_speakers_and_nobody(tmp_path: Path) -> None:
    """Three masks in one file: speaker 1, speaker 2, and the rest; both tracks are of one length."""
    engine = Wrapper()
    left = np.zeros((SIZE, SIZE, 3), np.uint8)
    left[:, :8] = 255
    right = left[:, ::-1]
    masks = []
    for pixels in (left, right):
        target = io.BytesIO()
        Image.fromarray(pixels).save(target, format="PNG")
        masks.append(target.getvalue())
    task = task_of(people="multi", speech_2=(wav(640),), masks=tuple(masks), frames=82, head=82)
    run(engine, task, tmp_path)
    with Image.open(io.BytesIO(engine.behind("MultiTalkWav2VecEmbeds", "ref_target_masks"))) as batch:
        pages = [np.asarray(page.convert("RGB")) for page in ImageSequence.Iterator(batch)]
    assert np.array_equal(pages[0], left)
    assert np.array_equal(pages[1], right)
    assert np.array_equal(pages[2], 255 - left - right)
    with wave.open(io.BytesIO(engine.behind("MultiTalkWav2VecEmbeds", "audio_2"))) as speech:
        assert speech.getnframes() == 153 * 640 + EXTRA_SAMPLES


def test_another_number_of_frames_is_an_error(tmp_path: Path) -> None:
    """A node that counts differently than we do must not shift the sound."""
    with pytest.raises(GraphError, match="gave 152 frames instead of 153"):
        run(Wrapper(lost=1), task_of(), tmp_path)


def test_cancelling_ends_the_fetching(tmp_path: Path) -> None:
    """Also when the engine has finished already."""
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(JobCancelled):
        run(Wrapper(), task_of(), tmp_path, cancelled)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"motion_frame": 9', '"motion_frame": 25', "repeats 25 frames, the plan 9"),
        ('"frame_window_size": 81', '"frame_window_size": 80', "windows of 80 frames"),
        ('"frame_window_size": 81', '"frame_window_size": ["5", 0]', "must be numbers"),
    ],
)
def test_windows_of_another_kind_are_refused(tmp_path: Path, old: str, new: str, said: str) -> None:
    """The file says how long windows are, and the plan has to agree."""
    path = tmp_path / "mine.json"
    source = Path(__file__).resolve().parent.parent / "workflows" / "wrapper_image_single.json"
    path.write_text(source.read_text().replace(old, new))
    recipe = Recipe("job", load(path, workflow_for("wrapper", "image", "single")[1]), "", 7, 4, SIZE, SIZE, 9)
    with pytest.raises(WorkflowError, match=said):
        run(Wrapper(), task_of(recipe=recipe), tmp_path)


def test_a_drift_over_all_windows_is_taken_out(tmp_path: Path) -> None:
    """The node hands on its own frames, so a drift adds up; nine levels after two windows, one is left."""

    class Drifting(Wrapper):
        def view(self, file: OutputFile) -> bytes:
            return png(100 + round(int(file["filename"][:5]) * 0.06))

    task = task_of(portraits=(png(100),))
    plain, _, _ = run(Drifting(), task, tmp_path / "a")
    matched = replace(task, recipe=replace(task.recipe, color_match=True))
    frames, _, gone = run(Drifting(), matched, tmp_path / "b")
    assert plain[-1].mean() == 109
    assert frames.mean((1, 2, 3)).max() < 102
    assert len(gone) == 153  # nothing stays in the engine
