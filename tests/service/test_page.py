"""The page in a real browser: by mouse, by keyboard, by touch, with a key, in both colours."""

import base64
import csv
import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import pytest
from playwright.sync_api import BrowserContext, Page, Playwright, expect, sync_playwright

from pipeline.service.access import read_api_keys
from pipeline.service.app import ASSETS
from service.gallery import AWKWARD_KEYS, Gallery, make_image
from service.services import ColourEmbedder, Service, run_service

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
KEY = "photos/000.tar/00003.jpg"

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium; apt-get install chromium")


@pytest.fixture(scope="module")
def playwright() -> Iterator[Playwright]:
    with sync_playwright() as running:
        yield running


@pytest.fixture(scope="module")
def open_browser(playwright, tmp_path_factory):
    """Return a function that starts a browser of a kind, once."""
    started: dict[str, BrowserContext] = {}

    def start(name: str = "desk", **settings) -> BrowserContext:
        if name not in started:
            started[name] = playwright.chromium.launch_persistent_context(
                tmp_path_factory.mktemp(name),
                executable_path=CHROMIUM,
                args=list(FLAGS),
                **settings,
            )
        return started[name]

    yield start
    for browser in started.values():
        browser.close()


@pytest.fixture
def open_page(open_browser, service):
    """Return a function that opens the page and fails the test on any complaint of the browser."""
    opened: list[tuple[Page, list[str]]] = []

    def open_(path: str = "/", *, url: str | None = None, **browser) -> Page:
        page = open_browser(**browser).new_page()
        complaints: list[str] = []
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
        page.on("request", lambda r: complaints.append(r.url) if is_foreign(r.url) else None)
        opened.append((page, complaints))
        page.goto((url or service.url) + path)
        return page

    yield open_
    for page, complaints in opened:
        page.close()
        assert [c for c in complaints if "status of 4" not in c] == []


def is_foreign(url: str) -> bool:
    return not url.startswith(("http://127.0.0.1:", "blob:http://127.0.0.1:", "data:"))


def find_keys(page: Page) -> list[str]:
    expect(page.locator("#grid")).not_to_have_attribute("aria-busy", "true")
    return page.locator(".pick").evaluate_all("links => links.map(link => link.dataset.key)")


def wait_for(page: Page, expression: str) -> None:
    """Poll an expression until it holds; Playwright's own way needs eval, which we forbid."""
    deadline = time.monotonic() + 20
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, f"it never held: {expression}"


def expect_neighbours(page: Page, service: Service, key: str = KEY, k: int = 24) -> None:
    expect(page.locator("#status")).to_contain_text("neighbours, found in")
    assert find_keys(page) == [n.key for n in service.index.neighbours_of(key, k)]


def test_integers_of_64_bits_are_shown_with_all_their_digits(open_page):
    page = open_page()
    expect(page.locator(".card")).to_have_count(24)

    def answer(route):
        fetched = route.fetch()
        body = re.sub(r'"cls":"\d"', '"cls":18446744073709551615', fetched.text())
        route.fulfill(response=fetched, body=body)

    page.route("**/v1/search", answer)
    page.goto(page.url.split("?")[0].rstrip("/") + "/?key=" + quote(KEY))
    expect(page.locator(".card .facts").first).to_contain_text("18446744073709551615")


def test_the_start_shows_random_images_and_what_is_served(open_page, service):
    page = open_page()
    expect(page.locator(".card")).to_have_count(24)
    expect(page.locator("#status")).to_have_text("24 of 60 indexed images, at random")
    expect(page.locator("#freshness")).to_contain_text(
        f"generation {service.index.info.generation}"
    )
    expect(page.locator("#freshness")).to_contain_text("images 60")
    expect(page.locator("#freshness")).to_contain_text("newest image")
    wait_for(page, "[...document.images].every(i => i.hidden || !i.src || i.complete)")
    sizes = page.locator(".thumb img").evaluate_all("all => all.map(i => i.naturalWidth)")
    assert min(sizes[:6]) > 100


def test_a_click_searches_on_and_back_comes_back(open_page, service):
    page = open_page()
    first = page.locator(".pick").nth(5)
    key = first.get_attribute("data-key")
    first.click()
    expect(page.locator("#query-title")).to_have_text(key.rsplit("/", 1)[1])
    expect_neighbours(page, service, key)
    page.locator(".pick").nth(2).click()
    expect(page.locator("#query-title")).not_to_have_text(key.rsplit("/", 1)[1])
    page.go_back()
    expect(page.locator("#query-title")).to_have_text(key.rsplit("/", 1)[1])
    expect_neighbours(page, service, key)
    page.go_back()
    expect(page.locator("#query-title")).to_have_text("Find similar images")
    page.go_forward()
    expect_neighbours(page, service, key)


def test_an_address_can_be_shared_and_reloaded(open_page, service):
    page = open_page(f"/?key={KEY}&filter=colour+%3D+navy&k=12")
    expect(page.locator(".card")).to_have_count(10)
    assert page.locator("#filter").input_value() == "colour = navy"
    before = find_keys(page)
    page.reload()
    expect(page.locator(".card")).to_have_count(10)
    assert find_keys(page) == before


def test_a_card_shows_score_key_and_metadata(open_page, service):
    page = open_page(f"/?key={KEY}")
    expect_neighbours(page, service)
    best = service.index.neighbours_of(KEY, 1)[0]
    card = page.locator(".card").first
    expect(card.locator(".score")).to_have_text(f"{best.score:.3f}")
    expect(card.locator(".name")).to_have_text(best.key.rsplit("/", 1)[1])
    expect(card.locator(".facts")).to_contain_text(f"colour{best.columns['colour']}")


def test_the_filter_box_filters_and_explains_its_mistakes(open_page, service):
    page = open_page(f"/?key={KEY}")
    expect_neighbours(page, service)
    page.get_by_label("Filter").fill("colour = navy and price > 10")
    page.get_by_label("Filter").press("Enter")
    expect(page.locator(".facts").first).to_contain_text("colournavy")
    page.get_by_label("Filter").fill("color = navy")
    page.get_by_role("button", name="Apply").click()
    alert = page.get_by_role("alert")
    expect(alert).to_have_text("no column 'color' to filter by; did you mean 'colour'?")
    expect(page.get_by_label("Filter")).to_have_attribute("aria-invalid", "true")
    page.get_by_label("Filter").fill("price > 1000")
    page.get_by_label("Filter").press("Enter")
    expect(page.locator("#status")).to_have_text("No image fulfils the filter")
    expect(alert).to_have_count(0)


def expect_colour(page: Page, colour: str, count: int) -> None:
    expect(page.locator(".card")).to_have_count(count)
    expect(page.locator(".facts", has_text=f"colour{colour}")).to_have_count(count)


def test_the_filter_acts_before_there_is_a_query(open_page):
    page = open_page()
    expect(page.locator("#status")).to_have_text("24 of 60 indexed images, at random")
    page.get_by_label("Filter").fill("colour = navy")
    page.get_by_role("button", name="Apply").click()
    expect(page.locator("#status")).to_have_text("10 images that fulfil the filter, at random")
    expect_colour(page, "navy", 10)
    page.get_by_label("Results").select_option("12")
    expect_colour(page, "navy", 10)
    page.get_by_label("Filter").fill("color = navy")
    page.get_by_label("Filter").press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("did you mean 'colour'?")
    page.get_by_label("Filter").fill("")
    page.get_by_label("Filter").press("Enter")
    expect(page.locator("#status")).to_have_text("12 of 60 indexed images, at random")
    page.get_by_label("Filter").fill("price > 1000")
    page.get_by_label("Filter").press("Enter")
    expect(page.locator("#status")).to_have_text("No image fulfils the filter")
    expect(page.locator(".card")).to_have_count(0)


def test_a_link_with_a_filter_filters_and_the_filter_stays_on_the_way(open_page):
    page = open_page("/?filter=colour+%3D+navy")
    expect_colour(page, "navy", 10)
    page.locator(".pick").nth(2).click()
    expect(page.locator("#status")).to_contain_text("9 neighbours")
    expect_colour(page, "navy", 9)
    for _ in range(4):  # one in six would be navy by chance
        page.get_by_role("button", name="Random image").click()
        expect(page.locator("#status")).to_contain_text("9 neighbours")
    page.get_by_label("Filter").fill("price > 1000")
    page.get_by_label("Filter").press("Enter")
    page.get_by_role("button", name="Random image").click()
    expect(page.locator("#status")).to_have_text("No image fulfils the filter")


def test_the_map_shows_what_the_filter_leaves(open_page):
    page = open_page("/?view=map&filter=colour+%3D+navy")
    expect(page.locator("#map-text")).to_have_text("10 of 60 images fulfil the filter")
    page.get_by_label("Filter").fill("colour in (navy, teal)")
    page.get_by_label("Filter").press("Enter")
    expect(page.locator("#map-text")).to_have_text("20 of 60 images fulfil the filter")
    page.get_by_label("Filter").fill("color = navy")
    page.get_by_label("Filter").press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("did you mean 'colour'?")
    page.get_by_label("Filter").fill("")
    page.get_by_role("button", name="Apply").click()
    expect(page.locator("#map-text")).to_have_text("60 of 60 images")


@pytest.mark.parametrize(
    ("path", "controls"),
    [
        ("/", "filter k"),
        ("/?view=map", "filter"),
        (f"/?key={KEY}", "filter k exact"),
        (f"/?key={KEY}&view=map", "filter k exact"),
        (f"/?key={KEY}&view=groups", ""),
        ("/?view=failures", ""),
    ],
)
def test_a_view_shows_the_controls_that_act_on_it_and_no_others(open_page, path, controls):
    page = open_page(path)
    expect(page.locator("#freshness")).to_contain_text("images 60")
    shown = page.evaluate(
        "['filter', 'k', 'exact', 'apply'].filter((id) => document.getElementById(id).offsetParent)"
    )
    assert " ".join(shown) == f"{controls} apply" * bool(controls)


def test_facets_count_and_write_the_filter(open_page):
    page = open_page()
    colours = page.locator(".facet[data-column=colour]")
    expect(colours.locator("li").first).to_contain_text("10")
    colours.get_by_label("navy").click()
    expect(page.locator("#filter")).to_have_value("colour = navy")
    expect_colour(page, "navy", 10)
    colours.get_by_label("teal").click()
    expect(page.locator("#filter")).to_have_value("colour in (navy, teal)")
    expect(colours.get_by_label("teal")).to_be_focused()
    page.get_by_label("Least price").fill("50")
    page.get_by_label("Least price").press("Enter")
    expect(page.locator("#filter")).to_have_value("colour in (navy, teal) and price >= 50")
    expect(page.get_by_label("Least price")).to_have_value("50")
    page.get_by_label("Filter").fill('cls = "1" or cls = 2')
    page.get_by_label("Filter").press("Enter")
    expect(colours.get_by_label("navy")).not_to_be_checked()
    colours.get_by_label("navy").click()
    expect(page.locator("#filter")).to_have_value('(cls = "1" or cls = 2) and colour = navy')
    page.get_by_role("button", name="Reset").click()
    expect(page.locator("#status")).to_have_text("24 of 60 indexed images, at random")


def test_what_is_selected_becomes_a_table_and_examples(open_page, service):
    page = open_page(f"/?key={KEY}")
    expect_neighbours(page, service)
    keys = find_keys(page)
    for number in (0, 2):
        page.get_by_label(f"Select {keys[number].rsplit('/', 1)[1]}").check(force=True)
    expect(page.locator("#selected")).to_have_text("2 selected")
    with page.expect_download() as saved:
        page.get_by_role("button", name="Save as CSV").click()
    rows = list(csv.DictReader(saved.value.path().read_text().splitlines()))
    assert [row["key"] for row in rows] == [keys[0], keys[2]]
    assert rows[0]["colour"] == service.index.snapshot.find(keys[0]).columns["colour"]
    with page.expect_download() as saved:
        page.get_by_role("button", name="Save as JSON").click()
    assert [row["key"] for row in json.loads(saved.value.path().read_text())] == [keys[0], keys[2]]
    page.get_by_role("button", name="Less like these").click()
    expect(page.locator("#query-title")).to_have_text("Like 1 image, unlike 2 images")
    assert not {KEY, keys[0], keys[2]} & set(find_keys(page))
    page.reload()
    expect(page.locator("#examples button")).to_have_count(3)
    page.get_by_role("button", name=f"Leave out {keys[2].rsplit('/', 1)[1]}").click()
    expect(page.locator("#query-title")).to_have_text("Like 1 image, unlike 1 image")
    page.get_by_role("button", name="Clear", exact=True).click()
    expect(page.locator("#query-title")).to_have_text("Find similar images")


def test_the_map_is_coloured_and_a_lasso_selects(open_page):
    page = open_page("/?view=map")
    expect(page.locator("#map-text")).to_have_text("60 of 60 images")
    page.get_by_label("Colour by").select_option("colour")
    expect(page.locator("#legend li")).to_have_count(6)
    page.get_by_role("button", name="Select with a lasso").click()
    box = page.locator("#map").bounding_box()
    x, y, w, h = (box[name] for name in ("x", "y", "width", "height"))
    page.mouse.move(x + 24, y + h - 24)  # the corners are round
    page.mouse.down()
    for px, py in ((w - 4, h - 4), (w - 4, 4), (4, 4), (4, h - 4)):
        page.mouse.move(x + px, y + py)
    page.mouse.up()
    expect(page.locator("#selected")).to_have_text("60 selected")
    with page.expect_download() as saved:
        page.get_by_role("button", name="Save as JSON").click()
    rows = json.loads(saved.value.path().read_text())
    assert len({row["colour"] for row in rows}) == 6


def test_duplicates_and_failures_are_there_to_look_through(open_page, tmp_path):
    gallery = Gallery(tmp_path)
    gallery.add_shard(12, broken=(2,))
    gallery.images = 3
    gallery.add_shard(3)
    gallery.build()
    with run_service(gallery.open()) as running:
        page = open_page("/?view=groups", url=running.url)
        expect(page.locator("#status")).to_contain_text("3 groups, equal files")
        page.get_by_role("button", name="Select all but the first").first.click()
        expect(page.locator("#selected")).to_have_text("1 selected")
        page.get_by_role("link", name="Failed").click()
        expect(page.locator("#status")).to_have_text("No embedding: 1 truncated")
        expect(page.locator(".failure")).to_contain_text("cut off")
        wait_for(page, "document.querySelector('.failure img').naturalWidth > 100")
        page.close()


def test_every_key_has_its_picture_everywhere(open_page, awkward_gallery):
    with run_service(awkward_gallery.open(), embedder=ColourEmbedder()) as running:
        page = open_page(url=running.url)
        expect(page.locator(".card")).to_have_count(len(AWKWARD_KEYS))
        expect(page.locator(".thumb.empty")).to_have_count(0)
        shown = "[...document.querySelectorAll('.thumb img')].every((i) => i.naturalWidth)"
        for image in page.locator(".thumb img").all():
            image.scroll_into_view_if_needed()
        wait_for(page, shown)
        for end in AWKWARD_KEYS:
            key = f"photos/000.tar/{end}"
            page.goto(f"{running.url}/?key={quote(key, safe='')}")
            expect(page.locator("#status")).to_contain_text("neighbours, found in")
            wait_for(page, "document.getElementById('query-image').naturalWidth > 100")
            assert running.images_read.count(key) >= 1
            assert find_keys(page) == [
                n.key for n in running.index.neighbours_of(key, len(AWKWARD_KEYS))
            ]


def test_a_chosen_picture_is_searched_for(open_page, service):
    page = open_page()
    picture = {"name": "mine.jpg", "mimeType": "image/jpeg", "buffer": make_image(3)}
    page.locator("#file").set_input_files(picture)
    expect(page.locator("#query-title")).to_have_text("mine.jpg")
    expect(page.locator("#status")).to_contain_text("24 neighbours")
    expect(page.locator("#classes li")).to_have_count(5)
    expected = find_keys(page)
    page.locator(".pick").first.click()
    expect(page.locator("#query-title")).not_to_have_text("mine.jpg")
    page.go_back()
    expect(page.locator("#query-title")).to_have_text("mine.jpg")
    assert find_keys(page) == expected
    page.reload()
    expect(page.locator("#query-title")).to_have_text("mine.jpg")
    expect(page.locator("#status")).to_contain_text("24 neighbours")
    assert find_keys(page) == expected


@pytest.mark.parametrize(
    ("event", "transfer"), [("paste", "clipboardData"), ("drop", "dataTransfer")]
)
def test_a_picture_can_be_pasted_and_dropped(open_page, event, transfer):
    page = open_page()
    expect(page.locator(".card")).to_have_count(24)
    page.evaluate(
        """([event, transfer, text]) => {
            const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
            const data = new DataTransfer();
            data.items.add(new File([bytes], "given.png", { type: "image/png" }));
            const kind = event === "paste" ? ClipboardEvent : DragEvent;
            const made = new kind(event, { [transfer]: data, bubbles: true, cancelable: true });
            document.body.dispatchEvent(made);
        }""",
        [event, transfer, base64.b64encode(make_image(5, format="PNG")).decode()],
    )
    expect(page.locator("#query-title")).to_have_text("given.png")
    expect(page.locator("#status")).to_contain_text("24 neighbours")


def test_a_broken_picture_says_so_and_the_page_goes_on(open_page):
    page = open_page()
    broken = {"name": "broken.jpg", "mimeType": "image/jpeg", "buffer": b"not a picture"}
    page.locator("#file").set_input_files(broken)
    expect(page.get_by_role("alert")).to_contain_text("the image is unsupported")
    page.get_by_role("button", name="Random image").click()
    expect(page.locator("#status")).to_contain_text("neighbours")
    expect(page.get_by_role("alert")).to_have_count(0)


def test_more_neighbours_come_on_demand(open_page, service):
    page = open_page(f"/?key={KEY}&k=12")
    expect(page.locator(".card")).to_have_count(12)
    page.get_by_role("button", name="Show more").click()
    expect(page.locator(".card")).to_have_count(24)
    assert find_keys(page) == [n.key for n in service.index.neighbours_of(KEY, 24)]


def test_everything_works_from_the_keyboard(open_page, service):
    page = open_page(f"/?key={KEY}")
    expect_neighbours(page, service)
    page.keyboard.press("/")
    expect(page.locator("#filter")).to_be_focused()
    page.keyboard.press("Escape")
    page.locator(".pick").first.focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator(".pick").nth(1)).to_be_focused()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowUp")
    expect(page.locator(".pick").nth(1)).to_be_focused()
    page.keyboard.press("i")
    dialog = page.get_by_role("dialog")
    expect(dialog).to_be_visible()
    expect(dialog).to_contain_text(find_keys(page)[1])
    page.keyboard.press("Escape")
    expect(dialog).to_have_count(0)
    key = find_keys(page)[1]
    page.locator(".pick").nth(1).focus()
    page.keyboard.press("Enter")
    expect(page.locator("#query-title")).to_have_text(key.rsplit("/", 1)[1])
    expect_neighbours(page, service, key)
    expect(page.locator(".pick").first).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(page.locator(".pick").nth(1)).to_be_focused()
    with page.expect_response(lambda response: "/v1/sample" in response.url) as drawn:
        page.keyboard.press("r")  # which may draw the same image again
    (image,) = drawn.value.json()["items"]
    expect(page.locator("#query-title")).to_have_text(image["key"].rsplit("/", 1)[1])


def test_the_first_tab_skips_to_the_results(open_page):
    page = open_page()
    expect(page.locator(".card")).to_have_count(24)
    page.keyboard.press("Tab")
    expect(page.get_by_text("Skip to the results")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#main")).to_be_focused()


def test_every_control_has_a_name_and_every_picture_a_text(open_page, service):
    page = open_page(f"/?key={KEY}")
    expect_neighbours(page, service)
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("a, button, input, select, canvas, dialog")]
            .filter((e) => !(e.getAttribute("aria-label") || e.textContent.trim()
                || e.labels?.length || e.getAttribute("aria-labelledby")))
            .map((e) => e.outerHTML)"""
    )
    assert nameless == []
    assert page.evaluate("[...document.images].every((i) => i.hasAttribute('alt'))")
    for role, name in (("main", None), ("navigation", "Views"), ("search", "Options")):
        expect(page.get_by_role(role, name=name)).to_have_count(1)
    assert page.evaluate("document.documentElement.lang") == "en"


def test_details_show_the_picture_all_metadata_and_the_way_on(open_page, service):
    page = open_page(f"/?key={KEY}")
    expect_neighbours(page, service)
    key = find_keys(page)[0]
    page.get_by_role("button", name=f"Details of {key.rsplit('/', 1)[1]}").click()
    dialog = page.get_by_role("dialog", name=key)
    for name in ("colour", "price", "cls", "size"):
        expect(dialog.locator("dt", has_text=name)).to_have_count(1)
    original = dialog.get_by_role("link", name="Open the original").get_attribute("href")
    assert page.evaluate(f"fetch({original!r}).then((answer) => answer.status)") == 200
    assert f"key={quote(key, safe='')}&size=original" in original
    dialog.get_by_role("link", name="Search from it").click()
    expect(page.locator("#query-title")).to_have_text(key.rsplit("/", 1)[1])
    expect_neighbours(page, service, key)


def test_the_map_shows_the_collection_and_searches_from_a_point(open_page, service):
    page = open_page()
    expect(page.locator(".card")).to_have_count(24)
    page.get_by_role("link", name="Map").click()
    canvas = page.locator("#map")
    expect(page.locator("#map-text")).to_have_text("60 of 60 images")
    wait_for(page, COUNT_COLOURS + " > 20")
    page.get_by_role("button", name="Zoom in").click()
    canvas.focus()
    page.keyboard.press("+")
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#map-text")).to_contain_text("photos/000.tar/")
    key = page.locator("#map-text").text_content()
    page.keyboard.press("Enter")
    expect(page.locator("#query-title")).to_have_text(key.rsplit("/", 1)[1])
    expect_neighbours(page, service, key)
    page.go_back()
    expect(canvas).to_be_visible()


COUNT_COLOURS = """(() => {
    const canvas = document.getElementById("map");
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    const seen = new Set();
    for (let i = 0; i < data.length; i += 4 * 97) seen.add(data.slice(i, i + 3).join());
    return seen.size;
})()"""


def test_a_click_on_the_map_searches_from_the_nearest_image(open_page, service):
    page = open_page("/?view=map")
    expect(page.locator("#map-text")).to_have_text("60 of 60 images")
    wait_for(page, COUNT_COLOURS + " > 20")
    place = page.evaluate(
        """() => {
            const canvas = document.getElementById("map");
            const { width, height } = canvas;
            const { data } = canvas.getContext("2d").getImageData(0, 0, width, height);
            for (let y = 60; y < height - 60; y += 3) for (let x = 60; x < width - 160; x += 3) {
                const i = 4 * (y * width + x);
                if (data[i + 3] && Math.max(data[i], data[i + 1], data[i + 2])
                    - Math.min(data[i], data[i + 1], data[i + 2]) > 90) {
                    const ratio = devicePixelRatio || 1;
                    return { x: x / ratio, y: y / ratio };
                }
            }
        }"""
    )
    page.locator("#map").click(position=place)
    expect(page.locator("#status")).to_contain_text("neighbours")
    assert "key=" in page.url
    page.locator("#view-map").click()
    page.mouse.wheel(0, -400)
    expect(page.locator("#map")).to_be_visible()


def test_on_a_phone_everything_fits_and_answers_to_touch(open_page, service):
    page = open_page(name="phone", **PHONE)
    expect(page.locator(".card")).to_have_count(24)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    small = page.evaluate(
        """() => [...document.querySelectorAll(".button, .pick, input[type=text], select")]
            .filter((e) => e.offsetParent && e.getBoundingClientRect().height < 40)
            .map((e) => e.outerHTML)"""
    )
    assert small == []
    page.locator(".pick").first.tap()
    expect(page.locator("#status")).to_contain_text("24 neighbours")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.get_by_role("link", name="Map").tap()
    expect(page.locator("#map")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def read_contrast(page: Page, selector: str, *, of: str = "color") -> float:
    """Return the contrast of an element's text or edge with its ground, as WCAG defines it."""
    return page.evaluate(
        """([selector, of]) => {
            const colourOf = (element, name) => getComputedStyle(element)[name];
            const bend = (v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
            const light = (text) => {
                const [r, g, b] = text.match(/[\\d.]+/g).map((v) => bend(Number(v) / 255));
                return 0.2126 * r + 0.7152 * g + 0.0722 * b;
            };
            const element = document.querySelector(selector);
            let ground = of === "color" ? element : element.parentElement;
            while (colourOf(ground, "backgroundColor").endsWith(", 0)")) {
                ground = ground.parentElement;
            }
            const pair = [colourOf(element, of), colourOf(ground, "backgroundColor")];
            const [b, a] = pair.map(light).sort((x, y) => x - y);
            return (a + 0.05) / (b + 0.05);
        }""",
        [selector, of],
    )


def test_both_colour_schemes_are_readable_and_can_be_chosen(open_page):
    page = open_page(f"/?key={KEY}")
    expect(page.locator(".card").first).to_be_visible()
    grounds = []
    for theme in ("light", "dark"):
        while page.locator("#theme").text_content() != f"Theme: {theme}":
            page.locator("#theme").click()
        grounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        for selector in ("#query-title", "#query-text", ".name", ".facts dt", "#status", "#choose"):
            assert read_contrast(page, selector) >= 4.5, (theme, selector)
    assert grounds[0] != grounds[1]
    page.reload()
    expect(page.locator("#theme")).to_have_text("Theme: dark")
    page.locator("#theme").click()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") in grounds


def test_the_edges_of_controls_stand_out_from_what_they_lie_on(open_page):
    page = open_page(f"/?key={KEY}&view=map")
    expect(page.locator("#map-text")).to_have_text("60 of 60 images")
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for selector in ("#random", "#filter", "#k", "#zoom-in", "#options button"):
            assert read_contrast(page, selector, of="borderTopColor") >= 3, (scheme, selector)


def test_with_api_keys_the_page_asks_for_one_and_shows_pictures_with_it(
    open_page, gallery: Gallery, tmp_path: Path
):
    file = tmp_path / "keys"
    file.write_text("a-key-of-twenty-four-chars")
    with run_service(gallery.open(), keys=read_api_keys(str(file))) as guarded:
        page = open_page(f"/?key={KEY}", url=guarded.url)
        dialog = page.get_by_role("dialog", name="An API key is needed")
        dialog.get_by_label("API key").fill("a wrong one")
        dialog.get_by_role("button", name="Go on").click()
        expect(dialog.get_by_role("alert")).to_have_text("This key is not accepted.")
        dialog.get_by_label("API key").fill("a-key-of-twenty-four-chars")
        dialog.get_by_role("button", name="Go on").click()
        expect(page.locator(".card")).to_have_count(24)
        wait_for(page, "document.querySelector('.thumb img').naturalWidth > 100")
        assert page.locator(".thumb img").first.get_attribute("src").startswith("blob:")


def test_the_key_dialog_can_be_left_and_opened_again(open_page, gallery, tmp_path):
    file = tmp_path / "keys"
    file.write_text("a-key-of-twenty-four-chars")
    with run_service(gallery.open(), keys=read_api_keys(str(file))) as guarded:
        page = open_page(url=guarded.url)
        dialog = page.get_by_role("dialog", name="An API key is needed")
        for _ in range(2):
            expect(dialog).to_be_visible()
            page.keyboard.press("Escape")
            page.keyboard.press("Escape")
            expect(dialog).to_have_count(0)
            expect(page.get_by_role("alert")).to_contain_text("without an API key")
            page.get_by_role("button", name="Enter the API key").click()
        dialog.get_by_label("API key").fill("a-key-of-twenty-four-chars")
        dialog.get_by_label("API key").press("Enter")
        expect(page.locator(".card")).to_have_count(24)
        expect(page.get_by_role("alert")).to_have_count(0)
        expect(page.get_by_role("button", name="Enter the API key")).to_have_count(0)
        page.close()


def test_a_forwarded_port_is_answered_by_the_names_of_this_machine(open_page, gallery):
    with run_service(gallery.open(), hosts=frozenset({"lookups.internal"})) as running:
        port = running.url.rsplit(":", 1)[1]
        page = open_page(url=f"http://127.0.0.1:{port}")
        expect(page.locator(".card")).to_have_count(24)
        page.close()  # before the service ends, or its pictures are missed


def test_a_form_on_the_page_of_another_site_is_refused(open_page, service, gallery, tmp_path):
    """A form needs no leave of the service it is sent to, so that the service has to look."""
    (tmp_path / "form.html").write_text(
        f'''<form method="post" enctype="multipart/form-data" action="{service.url}/v1/search">
        <input name="options" value="{{}}"><button>Send</button></form>'''
    )
    handler = partial(QuietHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as other:
        threading.Thread(target=other.serve_forever).start()
        page = open_page("/form.html", url=f"http://127.0.0.1:{other.server_port}")
        with page.expect_response("**/v1/search") as answered:
            page.get_by_role("button", name="Send").click()
        other.shutdown()
    assert answered.value.status == 403
    assert answered.value.json()["code"] == "cross_site"


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_a_service_without_backbone_and_pictures_offers_neither(open_page, gallery):
    with run_service(gallery.open(), read=None) as plain:
        page = open_page(url=plain.url)
        expect(page.locator(".thumb.empty")).to_have_count(24)
        expect(page.locator("#choose")).to_be_hidden()
        expect(page.locator("#query-text")).to_have_text("Start from an indexed image below.")
        page.locator(".pick").first.click()
        expect(page.locator("#status")).to_contain_text("24 neighbours")


def test_a_new_generation_shows_without_a_reload(open_page, tmp_path):
    gallery = Gallery(tmp_path)
    gallery.add_shard(30)
    gallery.build()
    with run_service(gallery.open(), embedder=ColourEmbedder()) as running:
        page = open_page(f"/?key={KEY}", url=running.url)
        expect(page.locator("#freshness")).to_contain_text("images 30")
        gallery.add_shard(12)
        gallery.build()
        assert running.index.refresh()
        page.locator(".pick").first.click()
        expect(page.locator("#freshness")).to_contain_text("images 42")


def test_the_api_is_described_on_a_page_without_other_sites(open_page, service):
    page = open_page("/docs")
    expect(page.locator(".block h3", has_text="/v1/search/batch")).to_have_count(1)
    page.locator("summary").first.click()
    expect(page.get_by_role("link", name="ProblemBody").first).to_be_visible()
    expect(page.locator("#SearchOptions")).to_contain_text("score_threshold")
    expect(page.locator("#SearchOptions")).to_contain_text("10,000 values")
    expect(page.locator("#SearchForm")).to_contain_text("JSON of SearchOptions")
    for name, shown in (("POST/v1/search", '"score"'), ("GET/v1/facets", '"counted": 60')):
        operation = page.locator(
            "article", has=page.locator("h3", has_text=re.compile(f"^{name}$"))
        )
        expect(operation.locator("pre").first).to_contain_text(f"curl '{service.url}/v1/")
        operation.get_by_role("button", name="Try it").click()
        expect(operation.locator(".answer")).to_contain_text("200 application/json")
        expect(operation.locator(".answer")).to_contain_text(shown)


def test_no_asset_names_another_site():
    folder = Path(__file__).parents[2] / "pipeline/service/page"
    files = sorted(folder.iterdir())
    assert {file.name for file in files} == {name for name, _ in ASSETS.values()}
    for file in files:
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in text
        assert "https:" not in text
        assert "style=" not in text
        assert " onclick=" not in text


def read_palette(style: str, names: dict[str, str]) -> list[tuple[str, str]]:
    """Return the light and the dark value of each variable of a page that is a file."""
    return [tuple(re.findall(rf"--{name}: ?(#\w+)", style)[:2]) for name in names]


def test_the_page_the_report_and_the_file_of_neighbours_have_the_same_colours():
    folder = Path(__file__).parents[2] / "pipeline"
    css = (folder / "service/page/page.css").read_text()
    own = dict(re.findall(r"--(\w+): (light-dark\(#\w+, #\w+\))", css))
    report = {"ink": "text", "soft": "faint", "line": "line", "paper": "ground", "card": "card"}
    report |= {"bad": "bad"}
    found = {"ink": "text", "soft": "faint", "line": "line", "bg": "ground", "card": "card"}
    found |= {"accent": "accent", "frame": "sunken"}
    for path, names in (
        ("embed_job/pages/report.html.j2", report),
        ("index/search/command.py", found),
    ):
        pairs = read_palette((folder / path).read_text(), names)
        shown = [f"light-dark({light}, {dark})" for light, dark in pairs]
        assert shown == [own[name] for name in names.values()], path
