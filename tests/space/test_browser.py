"""The page in a real browser, Debian's chromium, as a visitor meets it."""

import shutil

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from tests.space.conftest import OTHER, TEXT

CHROMIUM = shutil.which("chromium")
RASTER = ".js-plotly-plot .heatmaplayer"
WAIT = 60_000
expect.set_options(timeout=WAIT)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        # A container's root cannot have the sandbox.
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield running
        running.close()


@pytest.fixture
def page(browser, url, checkpoints) -> Page:
    """The page with a small checkpoint; what it asks of others than us and what goes wrong in it fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(WAIT)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: request.url.startswith(("data:", "blob:", url)) or errors.append(request.url))
    page.goto(url)
    # Our own checkpoint comes first.
    expect(page.get_by_text("spikelm-minilm-l6", exact=True).first).to_be_visible()
    choose(page, "Checkpoint", checkpoints / "masked")
    expect(page.get_by_text("2 layers, 16 wide")).to_be_visible()
    yield page
    assert not errors
    context.close()


def choose(page: Page, label: str, checkpoint: object) -> None:
    box = page.get_by_label(label)
    box.fill(str(checkpoint))
    box.press("Enter")


def show(page: Page, text: str) -> None:
    page.get_by_label("Sentence", exact=True).fill(text)
    page.get_by_role("button", name="Show").click()


def tokens(page: Page) -> list[str]:
    """The lines of the first raster, from above."""
    labels = page.locator(".js-plotly-plot").first.locator(".yaxislayer-above .ytick").all_text_contents()
    return [label.split()[1] for label in reversed(labels)]


def test_another_sentence_changes_the_picture(page):
    for text, word in ((TEXT, "[MASK]"), (OTHER, "sofa")):
        show(page, text)
        expect(page.locator(".js-plotly-plot").first).to_contain_text(word)
        assert tokens(page) == ["[CLS]", *text.split(), "[SEP]"]


def test_a_sentence_that_is_offered_is_shown_at_once(page):
    page.get_by_text("The cat sleeps on the sofa.").click()
    expect(page.locator(".js-plotly-plot").first).to_contain_text("sofa")


def test_under_the_mouse_are_a_neurons_amplitude_and_rate(page):
    raster = page.locator(".js-plotly-plot").first
    raster.scroll_into_view_if_needed()
    raster.locator(".nsewdrag").first.hover()
    hover = page.locator(".hoverlayer").first
    expect(hover).to_contain_text("amplitude")
    expect(hover).to_contain_text("fires at")


def test_two_models_stand_side_by_side_and_one_below_the_other_on_a_phone(page, checkpoints):
    show(page, TEXT)
    choose(page, "Beside it", checkpoints / "labels")
    expect(page.get_by_text("a question").first).to_be_visible()
    left, right = (page.get_by_role("cell", name=name).bounding_box() for name in ("elastic", "thrifty"))
    assert abs(left["y"] - right["y"]) < 200 and right["x"] > left["x"] + 300
    # What stood there alone has made room.
    page.wait_for_function("document.querySelector('.js-plotly-plot .main-svg').getBoundingClientRect().width < 640")
    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_function("document.documentElement.scrollWidth <= 390")
    left, right = (page.get_by_role("cell", name=name).bounding_box() for name in ("elastic", "thrifty"))
    assert right["y"] > left["y"] + 300


def test_what_is_typed_while_the_page_is_busy_is_shown_in_the_end(page, checkpoints):
    choose(page, "Beside it", checkpoints / "labels")
    show(page, "cat " * 30)
    show(page, OTHER)
    expect(page.locator(".js-plotly-plot:has-text('sofa')")).to_have_count(2)


def test_what_cannot_be_shown_is_said_on_the_page_and_can_be_mended(page, checkpoints):
    for text, message in (("", "The text is empty"), ("cat " * 40, "42 tokens")):
        show(page, text)
        expect(page.get_by_text(message)).to_be_visible()
        assert not page.locator(RASTER).count()
    show(page, TEXT)
    expect(page.locator(RASTER).first).to_be_visible()
    choose(page, "Checkpoint", checkpoints / "cut off")
    expect(page.get_by_text("cannot be loaded")).to_be_visible()
    assert "Traceback" not in page.content()
    choose(page, "Checkpoint", checkpoints / "labels")
    expect(page.locator(RASTER).first).to_be_visible()
