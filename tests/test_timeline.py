"""The timeline of a job: recorded while it renders, kept across its starts, shown in four formats."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from PIL import Image

from actors.cli import main
from pipeline.engine import RunningEngine, choose_engine, running_engine
from pipeline.errors import InvalidRequest, JobCancelled, RendererLost
from pipeline.job import JobDirectory
from pipeline.job_timeline import JobTimeline, Span, chrome_trace, numbers
from pipeline.messages import Recipe, RenderedSegment, SegmentProgress, SegmentTask
from pipeline.plan import Plan, Segment
from pipeline.progress import JobProgress
from pipeline.render import render_video
from pipeline.request import RenderRequest
from pipeline.settings import Settings
from pipeline.timeline_recorder import recording, stored_timeline
from pipeline.workflow import load
from tests.engine_renderers import EngineRenderers, engine_renderers

FRAMES = 110
PLAN = Plan(
    FRAMES,
    tuple(Segment(i, start, start + 54, (57,), i) for i, start in enumerate((0, 28, 56))),
    81,
    9,
)
"""Three segments of a window each, overlaps of 26."""

TRACE_EVENT = {
    "type": "object",
    "required": ["name", "ph", "pid", "tid"],
    "properties": {
        "name": {"type": "string", "minLength": 1},
        "cat": {"type": "string"},
        "ph": {"enum": ["X", "M"]},
        "ts": {"type": "number", "minimum": 0},
        "dur": {"type": "number", "minimum": 0},
        "pid": {"type": "integer", "minimum": 0},
        "tid": {"type": "integer", "minimum": 0},
        "args": {"type": "object"},
    },
    "additionalProperties": False,
    "if": {"properties": {"ph": {"const": "X"}}},
    "then": {"required": ["ts", "dur"]},
    "else": {
        "properties": {
            "name": {"enum": ["process_name", "thread_name"]},
            "args": {"required": ["name"], "properties": {"name": {"type": "string"}}},
        },
        "required": ["args"],
    },
}
TRACE = {
    "type": "object",
    "required": ["traceEvents"],
    "properties": {
        "traceEvents": {"type": "array", "items": TRACE_EVENT},
        "displayTimeUnit": {"enum": ["ms", "ns"]},
    },
}
"""Complete and metadata events of the Trace Event Format, as its document has them (JSON object format)."""


class LosesOne(EngineRenderers):
    """Whose lane 1 is lost with the first task that it gets."""

    lost = False

    def submit(self, task: SegmentTask, lane: int) -> Future[RenderedSegment]:
        if lane == 1 and not self.lost:
            self.lost = True
            work: Future[RenderedSegment] = Future()
            work.set_exception(RendererLost(task.index, "it was killed"))
            return work
        return super().submit(task, lane)


def losing_one(url: str) -> Callable[[], AbstractContextManager[EngineRenderers]]:
    @contextmanager
    def opened() -> Iterator[EngineRenderers]:
        with engine_renderers(url)() as plain:
            yield LosesOne(url, 2, plain._threads)

    return opened


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningEngine]:
    settings = Settings(engine="draft", scratch_dir=tmp_path_factory.mktemp("scratch"), ports="18470-18489")
    with running_engine(choose_engine(settings), settings) as running:
        yield running


@pytest.fixture(scope="module")
def job(
    engine: RunningEngine,
    portrait: Path,
    speech_of: Callable[[int], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> JobDirectory:
    """A job whose first start loses a lane and is cancelled, and whose second one finishes."""
    folder = tmp_path_factory.mktemp("made")
    job = JobDirectory(folder / "job", "talk")
    request = RenderRequest.checked(image=portrait, audio=speech_of(FRAMES), width=128, height=128)

    def cancel_soon(progress: JobProgress) -> None:
        if any(state.stage == "finished" for state in progress.states):
            raise JobCancelled("talk")

    def render(
        renderers: Callable[[], AbstractContextManager[EngineRenderers]],
        on_progress: Callable[[JobProgress], None],
    ) -> None:
        render_video(
            request,
            job,
            "draft",
            load("talk_single"),
            renderers,
            folder / "talk.mp4",
            max_attempts=2,
            on_progress=on_progress,
            make_plan=lambda _frames, _lanes: PLAN,
        )

    with pytest.raises(JobCancelled):
        render(losing_one(engine.url), cancel_soon)
    assert stored_timeline(job).starts == 1
    render(engine_renderers(engine.url), lambda _: None)
    return job


def test_every_start_of_a_job_is_recorded(job: JobDirectory) -> None:
    """Both starts, all segments with their windows in them, what was lost, the steps and the seams."""
    timeline = stored_timeline(job)
    assert (timeline.job, timeline.starts) == ("talk", 2)
    runs = [span for span in timeline.spans if span.kind == "segment"]
    assert {span.segment for span in runs if span.outcome == "done"} == {0, 1, 2}
    assert {span.segment for span in runs if span.start == 1} < {0, 1, 2}  # the first start stored some
    assert [(span.gpu, span.start) for span in runs if span.outcome == "lost"] == [(1, 0)]
    for start in (0, 1):
        kinds = {span.kind for span in timeline.spans if span.start == start}
        assert {"preparing", "starting", "segment", "window"} <= kinds
    assert {span.number for span in timeline.spans if span.kind == "seam"} == {0, 1}  # one may be tried twice
    (joining,) = (span for span in timeline.spans if span.kind == "joining")
    assert (joining.start, joining.outcome) == (1, "done")
    for seam in (span for span in timeline.spans if span.kind == "seam"):
        assert seam.begin < seam.end <= joining.end  # they are made while others render
    for gpu in (0, 1):
        lane = sorted((span.begin, span.end) for span in runs if span.gpu == gpu)
        assert all(before[1] <= after[0] for before, after in pairwise(lane))
    for window in (span for span in timeline.spans if span.kind == "window"):
        assert window.seconds > 0
        assert any(
            run.segment == window.segment and run.begin <= window.begin and window.end <= run.end
            for run in runs
        )


def test_the_result_has_the_main_numbers(job: JobDirectory) -> None:
    """Those of the last start, as they can be counted from the spans."""
    timings = json.loads(job.result.read_text())["timings"]
    last = [span for span in stored_timeline(job).spans if span.start == 1]
    windows = sum(span.seconds for span in last if span.kind == "window")
    assert timings["gpu_seconds"] == pytest.approx(windows, abs=0.01)
    assert 0 < timings["gpu_busy_share"] <= 1
    assert timings["waiting_seconds"] < timings["total_seconds"]
    joining = next(span for span in last if span.kind == "joining")
    assert timings["join_seconds"] > joining.seconds - 0.2  # and the wait for seams that were begun before


def test_the_timeline_reads_back_as_it_was(job: JobDirectory) -> None:
    """JSON, both clocks: ``at`` is ``begin`` less the job's first moment."""
    told = json.loads(job.timeline.read_text())
    timeline = JobTimeline.from_json(told)
    assert timeline.to_json() == told
    for entry in told["spans"]:
        assert entry["at"] == pytest.approx(entry["begin"] - told["began"], abs=0.002)
        assert entry["seconds"] == pytest.approx(entry["end"] - entry["begin"], abs=0.002)
    assert told["began"] > 1.7e9  # seconds since 1970
    for damage in ({"version": 9}, {"spans": [{"kind": "nap", "begin": 1, "end": 2}]}, {"spans": 3}):
        with pytest.raises(InvalidRequest, match="timeline"):
            JobTimeline.from_json({**told, **damage})


def test_a_recorder_knows_what_it_was_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Windows of a lost run as far as they were seen, waiting between runs, what is still in work."""
    job = JobDirectory(tmp_path, "talk")
    job.timeline.write_text("{")
    with recording(job) as recorder:
        assert "begun anew" in caplog.text
        recorder.stage("waiting")
        lost, kept = Future[RenderedSegment](), Future[RenderedSegment]()
        task = SegmentTask(load_recipe(), 5, 81, (81, 81), 0, 0, (), (), first=3)
        recorder.sent(task, 1, lost)
        recorder.seen([SegmentProgress(5, 4, 0.5, (0.01,))])
        lost.set_exception(RendererLost(5, "it was killed"))
        recorder.sent(replace(task, attempt=2), 0, kept)
        stored = {span.outcome for span in recorder.timeline().spans}
        assert stored == {"done", "lost", "open"}
        kept.set_exception(JobCancelled("talk"))
        recorder.stage(None)
    spans = stored_timeline(job).spans
    assert [span.kind for span in spans] == ["waiting", "segment", "window", "waiting", "segment", "waiting"]
    assert [(span.number, span.gpu) for span in spans if span.kind == "window"] == [(3, 1)]
    assert [span.outcome for span in spans if span.kind == "segment"] == ["lost", "cancelled"]
    assert all(before.end <= after.begin for before, after in pairwise(spans) if after.kind == "waiting")


def load_recipe() -> Recipe:
    return Recipe("talk", load("talk_single"), "", 0, 4, 64, 64, 9)


def lane(job: str, *runs: tuple[int, float, float], gpu: int = 0) -> JobTimeline:
    """Segments ``(index, begin, end)`` of one window each on a GPU, without anything between them."""
    return JobTimeline(
        job,
        tuple(
            Span(kind, begin, end, gpu=gpu, node="n", segment=index, number=0, attempt=1)
            for index, begin, end in runs
            for kind in ("segment", "window")
        ),
    )


def test_busy_counts_all_gpus_that_several_jobs_shared() -> None:
    """Two jobs on two GPUs: one has a gap of 5 in 20 seconds; a later start has its own time."""
    jobs = [lane("a", (0, 100, 110), (1, 110, 120)), lane("b", (0, 100, 105), (1, 110, 120), gpu=1)]
    assert numbers(jobs)["gpu_busy_share"] == pytest.approx(35 / 40)
    again = Span("segment", 5000, 5010, gpu=0, node="n", segment=2, attempt=1, start=1)
    resumed = JobTimeline("a", (*jobs[0].spans, again))
    assert numbers([resumed])["render_seconds"] == 30
    assert numbers([resumed], start=1)["gpu_busy_share"] == 0


def test_windows_of_a_lost_run_are_not_lost() -> None:
    """Ten seconds on a GPU, of which one window of four was kept: six are lost."""
    run = Span("segment", 0, 10, gpu=0, segment=0, attempt=1, outcome="lost")
    window = Span("window", 0, 4, gpu=0, segment=0, attempt=1, number=0)
    assert numbers([JobTimeline("j", (run, window))])["lost_gpu_seconds"] == 6


def complete(trace: dict[str, Any]) -> list[dict[str, Any]]:
    return [event for event in trace["traceEvents"] if event["ph"] == "X"]


def check_trace(trace: dict[str, Any]) -> None:
    """By the schema; and on each thread events lie apart or in one another, as a viewer needs them."""
    jsonschema.validate(trace, TRACE)
    threads: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for event in complete(trace):
        times = (event["ts"], event["ts"] + event["dur"])
        threads.setdefault((event["pid"], event["tid"]), []).append(times)
    for times in threads.values():
        open_ends: list[int] = []
        for begin, end in sorted(times, key=lambda pair: (pair[0], -pair[1])):
            while open_ends and open_ends[-1] <= begin:
                open_ends.pop()
            assert not open_ends or end <= open_ends[-1]
            open_ends.append(end)
    named = {(event["pid"], event["tid"]) for event in trace["traceEvents"] if event["name"] == "thread_name"}
    assert set(threads) <= named


def test_the_trace_is_one_that_viewers_load(job: JobDirectory) -> None:
    """Every span is there; a lane that goes on to the next job a moment too early still nests."""
    timeline = stored_timeline(job)
    trace = chrome_trace([timeline])
    check_trace(trace)
    assert len(complete(trace)) == len(timeline.spans)
    overlapping = chrome_trace([lane("a", (0, 0, 10.004)), lane("b", (0, 10, 20))])
    check_trace(overlapping)
    assert len(complete(overlapping)) == 4


def test_the_command_writes_what_its_suffix_says(
    job: JobDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """PNG, SVG, trace and JSON; a directory and a copied file; the numbers on standard output."""
    for name in ("x.png", "x.svg", "x.trace.json", "trace.json", "x.json"):
        assert main(["timeline", str(job.path), "-o", str(tmp_path / name), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["gpus"] == 2
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.format == "PNG"
        colours = picture.convert("RGB").getcolors(1 << 24)
        assert colours is not None
        assert len(colours) > 20
    svg = ET.parse(tmp_path / "x.svg").getroot()
    titles = [element.text or "" for element in svg.iter("{http://www.w3.org/2000/svg}title")]
    for word in ("segment 2 window 0", "segment 1 (lost)", "joining", "seam 1"):
        assert any(word in title for title in titles), word
    check_trace(json.loads((tmp_path / "x.trace.json").read_text()))
    assert (tmp_path / "trace.json").read_text() == (tmp_path / "x.trace.json").read_text()
    copied = str(tmp_path / "x.json")
    assert main(["timeline", str(job.path), copied, "-o", str(tmp_path / "two.json")]) == 0
    assert len(json.loads((tmp_path / "two.json").read_text())["jobs"]) == 2
    assert "gpu_busy_share" in capsys.readouterr().out


def test_a_window_is_where_its_seconds_are(tmp_path: Path) -> None:
    """Half of the axis belongs to the one segment, half to the other, each in its colour."""
    (tmp_path / "t.json").write_text(json.dumps(lane("a", (0, 100, 110), (1, 110, 120)).to_json()))
    assert main(["timeline", str(tmp_path / "t.json"), "-o", str(tmp_path / "t.png")]) == 0
    with Image.open(tmp_path / "t.png") as picture:
        middle = picture.height - 60
        row = [picture.getpixel((x, middle)) for x in range(160, 1370, 10)]
    halves = [set(row[:55]), set(row[65:])]
    assert [len(half) for half in halves] == [1, 1]
    assert halves[0] != halves[1]


def test_what_is_wrong_is_said(job: JobDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No timeline, a broken one, another format: exit code 2, and nothing is written."""
    (tmp_path / "timeline.json").write_text("{")
    for arguments, word in (
        ([str(tmp_path / "none")], "no timeline"),
        ([str(tmp_path)], "can't be read"),
        ([str(job.path), "-o", str(tmp_path / "x.gif")], "png"),
    ):
        assert main(["timeline", *arguments]) == 2
        assert word in capsys.readouterr().err
    assert not (tmp_path / "x.gif").exists()
