"""The pages in a real browser, from a file, as a user opens them."""

import json
import shutil

import pytest

from sam2jq.report.comparison import runs_page
from sam2jq.report.run import read_runs

from .conftest import LAYERS, MARKUP, write_run

WIDTHS = (390, 1024, 1600)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium: pip install selenium")
if not (CHROMIUM and shutil.which("chromedriver")):
    pytest.skip("no chromium with its driver: apt-get install chromium chromium-driver", allow_module_level=True)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for option in (*OPTIONS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict:
    """The page of a run and one that compares two."""
    root = tmp_path_factory.mktemp("runs")
    folders = [write_run(root, "w8", 8, 0.7), write_run(root, "w4", 4, 0.6)]
    (root / "runs.html").write_text(runs_page(read_runs(folders)))
    return {"run": folders[0] / "report.html", "runs": root / "runs.html"}


def show(browser, page, width: int = 1024, scheme: str = "light") -> None:
    view = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", view)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser.get(page.as_uri())


def requested(browser) -> set[str]:
    """The addresses requested since the last call."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [message["params"] for message in messages if message["method"] == "Network.requestWillBeSent"]
    return {params["request"]["url"] for params in sent}


def test_a_page_asks_no_network_says_no_error_and_is_there_within_a_second(browser, pages):
    paints = "return performance.getEntriesByName('first-contentful-paint').map((entry) => entry.startTime)"
    wait = "requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(arguments[0], 50)))"
    for page in pages.values():
        times = []
        requested(browser)
        for _ in range(3):  # the machine may be at something else
            show(browser, page)
            browser.execute_async_script(wait)
            times += browser.execute_script(paints)
        assert min(times) < 1000  # milliseconds
        assert {url for url in requested(browser) if not url.startswith("data:")} == {page.as_uri()}
        assert browser.get_log("browser") == []
        assert "ran" not in browser.title


def test_a_page_fits_every_width_in_light_and_dark(browser, pages):
    for page in pages.values():
        papers = {}
        for scheme in ("light", "dark"):
            for width in WIDTHS:
                show(browser, page, width, scheme)
                assert browser.execute_script("return document.documentElement.scrollWidth") <= width
            papers[scheme] = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert papers["light"] != papers["dark"]


def test_text_stands_out_from_what_is_behind_it(browser, pages):
    """Contrast of 4.5 and more, which WCAG asks for."""
    colors = """
        const names = ["--paper", "--panel", "--note", "--ink", "--quiet"];
        return names.map((name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim());
    """
    linear = lambda part: part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
    light = lambda color: sum(
        weight * linear(int(color[i : i + 2], 16) / 255) for weight, i in ((0.2126, 1), (0.7152, 3), (0.0722, 5))
    )
    for scheme in ("light", "dark"):
        show(browser, pages["run"], 1024, scheme)
        *behind, ink, quiet = map(light, browser.execute_script(colors))
        pairs = [(text, ground) for text in (ink, quiet) for ground in behind[:2]] + [(ink, behind[2])]
        assert all((max(pair) + 0.05) / (min(pair) + 0.05) >= 4.5 for pair in pairs)


def test_the_slider_moves_the_line_between_the_masks(browser, pages):
    show(browser, pages["run"])
    clip = "return getComputedStyle(document.querySelector('.compare .after')).clipPath"
    slider = browser.find_element("css selector", ".compare input")
    before = browser.execute_script(clip)
    slider.send_keys(webdriver.Keys.HOME)
    assert browser.execute_script(clip) == "inset(0px 0px 0px 0%)"
    slider.send_keys(webdriver.Keys.ARROW_RIGHT)
    assert browser.execute_script(clip) == "inset(0px 0px 0px 1%)" != before


def names(browser) -> list[str]:
    """The layers that the table shows, from its top."""
    script = "return [...document.querySelectorAll('#layer-table tbody tr')].filter((row) => !row.hidden)"
    return browser.execute_script(f"{script}.map((row) => row.cells[1].textContent)")


def test_layers_are_sorted_by_number_and_by_name_and_filtered(browser, pages):
    show(browser, pages["run"])
    rest = ["sam_mask_decoder.conv_s1"]  # has no figures, so it is the last by any
    assert names(browser) == [*LAYERS, *rest]
    button = {one.text: one for one in browser.find_elements("css selector", "#layer-table th button")}
    button["bytes"].send_keys(webdriver.Keys.ENTER)
    assert names(browser) == [*reversed(LAYERS), *rest]
    button["bytes"].click()
    assert [name for name in names(browser) if name not in rest] == list(LAYERS)
    assert button["bytes"].find_element("xpath", "..").get_attribute("aria-sort") == "descending"
    button["layer"].click()
    assert names(browser) == sorted([*LAYERS, *rest])
    search = browser.find_element("css selector", "input[type=search]")
    search.send_keys("NECK")
    assert names(browser) == ["image_encoder.neck.convs.0.conv"]
    assert browser.find_element("css selector", "[data-count=layer-table]").text == "1 of 4 shown"
    search.send_keys(webdriver.Keys.BACKSPACE * 4)
    assert len(names(browser)) == 4


def test_every_picture_has_words_and_every_control_a_name_that_the_keyboard_reaches(browser, pages):
    for page in pages.values():
        show(browser, page)
        masks = browser.find_elements("css selector", ".picture > img:first-child")
        assert masks
        assert all(MARKUP in mask.get_attribute("alt") for mask in masks)
        pictures = browser.find_elements("css selector", "[role=img]")
        assert pictures
        assert all(picture.get_attribute("aria-label") for picture in pictures)
        assert all(button.text for button in browser.find_elements("tag name", "button"))
        controls = browser.find_elements("css selector", "input, button, summary, main > section > [tabindex]")
        body, reached = browser.find_element("tag name", "body"), []
        for _ in controls:
            (reached[-1] if reached else body).send_keys(webdriver.Keys.TAB)
            reached.append(browser.switch_to.active_element)
        assert set(reached) == set(controls)
