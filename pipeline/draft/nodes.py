"""The draft engine's nodes as the executor sees them; what they do is in ``pipeline.draft.node_functions``.

Light on purpose: the libraries for pictures, sound and video are imported when the first prompt needs them,
so that the server answers at once.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.draft.execution import Context, Inputs, NodeError, Result
from pipeline.draft.folders import Folders, OutsideFolder
from pipeline.draft.schemas import INPUT_FILES, SCHEMAS

if TYPE_CHECKING:
    from pipeline.draft.node_functions import NodeFunctions


class DraftNodes:
    """All nodes of one engine.

    ``window_seconds`` is what a window of 81 frames shall take in the sampler; ``drift``: ``Window.drift``.
    """

    def __init__(self, folders: Folders, window_seconds: float, drift: float = 0.0) -> None:
        self._folders, self._window_seconds, self._drift = folders, window_seconds, drift
        self._functions: NodeFunctions | None = None
        self._digests: dict[tuple[Path, int, int], str] = {}

    def prepare(self) -> None:
        """Import what the nodes need, before the first prompt asks."""
        self._loaded()

    def is_output(self, name: str) -> bool:
        """Is it a node that a prompt is run for?"""
        return bool(SCHEMAS[name]["output_node"])

    def fingerprint(self, name: str, inputs: Inputs) -> str:
        """Hash of the content of the file that a loader reads; empty for other nodes."""
        for node, key in INPUT_FILES:
            if node == name and isinstance(inputs.get(key), str):
                try:
                    return self._digest(self._folders.find(inputs[key]))
                except (OutsideFolder, OSError):
                    return "missing"
        return ""

    def run(self, name: str, inputs: Inputs, context: Context) -> Result:
        """Execute a node; inputs that its schema does not have are dropped, as in ComfyUI.

        Raises:
            NodeError: as ComfyUI's node would fail.
            Interrupted: somebody asked for it.
        """
        sections = SCHEMAS[name]["input"]
        known = {key for section in ("required", "optional") for key in sections.get(section, {})}
        given = {key: value for key, value in inputs.items() if key.split(".")[0] in known}
        functions = self._loaded()
        handler = functions.table.get(name)
        if handler is None:
            raise NodeError("NotImplementedError", f"the draft engine can't execute {name}")
        return handler(given, context)

    def _loaded(self) -> NodeFunctions:
        if self._functions is None:
            from pipeline.draft.node_functions import NodeFunctions
            from pipeline.draft.wrapper_functions import wrapper_table

            self._functions = NodeFunctions(self._folders, self._window_seconds, self._drift)
            self._functions.table |= wrapper_table(self._functions)
        return self._functions

    def _digest(self, path: Path) -> str:
        state = path.stat()
        key = (path, state.st_mtime_ns, state.st_size)
        if key not in self._digests:
            if len(self._digests) > 100:
                self._digests.clear()
            self._digests[key] = hashlib.sha256(path.read_bytes()).hexdigest()
        return self._digests[key]
