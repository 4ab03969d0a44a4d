"""The report in a real browser, from disk with networking off: drawn, sorted, filtered, chosen."""

import json
import os
import shutil
import time

import pytest
from reported_run import LABELS
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select, WebDriverWait

from trainer import report
from trainer.run_config import ReportConfig

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
PLOTS = (
    "headline", "loss", "evaluations", "learning_rate", "speed", "f1_fitted", "f1_frequency",
    "ap_tfidf", "precision_recall", "reliability", "histogram", "cooccurrence_true",
    "cooccurrence_predicted",
    "lengths", "label_counts",
)  # fmt: skip
# Pixels of a plot's canvases, hidden in shadow roots, that are coloured and not grey or white.
COLOURED = """
    function canvases(node) {
      return [...node.children].flatMap((child) => [
        ...(child.tagName === "CANVAS" ? [child] : []),
        ...(child.shadowRoot ? canvases(child.shadowRoot) : []),
        ...canvases(child),
      ]);
    }
    let coloured = 0;
    for (const canvas of canvases(document.getElementById(arguments[0]))) {
      const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
      for (let i = 0; i < data.length; i += 4) {
        const [red, green, blue, alpha] = data.slice(i, i + 4);
        if (alpha > 0 && Math.max(red, green, blue) - Math.min(red, green, blue) > 40) coloured++;
      }
    }
    return coloured;
"""
SOURCE = "return Bokeh.documents.map((d) => d.get_model_by_name(arguments[0])).find(Boolean).data"


@pytest.fixture(scope="module")
def page(reported_run):
    """The path of a report."""
    report.run(ReportConfig(model_dir=reported_run[1]))
    return os.path.join(reported_run[1], "report.html")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    for program in ("chromium", "chromedriver"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed; .ci/run installs it")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    driver.get("about:blank")
    driver.execute_cdp_cmd("Network.enable", {})
    offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    driver.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    # What the browser's own first page asked for.
    driver.get_log("performance"), driver.get_log("browser")
    yield driver
    driver.quit()


@pytest.fixture(
    scope="module", params=[(1280, 900, False), (360, 740, True)], ids=["desk", "phone"]
)
def opened(request, browser, page):
    """The browser with the report open, at two widths."""
    width, height, is_mobile = request.param
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": is_mobile},
    )
    browser.get(f"file://{page}")
    WebDriverWait(browser, 60).until(
        lambda driver: driver.execute_script("return document.documentElement.dataset.ready")
    )
    return browser


def read_table(browser):
    """Texts of the label table's visible rows."""
    return browser.execute_script(
        "return [...document.querySelectorAll('#label-table tbody tr:not([hidden])')]"
        ".map((row) => [...row.cells].map((cell) => cell.textContent.trim()))"
    )


def sort_by(browser, title):
    """Clicks on a column's title; returns the column's place."""
    heads = browser.find_elements(By.CSS_SELECTOR, "#label-table thead button")
    place = [head.get_attribute("textContent") for head in heads].index(title)
    browser.execute_script("arguments[0].click()", heads[place])
    return place


def test_every_plot_is_drawn(opened):
    drawn = {}
    for name in PLOTS:
        deadline = time.monotonic() + 20
        while not drawn.get(name) and time.monotonic() < deadline:
            drawn[name] = opened.execute_script(COLOURED, name)
    assert all(pixels > 30 for pixels in drawn.values()), drawn
    assert len(opened.find_elements(By.CSS_SELECTOR, ".canvas")) == len(PLOTS)


def test_nothing_scrolls_sideways_but_what_may(opened):
    width = opened.execute_script("return document.documentElement.clientWidth")
    assert opened.execute_script("return document.documentElement.scrollWidth") <= width
    # Nothing that cannot be scrolled to sticks out either.
    outside = opened.execute_script(
        "return [...document.querySelectorAll('main *')].filter((node) => !node.closest('.scroll')"
        " && node.getBoundingClientRect().right > arguments[0] + 1).map((node) => node.outerHTML)",
        width,
    )
    assert outside == []


def test_sorting_goes_by_numbers_and_by_names(opened):
    place = sort_by(opened, "F1")
    values = [float(row[place]) for row in read_table(opened)]
    assert values == sorted(values, reverse=True) and values[0] > values[-1]
    sort_by(opened, "F1")
    assert [float(row[place]) for row in read_table(opened)] == values[::-1]
    place = sort_by(opened, "AP")
    column = [row[place] for row in read_table(opened)]
    defined = [float(value) for value in column if value != "–"]
    # What is undefined comes last, whichever way.
    assert column[len(defined) :] == ["–"] * (len(LABELS) - len(defined))
    assert defined == sorted(defined, reverse=True)
    sort_by(opened, "label")
    names = [row[0] for row in read_table(opened)]
    numbered = [name for name in names if name.startswith("label ")]
    assert numbered == [f"label {k}" for k in range(5, 128)]
    assert sorted(names) == sorted(LABELS)


def test_filtering_keeps_the_labels_that_contain_the_text(opened):
    field = opened.find_element(By.ID, "filter")
    for text, expected in (
        ("LABEL 12", {"label 12", *(f"label {k}" for k in range(120, 128))}),
        ("<script>", {"<script>window.owned=1</script>"}),
        ("nothing of this name", set()),
    ):
        field.clear()
        field.send_keys(text)
        assert {row[0] for row in read_table(opened)} == expected
        shown = opened.find_element(By.ID, "shown").get_attribute("textContent")
        assert shown == f"{len(expected)} of 128 labels"
    field.clear()
    # `clear` makes no event of its own in every version of the driver.
    opened.execute_script("arguments[0].dispatchEvent(new Event('input'))", field)
    assert len(read_table(opened)) == 128


def test_choosing_a_label_changes_the_curves(opened, reported_run):
    path = os.path.join(reported_run[1], "evaluation", "curves.json")
    with open(path, encoding="utf-8") as file:
        curves = json.load(file)
    every = opened.execute_script(SOURCE, "precision_recall_source")
    assert every["recall"] == curves["micro"]["precision_recall"]["recall"]
    chosen = Select(opened.find_element(By.ID, "chosen"))
    for place in (0, 3):
        name = LABELS[curves["curve_labels"][place]]
        option = next(o for o in chosen.options if o.get_attribute("textContent") == name)
        chosen.select_by_value(option.get_attribute("value"))
        found = opened.execute_script(SOURCE, "precision_recall_source")
        assert found["precision"] == curves["curves"][place]["precision_recall"]["precision"]
        found = opened.execute_script(SOURCE, "after_source")
        assert found["share"] == curves["curves"][place]["reliability"]["after"]["share"]
        found = opened.execute_script(SOURCE, "histogram_source")
        assert sum(found["positive"]) == pytest.approx(1)
        for plot in ("precision_recall", "reliability", "histogram"):
            assert opened.execute_script(COLOURED, plot) > 30
    for table in ("label-table", "against-table"):
        link = opened.find_elements(By.CSS_SELECTOR, f"#{table} a[data-label]")[7]
        opened.execute_script("arguments[0].click()", link)
        picked = chosen.first_selected_option.get_attribute("textContent")
        assert picked == link.get_attribute("textContent")


def test_no_error_no_request_and_no_hostile_name_came_through(opened):
    """Asked last, after everything above was done in this tab."""
    # The browser advises against reading pixels back, which only this test does.
    lines = [
        line["message"]
        for line in opened.get_log("browser")
        if line["level"] != "INFO" and "getImageData" not in line["message"]
    ]
    assert lines == []
    messages = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    asked = {
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    }
    assert asked and all(url.startswith(("file://", "data:")) for url in asked), asked
    assert len([url for url in asked if url.startswith("file://")]) == 1
    assert opened.execute_script("return window.owned === undefined")
    assert opened.execute_script("return document.images.length") == 0
    assert opened.execute_script("return document.scripts.length") == 3
