"""The draft engine speaks ComfyUI's protocol: real processes, real sockets, the recordings as oracle.

The same tests run against a real ComfyUI where one is given (``make test-comfyui``).

Where ``../shared`` holds the recordings of a real ComfyUI, messages are compared with them; the essential
sequences also stand here, so that nothing depends on the recordings being there.
"""

from __future__ import annotations

import io
import json
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import websocket
from PIL import Image

from pipeline.draft.drawing import read_stamp
from tests.comfyui_process import BOTH_ENGINES, needs_new
from tests.draft_process import (
    CAPTURES,
    ORDER,
    ROOT,
    Engine,
    Message,
    changed,
    draft_engine,
    ended,
    progressing,
    until,
    window,
)


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A draft engine, as fast as it draws, for all tests that leave it as it was."""
    with draft_engine(tmp_path_factory.mktemp("draft")) as running:
        yield running


@pytest.fixture(params=BOTH_ENGINES)
def engine(request: pytest.FixtureRequest) -> Engine:
    """The draft engine, and a real ComfyUI where one is given."""
    running: Engine = request.getfixturevalue(request.param)
    return running


@pytest.fixture(scope="module", params=BOTH_ENGINES)
def slow(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine whose sampler takes 15 seconds and more for ``LONG`` steps, if nobody interrupts it."""
    if request.param == "comfyui":
        yield request.getfixturevalue("comfyui")
        return
    with draft_engine(tmp_path_factory.mktemp("slow"), "--draft-window-seconds", "63") as running:
        yield running


LONG = 2000
"""Steps that no engine has done when a test interrupts it."""


def outline(messages: list[Message]) -> list[tuple[Any, ...]]:
    """Type, node and keys of each message; ``progress`` is left out, whose number depends on timing."""
    lines: list[tuple[Any, ...]] = []
    for message in messages:
        kind, data = message["type"], message["data"]
        if kind == "progress_state":
            lines.append((kind, tuple((node, state["state"]) for node, state in data["nodes"].items())))
        elif kind != "progress":
            lines.append((kind, data.get("node") or data.get("node_id"), tuple(sorted(data))))
    return [line for number, line in enumerate(lines) if number == 0 or line != lines[number - 1]]


def recorded(name: str) -> list[Message]:
    """Messages of a recording; skips the test where there are no recordings."""
    path = CAPTURES / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip("no recordings of a real ComfyUI here")
    return [line["msg"] for line in map(json.loads, path.read_text().splitlines()) if "msg" in line]


def test_a_prompt_sends_the_messages_of_comfyui_in_its_order(engine: Engine) -> None:
    """start, cached, per node progress_state and executing, executed for outputs, success, status, null."""
    engine.forget_all()
    messages = engine.run(window())
    kinds = [message["type"] for message in messages if not message["type"].startswith("progress")]
    assert kinds[:5] == ["status", "status", "status", "execution_start", "execution_cached"]
    assert kinds[-3:] == ["execution_success", "status", "executing"]
    order = [m["data"]["node"] for m in messages if m["type"] == "executing"]
    assert order == [*ORDER, None]
    steps = [m["data"]["value"] for m in messages if m["type"] == "progress"]
    assert steps == sorted(steps)
    assert steps[-1] == 3
    assert [
        m["data"]["status"]["exec_info"]["queue_remaining"] for m in messages if m["type"] == "status"
    ] == [
        0,
        1,
        1,
        0,
    ]
    assert messages[4]["data"]["nodes"] == []
    assert set(messages[3]["data"]) == {"prompt_id", "timestamp"}


@pytest.mark.parametrize(
    ("recording", "changes"),
    [
        ("ws_it_first", {}),
        ("ws_error_no_start_image", {"n100_start_image": None, "n900": None}),
        ("ws_features", {}),
    ],
)
def test_messages_equal_the_recordings(engine: Engine, recording: str, changes: dict[str, Any]) -> None:
    """Types, nodes, states and keys, one after the other, are those that a real ComfyUI sent."""
    wanted = [line for line in outline(recorded(recording)) if line[0] != "feature_flags"]
    engine.forget_all()
    if recording != "ws_it_first":
        engine.run(window())  # as in the recordings: what does not depend on the seed is cached
    assert outline(engine.run(window(**changes))) == wanted


def test_an_unchanged_prompt_is_answered_from_the_cache(engine: Engine) -> None:
    """All nodes cached: the old output comes again, nothing is written, only the outputs say something."""
    graph = window()
    first = engine.run(graph)
    written = sorted(engine.base.glob("output/it/*"))
    second = engine.run(graph)
    kinds = [message["type"] for message in second]
    assert set(second[4]["data"]["nodes"]) == set(graph)
    assert kinds[5:] == ["executed", "progress_state"] * 2 + ["execution_success", "status", "executing"]
    outputs = [
        {m["data"]["node"]: m["data"]["output"] for m in run if m["type"] == "executed"}
        for run in (first, second)
    ]
    assert outputs[0] == outputs[1]
    assert sorted(engine.base.glob("output/it/*")) == written


def test_the_cache_does_not_see_that_a_file_is_gone(engine: Engine) -> None:
    """The old names come again though the files were deleted; nothing is written."""
    graph = window()
    engine.run(graph)
    for path in engine.base.glob("output/it/*"):
        path.unlink()
    entry = engine.history(engine.run(graph)[-1]["data"]["prompt_id"])
    assert len(entry["outputs"]["900"]["images"]) == 17
    assert engine.get("/view", params=entry["outputs"]["900"]["images"][0]).status_code == 404
    assert list(engine.base.glob("output/it/*")) == []


def test_the_history_is_there_when_the_end_is_told(engine: Engine) -> None:
    """It may come after ``execution_success``; with ``executing`` of no node it is there."""
    graph = window()
    for _ in range(5):
        assert engine.history(engine.run(graph)[-1]["data"]["prompt_id"])["status"]["completed"]


def test_free_empties_the_cache_after_the_current_prompt(engine: Engine) -> None:
    """The next prompt after POST /free has no cached node."""
    graph = window()
    engine.run(graph)
    engine.forget_all()
    assert next(m for m in engine.run(graph) if m["type"] == "execution_cached")["data"]["nodes"] == []
    assert engine.post("/free").status_code == 500


def test_one_bad_output_of_two_is_dropped_silently(engine: Engine) -> None:
    """200 with node_errors; the good output runs to execution_success."""
    bad = {"class_type": "LoadImage", "inputs": {"image": "nope.png"}}
    preview = {"class_type": "PreviewImage", "inputs": {"images": ["950", 0]}}
    reply = engine.post("/prompt", json={"prompt": window(n950=bad, n951=preview)})
    assert reply.status_code == 200
    assert reply.json()["node_errors"]["950"]["dependent_outputs"] == ["951"]
    kinds = [message["type"] for message in engine.run(window(n950=bad, n951=preview))]
    assert "execution_success" in kinds


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"n100_mode": None}, "TypeError", "missing 1 required positional argument: 'mode'"),
        ({"n100_mode": "choir"}, "TypeError", "missing 1 required positional argument: 'mode'"),
        (
            {"n100_mode": "two_speakers", "n100_mode.audio_encoder_output_2": ["8", 0]},
            "ValueError",
            "Masks must be provided if two audio encoder outputs are used.",
        ),
        ({"n100_length": 18}, "einops.EinopsError", "can't divide axis of length 17 in chunks of 4"),
        ({"n100_start_image": None}, "UnboundLocalError", "concat_latent_image"),
        ({"n100_previous_frames": ["6", 0]}, "ValueError", "Not enough previous frames provided.\n"),
        ({"n101_cfg": 2.0}, "RuntimeError", "is invalid"),
        ({"n900_filename_prefix": "../out"}, "Exception", "outside the output folder is not allowed"),
    ],
)
def test_what_validation_lets_pass_fails_when_it_runs(
    engine: Engine, changes: dict[str, Any], kind: str, message: str
) -> None:
    """execution_error with ComfyUI's type and words; history says error and keeps the message last."""
    graph = window(**changes)
    error = next(m["data"] for m in engine.run(graph) if m["type"] == "execution_error")
    assert (error["exception_type"], message in error["exception_message"]) == (kind, True)
    assert set(error["current_outputs"]) == set(graph)
    status = engine.history(error["prompt_id"])["status"]
    assert (status["status_str"], status["completed"], status["messages"][-1]) == (
        "error",
        False,
        ["execution_error", error],
    )


def test_two_speakers_without_a_second_speech_are_one(engine: Engine) -> None:
    """No error: the graph's author is not told that an input is missing."""
    kinds = [message["type"] for message in engine.run(window(n100_mode="two_speakers"))]
    assert "execution_success" in kinds


def test_history_holds_what_comfyuis_does(engine: Engine) -> None:
    """prompt, outputs, status and meta; written when execution_success has been sent, {} before."""
    graph, prompt_id = window(), str(uuid.uuid4())
    assert engine.get(f"/history/{prompt_id}").json() == {}
    messages = engine.run(graph, prompt_id=prompt_id)
    entry = engine.history(prompt_id)
    number, own_id, own_graph, extra, outputs = entry["prompt"]
    assert (own_id, own_graph, sorted(outputs)) == (prompt_id, graph, ["900", "902"])
    assert set(extra) == {"client_id", "create_time"}
    assert entry["status"]["messages"] == [
        [m["type"], m["data"]] for m in messages if m["type"].startswith("execution_")
    ]
    stem = graph["902"]["inputs"]["filename_prefix"].removeprefix("it/").removesuffix("_v")
    saved = {"filename": f"{stem}_v_00001_.mp4", "subfolder": "it", "type": "output"}
    assert entry["outputs"]["902"] == {"images": [saved], "animated": [True]}
    assert [image["filename"] for image in entry["outputs"]["900"]["images"]][::16] == [
        f"{stem}_f_00001_.png",
        f"{stem}_f_00017_.png",
    ]
    assert entry["meta"]["900"] == {
        "node_id": "900",
        "display_node": "900",
        "parent_node": None,
        "real_node_id": "900",
    }
    assert prompt_id in engine.get("/api/history").json()
    assert number == engine.post("/prompt", json={"prompt": graph}).json()["number"] - 1


def test_interrupt_stops_the_prompt_that_is_meant(slow: Engine) -> None:
    """Another prompt's id changes nothing; the right one ends in execution_interrupted between two steps."""
    listener = slow.listen("me")
    prompt_id = slow.submit(window(n101_steps=LONG), client_id="me")
    until(listener, progressing)
    slow.post("/interrupt", json={"prompt_id": str(uuid.uuid4())})
    until(listener, progressing)
    assert slow.post("/interrupt", json={"prompt_id": prompt_id}).text == ""
    messages = [
        m for m in until(listener, lambda m: ended(m, prompt_id)) if not m["type"].startswith("progress")
    ]
    assert [m["type"] for m in messages] == ["execution_interrupted", "status", "executing"]
    assert set(messages[0]["data"]) == {"prompt_id", "node_id", "node_type", "executed", "timestamp"}
    assert (messages[0]["data"]["node_id"], messages[0]["data"]["node_type"]) == ("101", "KSampler")
    status = slow.history(prompt_id)["status"]
    assert (status["status_str"], status["messages"][-1][0]) == ("error", "execution_interrupted")
    listener.close()


def test_the_queue_can_be_seen_ordered_and_emptied(slow: Engine) -> None:
    """The next one first, deleted ones vanish, a running one can't be deleted; all while drawing."""
    listener = slow.listen("q")
    running = slow.submit(window(n101_steps=LONG), client_id="q")
    until(listener, progressing)
    late, front = slow.submit(window(), client_id="q"), slow.submit(window(), client_id="q", front=True)
    first = slow.submit(window(), client_id="q", number=-1000)
    queue = slow.get("/queue").json()
    assert [item[1] for item in queue["queue_running"]] == [running]
    assert queue["queue_pending"][0][1] == first
    assert [item[1] for item in sorted(queue["queue_pending"])] == [first, front, late]
    assert slow.get("/prompt").json() == {"exec_info": {"queue_remaining": 4}}
    assert slow.post("/queue", json={"delete": [front, running]}).status_code == 200
    assert slow.get("/prompt").json() == {"exec_info": {"queue_remaining": 3}}
    slow.post("/queue", json={"clear": True})
    slow.post("/interrupt", json={"prompt_id": running})
    until(listener, lambda m: ended(m, running))
    assert slow.get("/queue").json() == {"queue_running": [], "queue_pending": []}
    assert slow.get(f"/history/{front}").json() == {}
    listener.close()


def test_a_job_is_cancelled_by_its_id(slow: Engine) -> None:
    """Pending or running; a second time there is nothing to cancel."""
    needs_new(slow, "it has no such route")
    listener = slow.listen("j")
    running = slow.submit(window(n101_steps=LONG), client_id="j")
    until(listener, progressing)
    late = slow.submit(window(), client_id="j")
    assert slow.post(f"/api/jobs/{late}/cancel").json() == {"cancelled": True}
    assert slow.post(f"/api/jobs/{late}/cancel").json() == {"cancelled": False}
    assert slow.get(f"/api/jobs/{late}").status_code == 404
    assert slow.post(f"/api/jobs/{running}/cancel").json() == {"cancelled": True}
    until(listener, lambda m: ended(m, running))
    assert slow.get("/queue").json() == {"queue_running": [], "queue_pending": []}
    listener.close()


def test_a_reconnected_client_is_told_where_its_prompt_stands(slow: Engine) -> None:
    """status, then executing without a prompt id, then the stream goes on."""
    slow.post("/interrupt")
    listener = slow.listen("back")
    prompt_id = slow.submit(window(n101_steps=LONG), client_id="back")
    until(listener, progressing)
    listener.close()
    listener = slow.listen("back")
    messages = [json.loads(listener.recv()) for _ in range(2)]
    assert [m["type"] for m in messages] == ["status", "executing"]
    assert messages[1]["data"] == {"node": "101"}
    slow.post("/interrupt")
    until(listener, lambda m: ended(m, prompt_id))
    listener.close()


def test_two_sockets_of_one_client_fail_as_in_comfyui(engine: Engine) -> None:
    """Only the newer one is served; when the older closes, the newer goes silent though it is open."""
    old = engine.listen("twin")
    new = engine.listen("twin")
    prompt_id = engine.submit(window(), client_id="twin")
    until(new, lambda m: ended(m, prompt_id))
    assert json.loads(old.recv())["type"] == "status"
    old.settimeout(0.2)
    with pytest.raises(websocket.WebSocketTimeoutException):
        old.recv()
    old.close()
    engine.run(window())
    new.settimeout(0.2)
    with pytest.raises(websocket.WebSocketTimeoutException):
        new.recv()
    new.close()


def test_without_a_client_id_everybody_hears_the_progress_only(engine: Engine) -> None:
    """progress and progress_state go to all sockets, the messages of a client to none."""
    listener = engine.listen("other")
    prompt_id = engine.submit(window())
    messages = until(
        listener,
        lambda m: (
            m["type"] == "status"
            and m["data"]["status"]["exec_info"]["queue_remaining"] == 0
            and "sid" not in m["data"]
        ),
    )
    assert {m["type"] for m in messages} == {"status", "progress", "progress_state"}
    assert engine.history(prompt_id)["status"]["completed"]
    listener.close()


def test_feature_flags_are_answered(engine: Engine) -> None:
    """The first message of a client may be its feature flags; the server sends its own."""
    listener = engine.listen()
    listener.send(json.dumps({"type": "feature_flags", "data": {"supports_preview_metadata": True}}))
    reply = until(listener, lambda m: m["type"] == "feature_flags")[-1]
    assert reply["data"]["max_upload_size"] == 100 * 1024 * 1024
    listener.close()


def test_the_production_workflow_renders_a_chain_on_the_draft(draft: Engine) -> None:
    """The first window is the portrait onward; the second goes on from a TIFF of the last nine frames."""
    graph = json.loads((ROOT / "workflows" / "image_single.json").read_text())
    by_kind = {node["class_type"]: node["inputs"] for node in graph.values()}
    by_kind["WanInfiniteTalkToVideo"] |= {"width": 64, "height": 96, "length": 17}
    by_kind["LoadAudio"]["audio"] = "speech1.wav"
    slots = {node["_meta"]["title"]: key for key, node in graph.items()}
    graph[slots["slot: portrait=image"]]["inputs"]["image"] = "face.png"
    chained = changed(graph, {f"n{slots['slot: motion=image']}_image": "motion.tif"})
    first = changed(graph, {f"n{slots['slot: motion=image']}": None})
    talk = next(node for node in first.values() if node["class_type"] == "WanInfiniteTalkToVideo")
    del talk["inputs"]["previous_frames"]
    stamps = []
    for part, count in ((first, 17), (chained, 8)):
        entry = draft.history(draft.run(part)[-1]["data"]["prompt_id"])
        (images,) = (output["images"] for output in entry["outputs"].values())
        pages = [Image.open(io.BytesIO(draft.get("/view", params=image).content)) for image in images]
        assert len(pages) == count
        pages[-9:][0].save(
            draft.base / "input" / "motion.tif",
            save_all=True,
            append_images=pages[-8:],
            compression="tiff_deflate",
        )
        stamps += [read_stamp(np.asarray(page)) for page in pages]
    assert [stamp.frame if stamp else None for stamp in stamps] == list(range(25))
