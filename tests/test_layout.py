"""The rules of the tree: who may import whom, and what a module must say of itself."""

from __future__ import annotations

import ast
import inspect
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import errors

ROOT = Path(__file__).resolve().parent.parent
FORBIDDEN = {
    "pipeline": {"ray", "fastapi", "starlette", "actors", "serve_app", "infinitetalk", "bench"},
    "actors": {"fastapi", "starlette", "serve_app", "infinitetalk", "bench"},
}
PURE = ("plan", "pauses", "progress", "timeline", "errors", "comfy_events", "job_timeline", "scheduling")
IMPURE = {"subprocess", "requests", "socket", "time", "os", "shutil", "tempfile"}


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Top-level names that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_imports_go_one_way(folder: str) -> None:
    """Imports go serve_app -> actors -> pipeline, never back; only actors know Ray."""
    wrong = {path.name: imported(path) & FORBIDDEN[folder] for path in modules(folder)}
    assert {name: names for name, names in wrong.items() if names} == {}


def test_pipeline_does_not_load_ray_through_others() -> None:
    """Importing all of ``pipeline`` brings neither Ray nor torch into the process."""
    names = [f"pipeline.{path.stem}" for path in (ROOT / "pipeline").glob("*.py") if path.stem != "__init__"]
    code = (
        f"import sys, {', '.join(names)}; print([m for m in ('ray', 'torch', 'fastapi') if m in sys.modules])"
    )
    reply = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert reply.stdout.strip() == "[]"


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_do_no_io(name: str) -> None:
    """Planning, progress and the event reducer know no clock, file, process or network."""
    assert imported(ROOT / "pipeline" / f"{name}.py") & IMPURE == set()


def test_only_ffmpeg_module_knows_the_ffmpeg_binary() -> None:
    """One module runs ffmpeg, one starts engines."""
    callers = {path.stem for path in modules("pipeline") if imported(path) & {"ffmpeg", "imageio_ffmpeg"}}
    assert callers == {"ffmpeg"}


@pytest.mark.parametrize("path", [p for f in ("pipeline", "actors", "bench") for p in modules(f)], ids=str)
def test_every_module_says_what_lives_in_it(path: Path) -> None:
    """Each module that holds code starts with a docstring."""
    tree = ast.parse(path.read_text())
    assert not tree.body or ast.get_docstring(tree)


def test_every_error_survives_pickling() -> None:
    """Errors cross Ray by pickle: type, fields and sentence arrive."""
    kinds = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.PipelineError)
    ]
    assert len(kinds) > 8
    for kind in kinds:
        own = kind.__init__ is not Exception.__init__
        fields = list(inspect.signature(kind.__init__).parameters)[1:] if own else ["word"]
        arguments = tuple(f"a {name}" for name in fields)
        original = kind(*arguments)
        copy = pickle.loads(pickle.dumps(original))
        assert type(copy) is kind
        assert vars(copy) == vars(original)
        assert str(copy) == str(original)


def test_the_document_tree_names_every_error() -> None:
    """The tree in the docstring of ``errors`` is complete."""
    kinds = [
        name
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.PipelineError)
    ]
    missing = [name for name in kinds if name not in (errors.__doc__ or "")]
    assert missing == []
