"""The only caller of the ffmpeg binary, and the only place that knows encoder arguments.

Commands are built with ffmpeg-python, run here (stderr is always drained) and their failures become
``MediaError`` or ``StorageError``.  Decoding is PyAV's (``frames``, ``speech``); no job's layout here.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import signal
import subprocess
import tempfile
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ffmpeg
import imageio_ffmpeg

from pipeline.errors import ConfigurationError, MediaError, StorageError
from pipeline.timeline import FPS

TICKS = 512
"""Of every mp4 video track's clock to a frame.  One clock lets files join by copy."""

THREADS = 2
"""Encoder threads: x264's output depends on their number, and a node has an engine to feed."""

INPUT_FORMATS = "aac,aiff,amr,asf,avi,caf,flac,flv,matroska,mov,mp3,mpeg,mpegts,ogg,w64,wav,webm"
"""Demuxers that a user's file may reach: media only, no playlists that name further files or hosts."""

LOUDNESS_GATE = -70.0
"""LUFS: EBU R128's absolute gate, which is what a track of nothing measures as."""

_STORAGE = {
    "No space left on device": "no space left on the device",
    "Disk quota exceeded": "the disk quota is exceeded",
    "File too large": "the file is larger than this system allows",
    "Read-only file system": "the file system is read-only",
}


@dataclass(frozen=True, slots=True)
class Encoding:
    """How frames become a file: suffix, container and ffmpeg's output options."""

    suffix: str
    container: str
    options: dict[str, Any]


FINAL = Encoding(
    ".mp4",
    "mp4",
    {
        # RGB to BT.709 limited range; without the tags players guess BT.601 for small pictures.
        "vf": "scale=out_range=limited:out_color_matrix=bt709"
        ":flags=bicubic+accurate_rnd+full_chroma_int+full_chroma_inp,format=yuv420p"
        ",setparams=range=tv:color_primaries=bt709:color_trc=bt709:colorspace=bt709",
        "c:v": "libx264",
        "preset": "veryfast",
        "crf": 16,
        # No B-frames: decode order is display order, so no edit list and no delay to go wrong at a join.
        "bf": 0,
        "g": 5 * FPS,
        "x264-params": "open-gop=0",
        "threads": THREADS,
        "fps_mode": "passthrough",
        "video_track_timescale": TICKS * FPS,
    },
)
"""What viewers get: near-lossless H.264; files made with it by one binary join by copy."""

LOSSLESS = Encoding(
    ".mkv",
    "matroska",
    {
        "c:v": "ffv1",
        "level": 3,
        "pix_fmt": "bgr0",
        "g": 1,
        "slices": 4,
        "slicecrc": 1,
        "threads": THREADS,
        "fps_mode": "passthrough",
    },
)
"""RGB exactly, about 200 KB a frame at 832x480; for overlaps, which are decoded once and blended."""

STOP_SECONDS = 0.2
"""How often a run that can be stopped looks whether it shall."""

_started: weakref.WeakSet[subprocess.Popen[bytes]] = weakref.WeakSet()


@functools.cache
def binary() -> str:
    """The one ffmpeg binary of this machine.  Raises ``ConfigurationError`` where there is none."""
    try:
        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except RuntimeError as error:
        reason = "no ffmpeg: install the imageio-ffmpeg wheel of this platform or set IMAGEIO_FFMPEG_EXE"
        raise ConfigurationError(reason) from error


def command(stream: Any, *, loglevel: str = "warning") -> list[str]:
    """Arguments for an ffmpeg-python output stream."""
    quiet = stream.global_args("-hide_banner", "-nostdin", "-nostats", "-loglevel", loglevel)
    compiled: list[str] = quiet.compile(cmd=binary(), overwrite_output=True)
    return compiled


def run(
    stream: Any,
    what: str,
    target: Path | None = None,
    *,
    loglevel: str = "warning",
    stop: threading.Event | None = None,
) -> str:
    """Run an ffmpeg-python output stream to its end; what it said on stderr.

    ``what`` names the work in errors, ``target`` the file written; ``stop`` ends it early, as an error.
    Raises ``MediaError``, ``StorageError``.
    """
    arguments = command(stream, loglevel=loglevel)
    pipe = subprocess.PIPE
    with _starting():
        done = subprocess.Popen(
            arguments, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, env=_environment()
        )
    _started.add(done)
    with done:
        try:
            said = _to_its_end(done, stop).decode(errors="replace")
        except BaseException:
            done.kill()
            raise
    if done.returncode:
        raise failure(what, target, done.returncode, said)
    return said


def _environment() -> dict[str, str]:
    """A copy: a child that starts on the C library's own list fails while another thread changes that."""
    return os.environ.copy()


def _to_its_end(process: subprocess.Popen[bytes], stop: threading.Event | None) -> bytes:
    """What a process writes to stderr until it ends, or is killed because of ``stop``."""
    while True:
        try:
            return process.communicate(timeout=None if stop is None else STOP_SECONDS)[1]
        except subprocess.TimeoutExpired:
            if stop is not None and stop.is_set():
                process.kill()


def failure(what: str, target: Path | None, code: int, said: str) -> MediaError | StorageError:
    """The error for an ffmpeg that ended with ``code``."""
    reasons = [reason for words, reason in _STORAGE.items() if words in said]
    if code == -signal.SIGXFSZ:
        reasons.append(_STORAGE["File too large"])
    if reasons and target is not None:
        return StorageError(str(target), reasons[0])
    tail = " | ".join(said.strip().splitlines()[-5:])
    return MediaError(f"ffmpeg could not {what}", tail or f"it ended with code {code}")


def join(
    parts: Sequence[tuple[Path, int]], sound: tuple[Path, int], target: Path, work: Path, fps: int = FPS
) -> None:
    """Join silent videos ``(path, frames)`` by copy and add the stream ``(path, index)`` of a sound, by copy.

    The parts must be ``FINAL``, at ``fps``, with equal headers.  Raises ``MediaError``, ``StorageError``.
    """
    track, index = sound
    picture, audio = _concat(parts, work, fps)["v:0"], _user_input(track)[str(index)]
    # No -shortest, no -avoid_negative_ts: both change the number or the times of frames.
    options = {**_copied(FINAL, fps), "movflags": "+faststart"}
    run(ffmpeg.output(picture, audio, _path(target), **options), "join the segments", target)


def join_pictures(parts: Sequence[tuple[Path, int]], target: Path, work: Path, encoding: Encoding) -> None:
    """Join silent videos ``(path, frames)`` of one ``encoding`` by copy; raises as ``join`` does."""
    stream = _concat(parts, work, FPS)["v:0"].output(_path(target), **_copied(encoding, FPS))
    run(stream, "join the windows", target)


def _copied(encoding: Encoding, fps: int) -> dict[str, Any]:
    """Options that join files of one encoding packet by packet."""
    options: dict[str, Any] = {"format": encoding.container, "c": "copy"}
    if encoding is FINAL:
        # ffmpeg repeats the parameter sets at each join; avc1 has them in the header only.
        options |= {"bsf:v": "filter_units=remove_types=7-8", "video_track_timescale": TICKS * fps}
    return options


def encode_again(
    parts: Sequence[tuple[Path, int]], target: Path, work: Path, fps: int = FPS, frames: int | None = None
) -> None:
    """Join silent videos ``(path, frames)`` by encoding, at another rate if need be; raises as ``join`` does.

    Pictures are repeated or left out, none is made up: each new frame shows what is on screen in its
    middle, so picture and sound stay within half a frame of each other.  ``frames``: of the result.
    """
    options = dict(FINAL.options)
    if fps != FPS:
        # The last picture stays on as long as it takes.
        options["vf"] = f"tpad=stop_mode=clone:stop={FPS},fps={fps}:round=near,{options['vf']}"
        # Finer than the parts: the second generation then costs 1 dB instead of 2, at the same size.
        options |= {"frames:v": frames, "crf": 14, "g": 5 * fps, "video_track_timescale": TICKS * fps}
    stream = _concat(parts, work, FPS)["v:0"].output(_path(target), format=FINAL.container, **options)
    run(stream, "encode the segments again", target)


def encode_sound(
    sound: tuple[Path, int],
    target: Path,
    rate: int,
    channels: int,
    *,
    first: int = 0,
    samples: int,
    stop: threading.Event | None = None,
) -> None:
    """Encode the stream ``(path, index)`` of a user's file to AAC in mp4, its first sample at time 0.

    ``first``: drop so many samples of the source; ``samples``: then keep so many, counted at ``rate``.
    Raises ``MediaError``, ``StorageError``.
    """
    path, index = sound
    # Sample numbers become the clock: a stream that starts late or has gaps would slip otherwise.
    audio = _user_input(path)[str(index)].filter("asetpts", "N/SR/TB")
    if first:
        audio = audio.filter("atrim", start_sample=first).filter("asetpts", "N/SR/TB")
    audio = audio.filter("aresample", rate).filter("atrim", end_sample=samples)
    options = {"c:a": "aac", "b:a": f"{max(192, 96 * channels)}k", "ac": channels, "threads": THREADS}
    run(audio.output(_path(target), format="mp4", vn=None, **options), "encode the sound", target, stop=stop)


@dataclass(frozen=True, slots=True)
class PlacedSound:
    """A stream of a user's file with its place in a mix; samples are counted at the mix's rate."""

    path: Path
    index: int
    channels: int
    start: int
    samples: int


def mix_sounds(
    sounds: Sequence[PlacedSound],
    target: Path,
    rate: int,
    samples: int,
    stop: threading.Event | None = None,
) -> None:
    """Mix sounds to stereo AAC in mp4, cut or filled up to ``samples``.

    Raises ``MediaError``, ``StorageError``.
    """
    placed = []
    for number, sound in enumerate(sounds):
        # ffmpeg-python takes equal inputs for one, and both speakers may have the same file.
        source = _user_input(sound.path, thread_queue_size=8 + number)
        audio = source[str(sound.index)].filter("asetpts", "N/SR/TB")
        audio = audio.filter("aresample", rate).filter("aformat", sample_fmts="fltp")
        if sound.channels == 1:  # the usual way to stereo takes 3 dB off
            audio = audio.filter("pan", args="stereo|c0=c0|c1=c0")
        audio = audio.filter("aformat", channel_layouts="stereo")
        # Its own length exactly, whatever a resampler rounds, then silence in front.
        audio = audio.filter("apad", whole_len=sound.samples).filter("atrim", end_sample=sound.samples)
        placed.append(audio.filter("adelay", delays=f"{sound.start}S", all=1))
    mixed = ffmpeg.filter(placed, "amix", inputs=len(placed), duration="longest", normalize=0)
    # The limiter looks ahead; without "latency" everything would come 5 ms late.
    mixed = mixed.filter("alimiter", limit=0.95, level=0, latency=1).filter("asetpts", "N/SR/TB")
    mixed = mixed.filter("apad", whole_len=samples).filter("atrim", end_sample=samples)
    options = {"c:a": "aac", "b:a": "192k", "ac": 2, "ar": rate, "threads": THREADS}
    run(mixed.output(_path(target), format="mp4", vn=None, **options), "mix the sounds", target, stop=stop)


def loudness(samples: Path, rate: int) -> float | None:
    """Integrated loudness in LUFS (EBU R128) of raw mono float32 samples; None where nothing is loud enough.

    Raises ``MediaError``.
    """
    stream = ffmpeg.input(_path(samples), format="f32le", ar=rate, ac=1).filter("ebur128", framelog="quiet")
    said = run(stream.output("-", format="null"), "measure the loudness", loglevel="info")
    found = re.findall(r"^\s*I:\s*(-?[\d.]+|-inf|nan) LUFS", said, re.MULTILINE)
    if not found:
        raise MediaError("ffmpeg gave no loudness", said[-500:])
    measured = float(found[-1])
    return measured if measured > LOUDNESS_GATE else None


def _concat(parts: Sequence[tuple[Path, int]], work: Path, fps: int) -> Any:
    folder = Path(tempfile.mkdtemp(prefix="concat-", dir=work))
    lines = ["ffconcat version 1.0"]
    for number, (path, frames) in enumerate(parts):
        link = folder / f"part-{number:05d}{path.suffix}"
        link.symlink_to(path.resolve())  # any character may be in a path; the list's syntax is poor
        # Each file's length is given, so that no rounding of a container moves the next one.
        lines += [f"file {link.name}", f"duration {frames / fps:.6f}"]
    playlist = folder / "parts.ffconcat"
    playlist.write_text("\n".join(lines) + "\n")
    return ffmpeg.input(_path(playlist), format="concat")


def _user_input(path: Path, **options: Any) -> Any:
    limits = {"protocol_whitelist": "file", "format_whitelist": INPUT_FORMATS}
    return ffmpeg.input(_path(path), **limits, **options)


def _path(path: Path) -> str:
    return str(path.resolve())  # absolute: a relative name could read as an option or a protocol


def start_encoder(target: Path, width: int, height: int, encoding: Encoding) -> subprocess.Popen[bytes]:
    """Start ffmpeg on raw RGB frames that come through its stdin; its stderr must be drained.

    Raises ``ConfigurationError``.
    """
    stream = ffmpeg.input("pipe:", format="rawvideo", pix_fmt="rgb24", s=f"{width}x{height}", r=FPS)
    stream = stream.output(_path(target), format=encoding.container, an=None, **encoding.options)
    arguments = command(stream)
    arguments.remove("-nostdin")  # the frames come that way
    pipe, null = subprocess.PIPE, subprocess.DEVNULL
    with _starting():
        encoder = subprocess.Popen(arguments, stdin=pipe, stdout=null, stderr=pipe, env=_environment())
    _started.add(encoder)
    return encoder


def end_all() -> None:
    """Kill every ffmpeg of this process, for a process that has to end now: their callers get errors."""
    for process in list(_started):
        if process.poll() is None:
            process.kill()


@contextlib.contextmanager
def _starting() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigurationError(f"ffmpeg can't be started: {error}") from error
