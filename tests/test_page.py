"""The page in a real Chromium: upload, progress, playing early and late, cancel, errors; desk and phone."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from tests.conftest import ROOT
from tests.service_process import Service, running_service
from tests.test_browser import CHROMIUM, FLAGS

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium here (make programs installs Debian's, as root)"
)
WAIT = 240_000
"""Milliseconds; only a broken page takes as long."""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service whose windows take a moment."""
    folder = tmp_path_factory.mktemp("page")
    slow = "--draft-window-seconds 2"
    with running_service(
        folder / "data", uuid.uuid4().hex, folder / "log", INFINITETALK_DRAFT_ARGS=slow
    ) as running:
        yield running


DESK, PHONE = (1100, 900), (390, 844)


@pytest.fixture
def page(request: pytest.FixtureRequest, service: Service) -> Iterator[Page]:
    """The page, with Anna's token, in a window of that size; no error may reach its console."""
    width, height = getattr(request, "param", DESK)
    with sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": width, "height": height})
        troubles: list[str] = []
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.goto(service.url + "/")
        page.get_by_label("Token").fill("secret-of-anna")
        page.get_by_label("Token").blur()
        yield page
        if folder := os.environ.get("PAGE_SCREENSHOTS"):
            page.screenshot(path=Path(folder) / f"{request.node.name}.png", full_page=True)
        browser.close()
        assert troubles == []


def fill(page: Page, speech: Path) -> None:
    page.get_by_label("Portrait or video").set_input_files(ROOT / "examples" / "portrait.png")
    page.get_by_label("Speech").set_input_files(speech)


def plays(page: Page, frames: int) -> None:
    """The finished job that is shown plays to its end; every control has a name, nothing is too wide."""
    expect(page.locator("#summary")).to_contain_text(f"done: {frames} frames", timeout=WAIT)
    shown = page.evaluate(
        """async () => {
            const video = document.getElementById("video");
            video.muted = true;
            video.playbackRate = 8;
            await video.play();
            await new Promise((done) => video.addEventListener("ended", done, { once: true }));
            return [video.videoWidth > 0, Math.round(video.duration * 25), video.error];
        }"""
    )
    assert shown == [True, frames, None]
    nameless = """
        [...document.querySelectorAll("input, select, button, progress, video, img, [tabindex='0']")]
        .filter((one) => !one.labels?.length && !one.textContent.trim() && !one.ariaLabel && !one.alt)
        .map((one) => one.outerHTML)"""
    assert page.evaluate(nameless) == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_video_is_made_and_played(page: Page, speech_of: Callable[[int], Path]) -> None:
    """From the files to a video that plays to its end, with lanes and a seam report."""
    fill(page, speech_of(150))
    page.get_by_role("button", name="Make the video").click()
    expect(page.locator("#lanes .part i.done").first).to_be_visible(timeout=WAIT)
    plays(page, 150)
    expect(page.locator("#seams tbody tr")).to_have_count(1)
    expect(page.locator("#jobs .completed").first).to_be_visible()


@pytest.mark.parametrize("page", [PHONE], ids=["phone"], indirect=True)
def test_a_video_is_watched_on_a_phone(
    page: Page, service: Service, speech_of: Callable[[int], Path]
) -> None:
    """A job that another client has sent is in the list, and plays."""
    job = service.submit(150, speech_of)
    service.until_over(job)
    page.locator("#jobs button", has_text=job[:8]).click(timeout=WAIT)
    plays(page, 150)


def test_the_front_plays_while_the_rest_renders(
    page: Page, service: Service, speech_of: Callable[[int], Path]
) -> None:
    """The picture moves before the job is over; at its end the player goes on with the final video."""
    job = service.submit(600, speech_of)
    page.locator("#jobs button", has_text=job[:8]).click(timeout=WAIT)
    expect(page.locator("#front")).to_contain_text("of 0:24 can be watched already", timeout=WAIT)
    at = page.evaluate(
        """async () => {
            const video = document.getElementById("video");
            video.muted = true;
            await video.play();
            while (video.currentTime < 1) await new Promise((done) => setTimeout(done, 50));
            const scheme = video.currentSrc.slice(0, 5);
            return [video.currentTime, Math.round(video.duration), video.videoWidth > 0, scheme];
        }"""
    )
    assert service.job(job)["state"] == "in_progress"
    assert at[0] >= 1
    assert at[1:] == [24, True, "blob:"]
    expect(page.locator("#summary")).to_contain_text("done: 600 frames", timeout=WAIT)
    after = page.evaluate(
        """async () => {
            const video = document.getElementById("video");
            while (!video.currentSrc.includes("/video") || video.readyState < 2)
                await new Promise((done) => setTimeout(done, 50));
            return [video.currentTime, video.paused, video.error];
        }"""
    )
    assert after[0] >= at[0]
    assert after[1:] == [False, None]
    assert page.locator("#front").text_content() == ""
    page.get_by_text("Picture of the seams").click()
    picture = page.locator("#seams-picture")
    expect(picture).to_have_js_property("complete", True, timeout=WAIT)
    assert picture.evaluate("image => image.naturalWidth") > 500


def test_a_job_is_cancelled_and_errors_are_told(page: Page, speech_of: Callable[[int], Path]) -> None:
    """Cancel ends the job in the page too; a picture that is none is refused with the API's words."""
    fill(page, speech_of(1500))
    page.get_by_role("button", name="Make the video").click()
    page.get_by_role("button", name="Cancel", exact=True).click(timeout=WAIT)
    expect(page.locator("#summary")).to_have_text("cancelled", timeout=WAIT)
    expect(page.get_by_role("button", name="Try again")).to_be_visible()
    page.get_by_label("Portrait or video").set_input_files(ROOT / "README.md")
    page.get_by_role("button", name="Make the video").click()
    expect(page.get_by_role("alert")).to_contain_text("no picture that can be read", timeout=WAIT)
    page.get_by_label("Token").fill("nobody-at-all")
    page.get_by_label("Token").blur()
    expect(page.locator("#readiness")).to_contain_text("known token", timeout=WAIT)


def test_boxes_are_drawn_in_pixels_of_the_picture(page: Page, speech_of: Callable[[int], Path]) -> None:
    """With a second speaker, a box that is dragged on the preview becomes a field that can be typed too."""
    fill(page, speech_of(20))
    page.get_by_label("Second speaker").set_input_files(speech_of(25))
    stage = page.locator("#drawn")
    expect(stage).to_be_visible()
    stage.scroll_into_view_if_needed()
    place = stage.bounding_box()
    assert place is not None
    page.mouse.move(place["x"], place["y"])
    page.mouse.down()
    page.mouse.move(place["x"] + place["width"] / 2, place["y"] + place["height"] + 50)
    page.mouse.up()
    size = page.evaluate("[preview.naturalWidth, preview.naturalHeight]")
    x0, y0, x1, y1 = map(int, page.get_by_label("Speaker 1", exact=True).input_value().split(","))
    assert (x0, y0, y1) == (0, 0, size[1])
    assert abs(x1 - size[0] / 2) <= 2
    page.get_by_role("button", name="Clear boxes").click()
    assert page.get_by_label("Speaker 1", exact=True).input_value() == ""


def test_one_job_is_followed_at_a_time(page: Page, speech_of: Callable[[int], Path]) -> None:
    """Clicks that are faster than the server: only the last one's job is listened to."""
    fill(page, speech_of(1200))
    for _ in range(2):
        with page.expect_response("**/v1/jobs") as made:
            page.get_by_role("button", name="Make the video").click()
        row = page.locator("#jobs button").first
        expect(row.locator("code")).to_have_text(made.value.json()["id"][:8], timeout=WAIT)
        expect(row).to_contain_text("rendering", timeout=WAIT)
    open_now: set[str] = set()
    page.on("request", lambda asked: open_now.add(asked.url) if asked.url.endswith("/events") else None)
    for end in ("requestfinished", "requestfailed"):
        page.on(end, lambda asked: open_now.discard(asked.url))
    names = page.locator("#jobs button code").all_inner_texts()[:2]
    page.evaluate("""() => {
        const rows = [...document.querySelectorAll("#jobs button")].slice(0, 2);
        for (const row of [rows[0], rows[1], rows[0], rows[1]]) row.click();
    }""")
    expect(page.locator("#job-title")).to_have_text(f"Job {names[1]}")
    page.wait_for_timeout(1000)  # for listeners that should not be
    assert [url.split("/")[-2][:8] for url in open_now] == [names[1]]
    for number in (0, 1):
        page.locator("#jobs button").nth(number).click()
        page.locator("#cancel").click()
        expect(page.locator("#summary")).to_have_text("cancelled")
