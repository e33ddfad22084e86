"""The prompt queue and the history of the draft engine: thread-safe bookkeeping, nothing is executed here."""

from __future__ import annotations

import copy
import heapq
import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

HISTORY_SIZE = 10_000

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Item:
    """One accepted prompt; ``count`` numbers the accepted prompts from 1."""

    number: float
    prompt_id: str
    graph: Json
    extra: Json
    outputs: list[str]
    count: int

    def as_json(self) -> list[Any]:
        """The form that /queue and /history show."""
        return [self.number, self.prompt_id, self.graph, self.extra, self.outputs]


@dataclass(slots=True)
class Flags:
    """What POST /free asked for since it was last looked at."""

    unload_models: bool = False
    free_memory: bool = False


@dataclass(slots=True)
class Outcome:
    """How a prompt ended: its outputs, their nodes, and the messages that history keeps."""

    success: bool = True
    outputs: Json = field(default_factory=dict)
    meta: Json = field(default_factory=dict)
    messages: list[list[Any]] = field(default_factory=list)


class PromptQueue:
    """Pending prompts by number, the running one, and what became of the others.

    ``changed`` is called after every change with the number of prompts that remain.
    """

    def __init__(self, changed: Callable[[int], None]) -> None:
        self._changed = changed
        self._lock = threading.RLock()
        self._wake = threading.Condition(self._lock)
        self._order = itertools.count()
        self._pending: list[tuple[float, int, Item]] = []
        self._running: Item | None = None
        self._history: dict[str, Json] = {}
        self._flags = Flags()
        self._interrupted = threading.Event()

    @property
    def remaining(self) -> int:
        """Prompts pending and running."""
        with self._lock:
            return len(self._pending) + (self._running is not None)

    def put(self, item: Item) -> None:
        """Add a prompt; the lowest number runs first, equal numbers in order of arrival."""
        with self._wake:
            heapq.heappush(self._pending, (item.number, next(self._order), item))
            self._changed(self.remaining)
            self._wake.notify()

    def get(self) -> Item | None:
        """Wait for the next prompt and mark it as running; None when woken for a flag of POST /free."""
        with self._wake:
            while not self._pending:
                self._wake.wait()
                if not self._pending:
                    return None
            self._running = heapq.heappop(self._pending)[2]
            self._interrupted.clear()
            self._changed(self.remaining)
            return self._running

    def done(self, item: Item, outcome: Outcome) -> None:
        """Write the history of the running prompt and take it off the queue."""
        with self._lock:
            self._running = None
            if len(self._history) >= HISTORY_SIZE:
                self._history.pop(next(iter(self._history)))
            word = "success" if outcome.success else "error"
            self._history[item.prompt_id] = {
                "prompt": item.as_json(),
                "outputs": outcome.outputs,
                "status": {"status_str": word, "completed": outcome.success, "messages": outcome.messages},
                "meta": outcome.meta,
            }
            self._changed(self.remaining)

    def snapshot(self) -> tuple[list[Item], list[Item]]:
        """Running and pending prompts, the latter with the next one first, as ComfyUI shows its heap."""
        with self._lock:
            return [self._running] if self._running else [], [entry[2] for entry in self._pending]

    def delete(self, prompt_id: str) -> bool:
        """Drop one pending prompt of this id; a running one is left alone."""
        with self._lock:
            for entry in self._pending:
                if entry[2].prompt_id == prompt_id:
                    self._pending.remove(entry)
                    heapq.heapify(self._pending)
                    self._changed(self.remaining)
                    return True
        return False

    def clear(self) -> None:
        """Drop all pending prompts."""
        with self._lock:
            self._pending.clear()
            self._changed(self.remaining)

    def history(self, prompt_id: str | None = None) -> dict[str, Json]:
        """All of the history, or that of one prompt ({} if it has none yet)."""
        with self._lock:
            if prompt_id is None:
                return dict(self._history)
            entry = self._history.get(prompt_id)
            return {} if entry is None else {prompt_id: copy.deepcopy(entry)}

    def forget(self, prompt_id: str | None = None) -> None:
        """Drop the history of one prompt, or all of it."""
        with self._lock:
            if prompt_id is None:
                self._history.clear()
            else:
                self._history.pop(prompt_id, None)

    @property
    def interrupted(self) -> threading.Event:
        """Set while the running prompt is asked to stop."""
        return self._interrupted

    def interrupt(self, prompt_id: str | None = None) -> bool:
        """Ask the running prompt to stop, if it is the one meant (None: whichever)."""
        with self._lock:
            if self._running is None or prompt_id not in (None, self._running.prompt_id):
                return False
            self._interrupted.set()
            return True

    def flag(self, flags: Flags) -> None:
        """Remember what POST /free wants, for after the current prompt."""
        with self._wake:
            self._flags.unload_models |= flags.unload_models
            self._flags.free_memory |= flags.free_memory
            self._wake.notify()

    def take_flags(self) -> Flags:
        """What POST /free asked for since the last call."""
        with self._lock:
            flags, self._flags = self._flags, Flags()
            return flags
