"""The doctor's round: the facts of this machine and of its ComfyUI, which ``doctor`` judges."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from importlib import resources

from pipeline import doctor, machine
from pipeline.comfy_client import ComfyClient
from pipeline.doctor import Check
from pipeline.engine import choose_engine, engine_kind, running_engine
from pipeline.errors import ConfigurationError, EngineError, PipelineError
from pipeline.mode_check import check_graph
from pipeline.models import State, manifest, models_folder, verify
from pipeline.settings import Settings
from pipeline.vocals import VocalSeparator


def examine(
    settings: Settings,
    *,
    url: str | None = None,
    family: str = "native",
    modes: Iterable[str] = (),
    on_wait: Callable[[str], None] = lambda _: None,
) -> Iterator[Check]:
    """All checks, one after the other.

    ``url``: a running ComfyUI to ask; else one is started where the settings name a checkout.  ``modes``:
    these must be possible; else one of the family's is enough.  ``on_wait`` is told what takes a while.

    Raises ``InvalidRequest`` for a family or mode that there is not.
    """
    modes = tuple(modes)
    manifest().select(family, modes)
    real = url is not None or engine_kind(settings) == "comfyui"
    on_gpu = real and "--cpu" not in settings.comfyui_flags
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = machine.nvidia()
    yield from doctor.gpu_checks(gpus, needed=on_gpu, visible=visible)
    yield doctor.torch_check(machine.version_of("torch"), "infinitetalk", on_gpu=on_gpu)
    yield doctor.memory_check(machine.memory_gb())
    yield from _disks(settings)
    yield doctor.shared_memory_check(machine.size_gb(machine.SHARED_MEMORY))
    yield doctor.ffmpeg_check(machine.ffmpeg_facts())
    if separator := VocalSeparator.configured(settings):
        yield doctor.separator_check(separator.command[0], separator.place)
    first, last = settings.port_range
    engines = len(gpus.gpus) if isinstance(gpus, machine.Nvidia) and gpus.gpus else 1
    yield doctor.ports_check(machine.free_ports(first, last), first, last, engines)
    yield doctor.ray_check(machine.version_of("ray"), machine.pinned_version("ray"))
    if not real:
        yield Check(
            "ComfyUI",
            "warn",
            "not configured: videos are drafts, not the model",
            "set INFINITETALK_COMFYUI_DIR; infinitetalk comfyui install makes one",
        )
        return
    yield from _sizes(settings, family, modes)
    try:
        with ExitStack() as stack:
            if url is None:
                packs = tuple(pack.name for pack in manifest().packs if family in pack.families)
                on_wait("starting ComfyUI")
                url = stack.enter_context(running_engine(choose_engine(settings, packs), settings)).url
            yield from _comfyui(ComfyClient(url), url, family, modes, on_gpu)
    except EngineError as error:
        yield Check("ComfyUI", "fail", str(error), _engine_remedy(error))
    except PipelineError as error:
        yield Check("ComfyUI", "fail", str(error), "see docs/setup.md")


def _disks(settings: Settings) -> Iterator[Check]:
    place = settings.scratch
    yield doctor.disk_check(str(place), machine.free_gb(place), "INFINITETALK_SCRATCH_DIR")


def _comfyui(
    client: ComfyClient, url: str, family: str, modes: tuple[str, ...], on_gpu: bool
) -> Iterator[Check]:
    system = client.system_stats().get("system", {})
    torch = str(system.get("pytorch_version", ""))
    if doctor.numbers(torch):
        yield doctor.comfyui_check(str(system.get("comfyui_version", "")), url)
        yield doctor.torch_check(torch, "ComfyUI", on_gpu=on_gpu)
    else:
        yield Check("ComfyUI", "warn", f"a draft engine answers at {url}", "give the URL of a ComfyUI")
    graphs = manifest().graphs[family]
    lacks = {
        mode: [(name, check_graph(client, _graph(name))) for name in graphs[mode]] for mode in modes or graphs
    }
    yield from doctor.mode_checks(lacks, family, all_needed=bool(modes))


def _sizes(settings: Settings, family: str, modes: tuple[str, ...]) -> Iterator[Check]:
    """Weights that are there, but not as published; what is missing, ComfyUI says."""
    try:
        folder = models_folder(settings)
    except ConfigurationError:
        return  # with --url, the weights may be anywhere
    found = verify(manifest().select(family, modes), folder, checksums=False)
    odd = [file for file in found if file.state in (State.WRONG_SIZE, State.UNFINISHED)]
    if odd:
        said = f"{len(odd)} of {len(found)} are not as published, such as {odd[0].weight.file}: {odd[0].hint}"
        yield Check(
            "weights", "warn", said, "infinitetalk models verify shows all; models download fetches them"
        )
    elif any(file.fine for file in found):
        there = sum(file.fine for file in found)
        yield Check("weights", "pass", f"{there} of {len(found)} at {folder}, sizes as published")


def _engine_remedy(error: EngineError) -> str:
    if "ModuleNotFoundError" in error.log:
        return "ComfyUI's packages are not in that Python: pip install -r requirements.txt in its venv"
    if "did not answer" in error.reason:
        return "a slow disk? INFINITETALK_READY_SECONDS gives it more time"
    return "the end of its log says why; INFINITETALK_COMFYUI_PYTHON, INFINITETALK_COMFYUI_ARGS"


def _graph(name: str) -> dict[str, dict[str, object]]:
    text = (resources.files("workflows") / f"{name}.json").read_text(encoding="utf-8")
    graph: dict[str, dict[str, object]] = json.loads(text)
    return graph
