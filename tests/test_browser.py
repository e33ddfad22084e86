"""A joined video in a real browser: headless Chromium plays it to the end.  Skipped where there is none."""

from __future__ import annotations

import functools
import http.server
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_stitch import HEIGHT, THREE, WIDTH, clicks, join, plan_of, rendered, save

CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--autoplay-policy=no-user-gesture-required",
]
PLAY = """async () => {
    const video = document.querySelector('video');
    video.playbackRate = 4;
    const end = new Promise(done => { video.onended = done; video.onerror = done; });
    await video.play();
    await end;
    return {width: video.videoWidth, height: video.videoHeight, duration: video.duration,
            ended: video.ended, at: video.currentTime, error: video.error && video.error.message};
}"""


@pytest.fixture
def page_url(tmp_path: Path) -> Iterator[str]:
    """A page with a video of three segments, served on loopback."""
    sound = save(tmp_path / "s.wav", clicks(6, 16_000), 16_000)
    join(plan_of(THREE), rendered(tmp_path / "segments", THREE), sound, tmp_path / "talk.mp4", tmp_path)
    (tmp_path / "page.html").write_text("<video src='talk.mp4'></video>")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/page.html"
        server.shutdown()
        thread.join()


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (make programs installs it, as root)")
def test_chromium_plays_the_result_to_its_end(page_url: str) -> None:
    """Size and duration are right, the end is reached, and there is no error."""
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page()
        page.goto(page_url)
        seen = page.evaluate(PLAY)
        browser.close()
    assert seen["error"] is None
    assert seen["ended"]
    assert (seen["width"], seen["height"]) == (WIDTH, HEIGHT)
    assert seen["duration"] == pytest.approx(6.0, abs=0.05)
    assert seen["at"] == pytest.approx(seen["duration"], abs=0.05)
