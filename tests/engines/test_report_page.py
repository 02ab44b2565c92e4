"""The page of a report, opened in a headless browser."""

import json
import re
import shutil
from base64 import b64decode
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from plausible import METHODS, read_result, write_cell, write_grid
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By

from fedlight.reporting.page import write_report
from fedlight.runs.palette import colours

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        BROWSER is None or DRIVER is None, reason="not installed: apt-get install chromium chromium-driver"
    ),
]

LUMINANCE = """
const luminance = (element, key) => {
  const rgb = getComputedStyle(element)[key].match(/[\\d.]+/g).map(x => x / 255);
  const linear = rgb.slice(0, 3).map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
};
"""

READABLE = (  # text, WCAG contrast with what is behind it, size in pixels
    LUMINANCE
    + """
return [...document.querySelectorAll(arguments[0])].map(element => {
  const behind = element.classList.contains("best") ? element : document.body;
  const [ink, back] = [luminance(element, "color"), luminance(behind, "backgroundColor")];
  const contrast = (Math.max(ink, back) + 0.05) / (Math.min(ink, back) + 0.05);
  return [element.textContent, contrast, parseFloat(getComputedStyle(element).fontSize)];
});
"""
)

PICTURES = """
return [...document.images].map(picture => {
  const box = picture.getBoundingClientRect();
  return [picture.alt, picture.complete, picture.naturalWidth, box.left, box.right];
});
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of a whole grid with two failures, and a second data set."""
    sweep = tmp_path_factory.mktemp("runs") / "made"
    list(write_grid(sweep, method=METHODS, clients=[2, 5, 10], partition=["iid", "label_skew"]))
    write_cell(sweep, "FULL", 2, data="fmnist", status="failed", error="the disk is full")
    (write_cell(sweep, "UDEC", 2, data="fmnist") / "result.json").unlink()
    write_report([sweep], sweep / "report")
    return sweep / "report" / "index.html"


DEMO = {  # FID and bytes of `make demo`, by method and clients
    "FULL": {2: (6.62, 6818112), 5: (8.56, 17045280), 10: (10.59, 34090560)},
    "USPLIT": {2: (6.56, 5113584), 5: (8.28, 13195760), 10: (11.68, 25567920)},
    "UDEC": {2: (7.23, 2393888), 5: (9.91, 5984720), 10: (13.90, 11969440)},
    "ULATDEC": {2: (7.65, 5096672), 5: (10.07, 12741680), 10: (13.98, 25483360)},
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of the twelve cells of the demo, scored after their last round, their losses alike."""
    sweep = tmp_path_factory.mktemp("runs") / "demo"
    for method, cells in DEMO.items():
        for clients, (fid, bytes_total) in cells.items():
            folder = write_cell(sweep, method, clients)
            result = read_result(folder)
            result["fid"]["value"], result["exchange"]["bytes_total"] = fid, bytes_total
            (folder / "result.json").write_text(json.dumps(result))
            head, *rounds = (folder / "rounds.csv").read_text().splitlines()
            rounds[:-1] = [row.rpartition(",")[0] + "," for row in rounds[:-1]]
            (folder / "rounds.csv").write_text("\n".join([head, *rounds]))
    write_report([sweep], sweep / "report")
    return sweep / "report" / "index.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(DRIVER)))
    yield driver
    driver.quit()


def open_page(browser: webdriver.Chrome, page: Path, width: int, scheme: str) -> None:
    scheme_feature = {"name": "prefers-color-scheme", "value": scheme}
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme_feature]})
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(page.as_uri())


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_is_whole_and_readable(
    browser: webdriver.Chrome, page: Path, width: int, scheme: str
) -> None:
    browser.get_log("browser"), browser.get_log("performance")
    open_page(browser, page, width, scheme)
    assert browser.get_log("browser") == []
    requests = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [r["params"]["request"]["url"] for r in requests if r["method"] == "Network.requestWillBeSent"]
    assert [url for url in urls if not url.startswith("data:")] == [page.as_uri()]

    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    pictures = browser.execute_script(PICTURES)
    assert len(pictures) > 40
    for words, complete, natural_width, left, right in pictures:
        assert complete
        assert natural_width > 100, words
        assert left >= 0
        assert right <= width
        assert right - left > 250

    for selector in ("body", ".soft", "a", ".done", ".failed"):
        readable = browser.execute_script(READABLE, selector)
        assert readable, selector
        for words, contrast, size in readable:
            assert contrast > 4.5, words
            assert size >= 12
    behind = browser.execute_script(f"{LUMINANCE} return luminance(document.body, 'backgroundColor')")
    assert (behind < 0.2) == (scheme == "dark")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_marked_value_is_readable(browser: webdriver.Chrome, tmp_path: Path, scheme: str) -> None:
    sweep = tmp_path / "runs" / "seeds"
    for method, fids in {"FULL": (10, 11, 12), "UDEC": (20, 21, 23)}.items():
        for seed, fid in enumerate(fids):
            path = write_cell(sweep, method, 2, seed=seed) / "result.json"
            result = json.loads(path.read_text())
            path.write_text(json.dumps(result | {"fid": result["fid"] | {"value": fid}}))
    write_report([sweep], sweep / "report")
    open_page(browser, sweep / "report" / "index.html", 1300, scheme)
    readable = browser.execute_script(READABLE, "td.best")
    assert len(readable) == 2  # in the table by method and in the one in full
    readable += browser.execute_script(READABLE, ".headline, td:not(.best) small, .constant")
    assert len(readable) > 4
    assert all(contrast > 4.5 and size >= 12 for _, contrast, size in readable)


def test_columns_that_do_not_fit_are_shown_on_demand(browser: webdriver.Chrome, page: Path) -> None:
    open_page(browser, page, 400, "light")
    section = browser.find_element(By.ID, "digits_classifier_table")
    shown = "return [...arguments[0].querySelectorAll('thead th')].filter(h => h.checkVisibility()).length"
    few, button = browser.execute_script(shown, section), section.find_element(By.CLASS_NAME, "unfold")
    hidden = int(button.text.split(" ")[0])
    assert hidden > 4
    assert "IS 4.98" in section.find_element(By.CLASS_NAME, "constant").text
    button.click()
    assert browser.execute_script(shown, section) == few + hidden
    assert button.text == "Fewer columns"
    button.click()
    assert browser.execute_script(shown, section) == few


def test_a_point_under_the_pointer_shows_its_cell_and_values(browser: webdriver.Chrome, demo: Path) -> None:
    open_page(browser, demo, 1300, "light")
    chart = browser.find_element(By.CSS_SELECTOR, "#quality_exchange .chart")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", chart)
    curves = json.loads(str(chart.get_attribute("data-curves")))
    size, tip = chart.size, browser.find_element(By.CLASS_NAME, "tip")
    for name, [[x, y, text]] in curves[::3]:
        across, down = (x / 1000 - 0.5) * size["width"] + 3, (y / 1000 - 0.5) * size["height"] - 3
        ActionChains(browser).move_to_element_with_offset(chart, int(across), int(down)).perform()
        assert tip.is_displayed()
        assert name in tip.text
        assert text in tip.text
    ActionChains(browser).move_to_element(browser.find_element(By.ID, "quality_exchange")).perform()
    ActionChains(browser).move_to_element(browser.find_element(By.CSS_SELECTOR, ".legend")).perform()
    assert not tip.is_displayed()


def test_no_table_is_cut_on_a_screen(browser: webdriver.Chrome, page: Path, demo: Path) -> None:
    for report in page, demo:
        open_page(browser, report, 1300, "light")
        boxes = browser.find_elements(By.CSS_SELECTOR, "section .scroll")
        assert len(boxes) > 2
        cut = "return arguments[0].scrollWidth - arguments[0].clientWidth"
        assert [browser.execute_script(cut, box) for box in boxes] == [0] * len(boxes)


OVERLAPS = """
const found = [];
for (const image of document.querySelectorAll(".drawings img")) {
  const place = document.createElement("div");
  place.innerHTML = atob(image.src.split(",")[1]);  // as wide as the picture was
  const svg = place.querySelector("svg");
  svg.style.width = image.getBoundingClientRect().width + "px";
  svg.style.height = "auto";
  image.replaceWith(place);
  const whole = svg.getBoundingClientRect();
  const texts = [...svg.querySelectorAll("text")].map(one => [one.textContent, one.getBoundingClientRect()]);
  for (const [text, box] of texts) {
    if (box.left < whole.left || box.right > whole.right || box.bottom > whole.bottom) found.push([text]);
    for (const [other, near] of texts) if (near !== box &&
      box.left < near.right && near.left < box.right && box.top < near.bottom && near.top < box.bottom)
      found.push([image.alt, text, other]);
  }
}
return found;
"""


@pytest.mark.parametrize("width", [1300, 400])
def test_no_text_of_a_figure_covers_another_or_is_cut(
    browser: webdriver.Chrome, page: Path, demo: Path, width: int
) -> None:
    for report in page, demo:
        open_page(browser, report, width, "light")
        assert browser.execute_script(OVERLAPS) == []


def test_client_counts_are_told_apart_at_the_points_of_quality_against_exchange(
    browser: webdriver.Chrome, demo: Path
) -> None:
    open_page(browser, demo, 400, "light")
    image = browser.find_element(By.CSS_SELECTOR, "#quality_exchange img")
    drawn = b64decode(str(image.get_attribute("src")).partition(",")[2]).decode()
    assert [text for text in re.findall(r">([^<>]+)</text>", drawn) if "clients" in text] == [
        "2 clients",
        "5 clients",
        "10 clients",
    ]
    used = Counter(re.findall(r'<use xlink:href="#(\w+)"[^>]*"fill: (#\w+)', drawn))
    marks = Counter(colour for (_, colour), times in used.items() if times == 1)
    assert marks == {colour.lower(): 3 for colour in colours(set(DEMO)).values()}


def test_curves_that_say_nothing_are_left_out(browser: webdriver.Chrome, demo: Path) -> None:
    open_page(browser, demo, 1300, "light")
    assert browser.find_elements(By.ID, "fid_rounds") == []
    losses = browser.find_element(By.ID, "train_loss_rounds")
    assert "In 3 of 3 panels the methods' curves lie within 3% of each other" in losses.text
    assert len(losses.find_elements(By.TAG_NAME, "img")) == 1
    assert len(browser.find_elements(By.CSS_SELECTOR, "#exchange_rounds img")) == 3


def test_rounds_are_whole_numbers_at_the_axis(browser: webdriver.Chrome, page: Path, demo: Path) -> None:
    for report in page, demo:
        open_page(browser, report, 1300, "light")
        images = browser.find_elements(By.CSS_SELECTOR, "[id$=_rounds] img")
        assert images
        for image in images:
            drawn = b64decode(str(image.get_attribute("src")).partition(",")[2]).decode()
            axis = drawn.partition('id="matplotlib.axis_1"')[2].partition('id="matplotlib.axis_2"')[0]
            *ticks, label = re.findall(r">([^<>]+)</text>", axis)
            assert label == "round"
            assert len(ticks) > 1
            assert all(tick.isdigit() for tick in ticks)


def test_pictures_of_samples_are_never_enlarged(browser: webdriver.Chrome, demo: Path) -> None:
    for width, dense in ((1300, 2), (400, 3)):
        open_page(browser, demo, width, "light")
        for picture in browser.find_elements(By.CSS_SELECTOR, ".tiles img"):
            assert picture.rect["width"] * dense <= float(picture.get_property("naturalWidth"))


def test_a_click_enlarges_a_picture_of_a_page_that_was_moved_alone(
    browser: webdriver.Chrome, page: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "sent.html"
    shutil.copyfile(page, moved)
    open_page(browser, moved, 1280, "light")
    small = browser.find_element(By.CSS_SELECTOR, ".tiles img")
    small.click()
    large = browser.find_element(By.CSS_SELECTOR, "dialog[open] img")
    assert large.get_attribute("alt") == small.get_attribute("alt")
    width = min(float(str(small.get_property("naturalWidth"))), 0.98 * 1280)
    assert small.rect["width"] < large.rect["width"] == pytest.approx(width, abs=1)
    large.click()
    assert browser.find_elements(By.CSS_SELECTOR, "dialog[open]") == []
    assert browser.current_url == moved.as_uri()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_figures_follow_the_reader_s_scheme(browser: webdriver.Chrome, page: Path, scheme: str) -> None:
    open_page(browser, page, 1280, scheme)
    brightness = """
    const picture = document.querySelector("[id$=quality_exchange] img");
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [picture.naturalWidth, picture.naturalHeight];
    const context = canvas.getContext("2d");
    context.drawImage(picture, 0, 0);
    const pixels = context.getImageData(0, 0, canvas.width, canvas.height).data;
    let most = 0, least = 255;
    for (let i = 0; i < pixels.length; i += 4) if (pixels[i + 3] > 250) {
      const grey = (pixels[i] + pixels[i + 1] + pixels[i + 2]) / 3;
      [most, least] = [Math.max(most, grey), Math.min(least, grey)];
    }
    return [least, most];
    """
    least, most = browser.execute_script(brightness)
    assert (least < 60) == (scheme == "light")
    assert (most > 229) == (scheme == "dark")


SEEN = """
return [...document.querySelectorAll(`#${arguments[0]} tbody tr`)]
    .filter((row) => row.checkVisibility())
    .map((row) => [...row.cells].map((field) => field.innerText.trim()))
"""


def table(browser: webdriver.Chrome, name: str) -> list[list[str]]:
    """The rows of a table that are to be seen."""
    seen: list[list[str]] = browser.execute_script(SEEN, name)
    return seen


def test_a_click_on_a_column_sorts_by_its_numbers(browser: webdriver.Chrome, page: Path) -> None:
    open_page(browser, page, 1280, "light")
    name = "digits_classifier_table"
    heads = browser.find_elements(By.CSS_SELECTOR, f"#{name} thead button")
    titles = [head.text for head in heads]
    for title in ("parameters", "FID"):
        column = titles.index(title)
        heads[column].click()
        numbers = [number(row[column]) for row in table(browser, name)]
        assert numbers == sorted(numbers)
        heads[column].click()
        assert [number(row[column]) for row in table(browser, name)] == numbers[::-1]


def number(text: str) -> float:
    return float(text.split(" ")[0].replace(",", ""))


def test_words_filter_the_rows(browser: webdriver.Chrome, page: Path) -> None:
    open_page(browser, page, 1280, "light")
    name = "digits_classifier_table"
    section = browser.find_element(By.ID, name)
    section.find_element(By.TAG_NAME, "input").send_keys("UDEC label")
    shown = table(browser, name)
    assert [row[:3] for row in shown] == [["label_skew", clients, "UDEC"] for clients in ("2", "5", "10")]
    assert section.find_element(By.TAG_NAME, "output").text == f"3 of {6 * 5 + 6} rows"


def test_missing_values_stay_at_the_end(browser: webdriver.Chrome, page: Path) -> None:
    open_page(browser, page, 1280, "light")
    heads: list[Any] = browser.find_elements(By.CSS_SELECTOR, "#fmnist_classifier_cells thead button")
    column = [head.text for head in heads].index("time")
    for _ in range(2):
        heads[column].click()
        assert table(browser, "fmnist_classifier_cells")[-1][column] == "–"
