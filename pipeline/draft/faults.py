"""How the draft engine can be told to misbehave: which prompt, and in which way.  No behaviour here.

Told by ``--draft-fault KIND@N`` (N counts accepted prompts from 1) or ``--draft-fault die-at-start``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

KINDS = {
    "oom": "the sampler fails with torch.OutOfMemoryError",
    "silent": "the open WebSockets get nothing more from the middle of the sampler on; the prompt finishes",
    "crash": "the process dies in the middle of the sampler",
    "garbage": "the N-th POST /prompt and all answers after it are not JSON",
    "broken": "from the N-th prompt on the sampler fails with a CUDA error",
    "leak": "the sampler fails, and half of the GPU's memory stays in use until the process ends",
    "hang": "the sampler never finishes; all routes answer, an interrupt is taken and changes nothing",
}
DIE_AT_START = "die-at-start"


@dataclass(frozen=True, slots=True)
class Fault:
    """One misbehaviour: ``kind`` of KINDS hits the ``prompt``-th accepted prompt (1-based)."""

    kind: str
    prompt: int


def parse_fault(text: str) -> Fault:
    """Fault of "KIND@N" or "die-at-start" (prompt 0).

    Raises:
        ValueError: no such kind, or N is no positive number.

    >>> parse_fault("oom@2")
    Fault(kind='oom', prompt=2)
    """
    if text == DIE_AT_START:
        return Fault(text, 0)
    kind, _, number = text.partition("@")
    if kind not in KINDS or not number.isdigit() or int(number) < 1:
        raise ValueError(f"{text!r} is not KIND@N with KIND one of {', '.join(KINDS)} and N >= 1")
    return Fault(kind, int(number))


def faults_of(faults: Iterable[Fault], prompt: int) -> frozenset[str]:
    """Kinds that hit the ``prompt``-th prompt; garbage and broken hit that one and all later ones.

    >>> sorted(faults_of([Fault("garbage", 2), Fault("oom", 3)], 3))
    ['garbage', 'oom']
    """
    return frozenset(
        fault.kind
        for fault in faults
        if fault.prompt == prompt or (fault.kind in ("garbage", "broken") and fault.prompt <= prompt)
    )
