"""The finished front of a video for players: pieces of fragmented mp4, and the HLS playlist that names them.

    stream/stream.m3u8             the pieces that can be watched; its end mark says that it is all
    stream/init-<digest>.mp4       the header of pieces; one, unless nodes have different encoders
    stream/0000072-<digest>.m4s    the pictures from frame 72 up to the next key frame, and their sound

Pictures are copied packet by packet, so a player shows the very frames of the final video.  The sound is one
AAC stream over the whole length, and each of its packets is in one piece: no gap, no second encoding.
Names tell the content (a digest): whoever goes on with a job, or has other takes, finds what is still right.
What is finished is ``front``'s business; how links are signed the service's.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import av

from pipeline.errors import MediaError
from pipeline.ffmpeg import FINAL, TICKS
from pipeline.frames import media_errors
from pipeline.job import finished, storage_errors
from pipeline.timeline import FPS

PLAYLIST = "stream.m3u8"
LONGEST_SECONDS = FINAL.options["g"] // FPS
"""Of a piece: an encoder makes a key frame at least so often.  A playlist says so once and for all."""

AAC_SAMPLES = 1024
"""Of a packet of AAC-LC."""

NAME = re.compile(r"init-[0-9a-f]{16}\.mp4|[0-9]{7}-[0-9a-f]{16}\.m4s")
"""What the files beside a playlist are called."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of the video that can be played after its header."""

    init: str
    name: str
    frames: int


class Stream:
    """Writes the stream of one job, as a context manager.  ``sound`` is mp4 with AAC-LC from time 0 on.

    Everything may be called again with what is there already, and then writes nothing new.
    """

    def __init__(self, folder: Path, sound: Path, total_frames: int) -> None:
        """Raises ``MediaError``."""
        self._folder, self._total = folder, total_frames
        self._sound = _Sound(sound)
        self._inits: dict[bytes, str] = {}
        self._cut: dict[tuple[Path, int], list[Piece]] = {}
        self._listed = _listed(folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sound.close()

    def show(self, parts: Iterable[tuple[Path, int]]) -> None:
        """Let players see ``parts`` ``(path, frames)``: all that is finished from the first frame on.

        The files are ``FINAL``.  The playlist grows file by file and never shrinks.
        Raises ``MediaError``, ``StorageError``.
        """
        for pieces in self._pieces(parts):
            names = [piece.name for piece in pieces]
            if len(names) > len(self._listed) or names != self._listed[: len(names)]:
                self._write(pieces, ended=False)

    def end(self, parts: Iterable[tuple[Path, int]]) -> None:
        """These are all parts of the video: write the end mark, and remove what belongs to other takes.

        Raises ``MediaError``, also where frames are missing, and ``StorageError``.
        """
        pieces = list(self._pieces(parts))[-1]
        if (count := sum(piece.frames for piece in pieces)) != self._total:
            raise MediaError(f"the stream has {count} frames instead of {self._total}")
        self._write(pieces, ended=True)
        stay = {PLAYLIST, *(piece.name for piece in pieces), *(piece.init for piece in pieces)}
        with storage_errors(self._folder):
            for path in self._folder.iterdir():
                if path.name not in stay:
                    path.unlink()

    def _pieces(self, parts: Iterable[tuple[Path, int]]) -> Iterator[list[Piece]]:
        """All pieces up to each part."""
        pieces: list[Piece] = []
        first = 0
        for path, frames in parts:
            if (path, first) not in self._cut:
                self._cut[path, first] = self._cut_part(path, frames, first)
            pieces += self._cut[path, first]
            first += frames
            yield pieces

    def _cut_part(self, path: Path, frames: int, first: int) -> list[Piece]:
        pieces = []
        with media_errors(path), av.open(str(path)) as container:
            picture = container.streams.video[0]
            for group in _groups(container.demux(picture)):
                init = self._init(picture, group[0])
                stop = first + len(group)
                whole = stop >= self._total  # what is left of the sound goes with the last picture
                sound = self._sound.packets(first, None if whole else stop)
                content = self._piece(picture, group, first, sound)
                name = f"{first:07d}-{_digest(content)}.m4s"
                self._keep(name, content)
                pieces.append(Piece(init, name, len(group)))
                first = stop
        if sum(piece.frames for piece in pieces) != frames:
            raise MediaError(f"{path.parent.name}/{path.name} does not have its {frames} frames")
        return pieces

    def _init(self, picture: av.VideoStream, packet: av.Packet[Any]) -> str:
        """The name of the header for pieces of such pictures; its edit list hides the encoder's priming."""
        parameters = bytes(picture.codec_context.extradata or b"")
        if parameters not in self._inits:
            content = io.BytesIO()
            with self._muxer(content, "+frag_custom+delay_moov+default_base_moof") as output:
                # The sound's packets start before 0: that is how the edit list comes about.
                self._fill(output, picture, [packet], 0, self._sound.packets(0, 2), -self._sound.priming)
            boxes = dict(_boxes(content.getvalue()))
            header = boxes[b"ftyp"] + boxes[b"moov"]
            self._inits[parameters] = f"init-{_digest(header)}.mp4"
            self._keep(self._inits[parameters], header)
        return self._inits[parameters]

    def _piece(
        self,
        picture: av.VideoStream,
        group: Sequence[av.Packet[Any]],
        first: int,
        sound: Sequence[_SoundPacket],
    ) -> bytes:
        content = io.BytesIO()
        flags = "+frag_custom+empty_moov+default_base_moof+frag_discont+skip_trailer"
        # Times stay as they are given; the number of the fragment grows from piece to piece.
        more = {"avoid_negative_ts": "disabled", "fragment_index": str(first + 1)}
        with self._muxer(content, flags, **more) as output:
            self._fill(output, picture, group, first, sound, 0)
        boxes = dict(_boxes(content.getvalue()))
        return boxes[b"moof"] + boxes[b"mdat"]

    @staticmethod
    def _muxer(target: io.BytesIO, flags: str, **more: str) -> av.container.OutputContainer:
        options = {"movflags": flags, "video_track_timescale": str(TICKS * FPS), **more}
        return av.open(target, "w", format="mp4", options=options)

    def _fill(
        self,
        output: av.container.OutputContainer,
        picture: av.VideoStream,
        group: Sequence[av.Packet[Any]],
        first: int,
        sound: Sequence[_SoundPacket],
        shift: int,
    ) -> None:
        """``shift``: of the sound, in samples, from a clock that starts with its first packet."""
        pictures = output.add_stream_from_template(picture)
        sounds = output.add_stream_from_template(self._sound.stream)
        for number, packet in enumerate(group, first):
            clock = Fraction(1, TICKS * FPS)
            output.mux(_packet(bytes(packet), number * TICKS, TICKS, clock, packet.is_keyframe, pictures))
        for number, content in sound:
            clock, time = Fraction(1, self._sound.rate), number * AAC_SAMPLES + shift
            output.mux(_packet(content, time, AAC_SAMPLES, clock, True, sounds))

    def _keep(self, name: str, content: bytes) -> None:
        if not (self._folder / name).exists():
            with finished(self._folder / name) as partial:
                partial.write_bytes(content)

    def _write(self, pieces: Sequence[Piece], *, ended: bool) -> None:
        lines = [
            "#EXTM3U",
            "#EXT-X-VERSION:7",
            f"#EXT-X-TARGETDURATION:{LONGEST_SECONDS}",
            "#EXT-X-PLAYLIST-TYPE:EVENT",
            "#EXT-X-INDEPENDENT-SEGMENTS",
        ]
        init = ""
        for piece in pieces:
            if piece.init != init:
                lines += ["#EXT-X-DISCONTINUITY"] if init else []
                lines.append(f'#EXT-X-MAP:URI="{piece.init}"')
                init = piece.init
            lines += [f"#EXTINF:{piece.frames / FPS:.2f},", piece.name]
        lines += ["#EXT-X-ENDLIST"] if ended else []
        with finished(self._folder / PLAYLIST) as partial:
            partial.write_text("\n".join(lines) + "\n")
        self._listed = [piece.name for piece in pieces]


_SoundPacket = tuple[int, bytes]
"""A packet's number, counted from the stream's first, and its content."""


class _Sound:
    """The packets of the sound by the frames that they belong to."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with media_errors(path):
            self._container = av.open(str(path))
            self.stream = self._container.streams.audio[0]
            self.rate = self.stream.codec_context.sample_rate
            self._tick = self.stream.time_base or Fraction(1, self.rate)
            packet = next(self._container.demux(self.stream))
        self.priming = -round((packet.pts or 0) * self._tick * self.rate)
        """Samples before time 0 that the decoder needs, and that nobody shall hear."""

    def close(self) -> None:
        self._container.close()

    def packets(self, first: int, stop: int | None) -> list[_SoundPacket]:
        """Those that start within the frames ``[first, stop)``; all before them for frame 0; to the end."""
        begin, end = self._number(first), None if stop is None else self._number(stop)
        found = []
        with media_errors(self._path):
            # Some earlier: a demuxer's times of packets are rounded.
            start = Fraction(max(begin - 2, 0) * AAC_SAMPLES - self.priming, self.rate)
            self._container.seek(round(start / self._tick), stream=self.stream)
            for packet in self._container.demux(self.stream):
                number = self._count(packet)
                if not packet.size or (end is not None and number >= end):
                    break
                if number >= begin:
                    found.append((number, bytes(packet)))
        return found

    def _number(self, frame: int) -> int:
        """The first packet that starts with a frame or later."""
        samples = Fraction(frame * self.rate, FPS) + self.priming
        return math.ceil(samples / AAC_SAMPLES) if frame else 0

    def _count(self, packet: av.Packet[Any]) -> int:
        """The number of a packet by its time."""
        return round(((packet.pts or 0) * self._tick * self.rate + self.priming) / AAC_SAMPLES)


def _groups(packets: Iterable[av.Packet[Any]]) -> Iterator[list[av.Packet[Any]]]:
    """Packets from one key frame up to the next."""
    group: list[av.Packet[Any]] = []
    for packet in packets:
        if packet.is_keyframe and group:
            yield group
            group = []
        if packet.size:
            group.append(packet)
    if group:
        yield group


def _packet(
    content: bytes, time: int, duration: int, clock: Fraction, key: bool, stream: Any
) -> av.Packet[Any]:
    packet = av.Packet(content)
    packet.pts = packet.dts = time
    packet.duration, packet.time_base, packet.is_keyframe, packet.stream = duration, clock, key, stream
    return packet


def _boxes(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Names and contents of the top-level boxes of an mp4, which are smaller than 4 GB."""
    place = 0
    while place < len(content):
        size = int.from_bytes(content[place : place + 4], "big")
        yield content[place + 4 : place + 8], content[place : place + size]
        place += size


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _listed(folder: Path) -> list[str]:
    """The pieces that players know already."""
    try:
        lines = (folder / PLAYLIST).read_text().splitlines()
    except OSError:
        return []
    return [line for line in lines if line and not line.startswith("#")]
