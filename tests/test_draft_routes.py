"""The draft engine's routes: what it refuses and how, files up and down, schemas, all as in ComfyUI.

The same tests run against a real ComfyUI where one is given (``make test-comfyui``).
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.comfyui_process import BOTH_ENGINES, needs_new
from tests.draft_process import (
    CAPTURES,
    ROOT,
    Engine,
    draft_engine,
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


BAD = [
    ("prompt_missing_input", {"n101_seed": None}, "101", "required_input_missing", "seed"),
    (
        "prompt_missing_file_image",
        {"n6_image": "nope.png"},
        "6",
        "custom_validation_failed",
        "image - Invalid image file: nope.png",
    ),
    (
        "",
        {"n6_image": "../face.png"},
        "6",
        "custom_validation_failed",
        "image - Invalid image file: ../face.png",
    ),
    ("", {"n7_audio": "nope.wav"}, "7", "custom_validation_failed", "audio - Invalid audio file: nope.wav"),
    ("", {"n100_length": 0}, "100", "value_smaller_than_min", "length"),
    ("", {"n100_motion_frame_count": 99}, "100", "value_bigger_than_max", "motion_frame_count"),
    (
        "",
        {"n101_steps": "many"},
        "101",
        "invalid_input_type",
        "steps, many, invalid literal for int() with base 10: 'many'",
    ),
    (
        "prompt_bad_link_type",
        {"n102_samples": ["6", 0]},
        "102",
        "return_type_mismatch",
        "samples, received_type(IMAGE) mismatch input_type(LATENT)",
    ),
    ("", {"n100_model": ["77", 0]}, "100", "exception_during_inner_validation", "'77'"),
]


@pytest.mark.parametrize(("recording", "changes", "node", "kind", "details"), BAD)
def test_an_invalid_graph_is_refused_in_comfyuis_words(
    engine: Engine, recording: str, changes: dict[str, Any], node: str, kind: str, details: str
) -> None:
    """400 with the node, the kind of error and its details."""
    reply = engine.post("/prompt", json={"prompt": window(n900=None, **changes)})
    body = reply.json()
    assert reply.status_code == 400
    assert body["error"] == {
        "type": "prompt_outputs_failed_validation",
        "message": "Prompt outputs failed validation",
        "details": "",
        "extra_info": {},
    }
    entry = body["node_errors"][node]
    assert [(error["type"], error["details"]) for error in entry["errors"]] == [(kind, details)]
    assert entry["dependent_outputs"] == ["902"]
    path = CAPTURES / f"{recording}.json"
    if recording and path.is_file():
        wanted = json.loads(path.read_text())["body"]
        for answer in (wanted, body):  # the tool tips of the editor are not repeated
            answer["node_errors"][node]["errors"][0]["extra_info"].pop("input_config", None)
        assert body == wanted


def test_a_model_that_is_not_there_is_refused_with_what_there_is(engine: Engine) -> None:
    """The combo holds the models' folder and what the project's own workflows name."""
    body = engine.post("/prompt", json={"prompt": window(n1_unet_name="nope.safetensors")}).json()
    error = body["node_errors"]["1"]["errors"][0]
    assert error["type"] == "value_not_in_list"
    assert "unet_name: 'nope.safetensors' not in [" in error["details"]
    names = error["extra_info"]["input_config"][0]
    workflow = json.loads((ROOT / "workflows" / "image_single.json").read_text())
    used = [node["inputs"]["unet_name"] for node in workflow.values() if node["class_type"] == "UNETLoader"]
    assert {"tiny_wan21_i2v.safetensors", *used} <= set(names)


@pytest.mark.parametrize(
    ("recording", "body", "kind"),
    [
        (
            "prompt_unknown_node",
            {"prompt": window(n102={"class_type": "NoSuchNode", "inputs": {}})},
            "missing_node_type",
        ),
        ("prompt_no_outputs", {"prompt": window(n900=None, n902=None)}, "prompt_no_outputs"),
        ("prompt_no_prompt", {"client_id": "x"}, "no_prompt"),
        (
            "prompt_bad_prompt_id",
            {"prompt": window(), "prompt_id": "5F4C0E9E-7D0F-4C3E-8A37-1C2F7F0D8A10"},
            "invalid_prompt_id",
        ),
    ],
)
def test_a_request_that_is_no_prompt_is_refused(
    engine: Engine, recording: str, body: dict[str, Any], kind: str
) -> None:
    """400 without node errors."""
    if kind == "missing_node_type":
        needs_new(engine, "it says 'invalid_prompt', and names the node in the words only")
    if kind == "invalid_prompt_id":
        needs_new(engine, "it takes any string as a prompt id")
    reply = engine.post("/prompt", json=body)
    assert (reply.status_code, reply.json()["error"]["type"], reply.json()["node_errors"]) == (400, kind, {})
    if (CAPTURES / f"{recording}.json").is_file():
        assert reply.json() == json.loads((CAPTURES / f"{recording}.json").read_text())["body"]


def test_a_body_that_is_not_json_is_an_internal_error(engine: Engine) -> None:
    """500 in plain text, as aiohttp gives it."""
    reply = engine.post("/prompt", data="not json")
    assert (reply.status_code, reply.text) == (
        500,
        "500 Internal Server Error\n\nServer got itself in trouble",
    )


def upload(engine: Engine, data: bytes, name: str = "x.bin", **form: str) -> requests.Response:
    return engine.post("/upload/image", files={"image": (name, io.BytesIO(data))}, data=form)


def test_uploads_get_the_names_that_comfyui_gives(engine: Engine) -> None:
    """Any file, any folder inside; another content under a taken name gets a number, the same does not."""
    assert upload(engine, b"one", subfolder="job1").json() == {
        "name": "x.bin",
        "subfolder": "job1",
        "type": "input",
    }
    assert upload(engine, b"two", subfolder="job1").json()["name"] == "x (1).bin"
    assert upload(engine, b"one", subfolder="job1").json()["name"] == "x.bin"
    assert upload(engine, b"new", subfolder="job1", overwrite="true").json()["name"] == "x.bin"
    assert (engine.base / "input" / "job1" / "x.bin").read_bytes() == b"new"
    assert upload(engine, b"t", type="temp").json()["type"] == "temp"
    assert (
        upload(engine, b"", subfolder="../..").status_code,
        upload(engine, b"", type="attic").status_code,
    ) == (400, 500)


def test_an_upload_over_the_limit_is_refused(tmp_path: Path) -> None:
    """413 in plain text."""
    with draft_engine(tmp_path, "--max-upload-size", "0.01") as small:
        reply = upload(small, bytes(20_000))
    assert reply.status_code == 413
    assert reply.text.startswith("Maximum request body size 10486 exceeded")


def test_files_are_served_with_ranges_and_guarded(engine: Engine) -> None:
    """206 for a range, 404 for what is not there, 400 and 403 for ways out of the folder."""
    upload(engine, bytes(range(100)), "v.mp4", subfolder="v", type="output")
    where = {"filename": "v.mp4", "subfolder": "v", "type": "output"}
    whole, part = (
        engine.get("/view", params=where),
        engine.get("/api/view", params=where, headers={"Range": "bytes=10-19"}),
    )
    assert (whole.status_code, whole.headers["Content-Type"], len(whole.content)) == (200, "video/mp4", 100)
    assert (part.status_code, part.content) == (206, bytes(range(10, 20)))
    assert part.headers["Content-Range"] == "bytes 10-19/100"
    assert part.headers["Content-Disposition"] == 'filename="v.mp4"'
    assert engine.get("/view", params={"filename": "face.png [input]"}).status_code == 200
    codes = {
        (("filename", "zz.mp4"),): 404,
        (("filename", "v/v.mp4"),): 404,
        (("filename", "../../outside.png"),): 400,
        (
            ("filename", "v.mp4"),
            ("subfolder", "../.."),
        ): 403,
        (("filename", "v.mp4"), ("type", "attic")): 400,
    }
    assert {key: engine.get("/view", params=dict(key)).status_code for key in codes} == codes


def test_node_schemas_are_those_of_comfyui(engine: Engine) -> None:
    """Inputs, their types and ranges, outputs: as recorded; an unknown node is {} with 200."""
    needs_new(engine, "some nodes have fewer inputs and outputs, and other ranges")
    reply = engine.get("/object_info/NoSuchNode")
    assert (reply.status_code, reply.json()) == (200, {})
    known = engine.get("/object_info").json()
    assert known["WanInfiniteTalkToVideo"]["output"] == [
        "MODEL",
        "CONDITIONING",
        "CONDITIONING",
        "LATENT",
        "INT",
    ]
    for path in CAPTURES.glob("object_info/*.json"):
        for name, wanted in json.loads(path.read_text()).items():
            if name in known and name != "SaveVideo":
                assert simplified(known[name]) == simplified(wanted)


def simplified(schema: dict[str, Any]) -> dict[str, Any]:
    """What matters of a schema to a client: no tool tips, no lists of files."""
    inputs = {}
    for section in ("required", "optional"):
        for name, (kind, *more) in schema["input"].get(section, {}).items():
            extra = {
                key: value
                for key, value in (more[0] if more else {}).items()
                if key in ("default", "min", "max", "step")
            }
            files = (isinstance(kind, list) and name.endswith(("_name", "image"))) or name == "name"
            inputs[name] = section, "files" if files and name != "sampler_name" else kind, extra
    return {
        "inputs": inputs,
        **{key: schema[key] for key in ("output", "output_node", "name", "python_module")},
    }


def test_system_stats_name_the_draft(draft: Engine) -> None:
    """The keys of a ComfyUI; the device says that it is a preview."""
    stats = draft.get("/system_stats").json()
    assert stats["system"]["comfyui_version"] == "0.33.0"
    assert "draft engine" in stats["devices"][0]["name"]
    if (CAPTURES / "system_stats.json").is_file():
        wanted = json.loads((CAPTURES / "system_stats.json").read_text())["body"]
        assert set(stats["system"]) == set(wanted["system"])
        assert set(stats["devices"][0]) == set(wanted["devices"][0])


def test_pages_of_other_origins_are_refused(engine: Engine) -> None:
    """403 unless the Origin is the engine itself."""
    assert engine.get("/queue", headers={"Origin": "http://evil.example"}).status_code == 403
    assert engine.get("/queue", headers={"Origin": engine.url}).status_code == 200
