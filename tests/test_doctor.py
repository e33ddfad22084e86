"""Facts are judged: what passes, what warns, what fails, and what helps."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline import doctor, machine
from pipeline.doctor import Check
from pipeline.machine import Ffmpeg, Gpu, Nvidia
from pipeline.mode_check import Missing

SCREEN = """
+-----------------------------------------------------------------------------------------+
| NVIDIA-SMI {driver}             Driver Version: {driver}     CUDA Version: {cuda}     |
|-----------------------------------------+------------------------+----------------------+
"""


def nvidia(cuda: str = "12.8", *memories: int) -> Nvidia:
    gpus = tuple(Gpu(index, "NVIDIA GeForce RTX 4090", mib) for index, mib in enumerate(memories or (24564,)))
    return Nvidia("570.86.10", cuda, gpus)


def levels(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.level for check in checks}


def test_a_good_gpu_passes() -> None:
    """A 24 GB card reports less than 24 GiB and passes; the line names it."""
    driver, gpu = doctor.gpu_checks(nvidia(), needed=True)
    assert (driver.level, driver.said) == ("pass", "driver 570.86.10, CUDA 12.8")
    assert (gpu.level, gpu.said) == ("pass", "NVIDIA GeForce RTX 4090, 24.0 GB")


@pytest.mark.parametrize(
    ("cuda", "level"), [("12.8", "pass"), ("13.0", "pass"), ("12.7", "fail"), ("", "warn")]
)
def test_the_driver_must_know_cuda_12_8(cuda: str, level: str) -> None:
    """Below CUDA 12.8 the driver is too old, and the remedy names one that is not."""
    check = doctor.gpu_checks(nvidia(cuda), needed=True)[0]
    assert check.level == level
    assert ("570" in check.remedy) == (level == "fail")


@pytest.mark.parametrize(
    ("mib", "level"), [(81559, "pass"), (23028, "pass"), (16376, "warn"), (12288, "fail"), (8192, "fail")]
)
def test_a_small_gpu_is_told(mib: int, level: str) -> None:
    """An A10G's 22.5 GiB pass; 16 GB warn; 12 GB and less fail."""
    assert doctor.gpu_checks(nvidia("12.8", mib), needed=True)[1].level == level


def test_each_gpu_has_a_line() -> None:
    """Of several GPUs the small one is the one that is named."""
    assert levels(doctor.gpu_checks(nvidia("12.8", 24564, 16376), needed=True)) == {
        "GPU driver": "pass",
        "GPU 0": "pass",
        "GPU 1": "warn",
    }


def test_no_gpu_matters_only_to_a_comfyui_that_uses_it() -> None:
    """Without a driver ComfyUI fails; a machine for drafts is warned."""
    assert [doctor.gpu_checks(None, needed=needed)[0].level for needed in (True, False)] == ["fail", "warn"]
    check = doctor.gpu_checks("Failed to initialize NVML: Driver/library version mismatch", needed=True)[0]
    assert check.level == "fail"
    assert "restart the machine" in check.remedy
    assert levels(doctor.gpu_checks(Nvidia("570", "12.8", ()), needed=True))["GPU"] == "fail"


def test_hidden_gpus_are_told() -> None:
    """CUDA_VISIBLE_DEVICES in the environment is a warning that names its value."""
    check = doctor.gpu_checks(nvidia(), needed=True, visible="0")[-1]
    assert (check.level, "'0'" in check.said) == ("warn", True)


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place for an nvidia-smi of the test, first on PATH."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path / "nvidia-smi"


def test_nvidia_smi_is_read(nvidia_smi: Path) -> None:
    """Names, memory, driver and CUDA version come from the program on PATH."""
    screen = SCREEN.format(driver="550.54.15", cuda="12.4")
    rows = "0, NVIDIA A10G, 23028, 550.54.15\\n1, NVIDIA A10G, 23028, 550.54.15\\n"
    nvidia_smi.write_text(
        f"#!/bin/sh\nif [ $# -gt 0 ]; then printf '{rows}'; else cat <<'X'\n{screen}X\nfi\n"
    )
    nvidia_smi.chmod(0o755)
    found = machine.nvidia()
    gpus = (Gpu(0, "NVIDIA A10G", 23028), Gpu(1, "NVIDIA A10G", 23028))
    assert found == Nvidia("550.54.15", "12.4", gpus)
    assert doctor.gpu_checks(found, needed=True)[0].level == "fail"


def test_a_failing_nvidia_smi_is_quoted(nvidia_smi: Path) -> None:
    """Its own words are kept: they are the symptom people search for."""
    nvidia_smi.write_text(
        "#!/bin/sh\necho 'NVIDIA-SMI has failed because it could not talk to the driver'\nexit 9\n"
    )
    nvidia_smi.chmod(0o755)
    assert machine.nvidia() == "NVIDIA-SMI has failed because it could not talk to the driver"


@pytest.mark.parametrize(
    ("version", "level"),
    [
        ("2.9.0+cu128", "pass"),
        ("2.4.1", "pass"),
        ("2.4.0+cu124", "fail"),
        ("2.9.0+cpu", "fail"),
        (None, "fail"),
    ],
)
def test_torch_on_a_gpu(version: str | None, level: str) -> None:
    """2.4.1 or newer, and not the build without CUDA."""
    assert doctor.torch_check(version, "ComfyUI", on_gpu=True).level == level


def test_torch_without_cuda_is_fine_on_the_cpu() -> None:
    """A ComfyUI that runs with --cpu needs no CUDA."""
    assert doctor.torch_check("2.9.0+cpu", "ComfyUI", on_gpu=False).level == "pass"


@pytest.mark.parametrize(("gb", "level"), [(62.7, "pass"), (31.1, "pass"), (23.5, "warn"), (15.6, "fail")])
def test_memory(gb: float, level: str) -> None:
    """32 GB as machines report them pass; half of it fails."""
    assert doctor.memory_check(gb).level == level


@pytest.mark.parametrize(("free", "level"), [(50.0, "pass"), (4.0, "warn"), (0.5, "fail"), (None, "fail")])
def test_disk(free: float | None, level: str) -> None:
    """Ten GB pass; the remedy names the setting."""
    check = doctor.disk_check("/scratch", free, "INFINITETALK_SCRATCH_DIR")
    assert check.level == level
    assert ("INFINITETALK_SCRATCH_DIR" in check.remedy) == (level != "pass")


@pytest.mark.parametrize(("gb", "level"), [(8.0, "pass"), (0.0625, "warn"), (None, "warn")])
def test_shared_memory(gb: float | None, level: str) -> None:
    """A container's 64 MB are a warning with the flag that changes them."""
    check = doctor.shared_memory_check(gb)
    assert check.level == level
    assert ("--shm-size" in check.remedy) == (level == "warn")


def test_ffmpeg_needs_its_encoders() -> None:
    """The encoders of results are looked for; this machine's ffmpeg has them."""
    assert doctor.ffmpeg_check(Ffmpeg("/usr/bin/ffmpeg", "7.1", frozenset({"aac", "ffv1"}))).level == "fail"
    assert doctor.ffmpeg_check("no ffmpeg").level == "fail"
    assert doctor.ffmpeg_check(machine.ffmpeg_facts()).level == "pass"


def test_ports_and_engines() -> None:
    """Each engine needs a port."""
    assert doctor.ports_check(8, 8188, 8195, 8).level == "pass"
    assert doctor.ports_check(1, 8188, 8195, 2).level == "fail"


def test_ray_is_the_tested_one() -> None:
    """The installed Ray is the pinned one; another is a warning, none a failure."""
    installed, tested = machine.version_of("ray"), machine.pinned_version("ray")
    assert tested is not None
    assert doctor.ray_check(installed, tested).level == "pass"
    assert doctor.ray_check("2.9.0", tested).level == "warn"
    assert doctor.ray_check(machine.version_of("no-such-package"), tested).level == "fail"


@pytest.mark.parametrize(
    ("version", "level"), [("0.33.0", "pass"), ("0.11.1", "pass"), ("0.9.2", "fail"), ("", "warn")]
)
def test_comfyui_version(version: str, level: str) -> None:
    """0.11 has the nodes."""
    assert doctor.comfyui_check(version, "http://127.0.0.1:8188").level == level


NODE, FILE = Missing("InfiniteTalkSpeech"), Missing("VAELoader", "vae.safetensors")


def test_a_ready_mode_passes_and_one_that_lacks_a_weight_is_named() -> None:
    """Where one mode works, the lack of another is a warning with the command that ends it."""
    single, multi = doctor.mode_checks(
        {"image_single": [("talk_single", ())], "image_multi": [("talk_multi", (FILE,))]},
        "native",
        all_needed=False,
    )
    assert (single.name, single.level) == ("mode image_single", "pass")
    assert (multi.level, multi.said) == ("warn", "missing vae.safetensors")
    assert multi.remedy == "infinitetalk models download --mode image_multi"


def test_no_ready_mode_is_a_failure() -> None:
    """Where no mode works, or one that was asked for does not, the examination fails."""
    lacks = {"image_single": [("talk_single", (FILE,))]}
    assert doctor.mode_checks(lacks, "native", all_needed=False)[0].level == "fail"
    both = {**lacks, "video_single": [("talk_single", ())]}
    assert doctor.mode_checks(both, "native", all_needed=False)[0].level == "warn"
    assert doctor.mode_checks(both, "native", all_needed=True)[0].level == "fail"


def test_a_second_graph_serves_with_a_warning() -> None:
    """Without our nodes the core graph renders, and the line says what is not as it could be."""
    lacks = {"image_single": [("talk_single", (NODE,)), ("image_single", ())]}
    (check,) = doctor.mode_checks(lacks, "native", all_needed=True)
    assert check.level == "warn"
    assert "ready (image_single), but not talk_single: node InfiniteTalkSpeech missing" in check.said


def test_the_graph_to_complete_is_the_one_that_lacks_weights_only() -> None:
    """Of two graphs that can't be rendered, the one whose files can be fetched is reported."""
    lacks = {"image_single": [("talk_single", (NODE, FILE)), ("image_single", (FILE,))]}
    (check,) = doctor.mode_checks(lacks, "wrapper", all_needed=True)
    assert check.said == "missing vae.safetensors"
    assert check.remedy == "infinitetalk models download --mode image_single --family wrapper"
