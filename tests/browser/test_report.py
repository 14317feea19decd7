"""The report page: reproducible and safe as text, and complete, quiet and offline in a real browser."""

import json
import math
import re
import shutil
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import pytest
from PIL import Image

from dmd2.core.errors import UserError
from eval.report import figures, index
from eval.report import page as report
from eval.report.figures import ARMS
from eval.report.page import REPORT
from tests.browser import fake_results

TITLE = "One seed <script>alert(1)</script>"
ROWS = ["digits-table3", "demo"]
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync --disable-quic"
)


@pytest.fixture(scope="module")
def place(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with invented results of two tables and their pages, and something else among the tables."""
    folder = tmp_path_factory.mktemp("report")
    fake_results.workplace(folder, root)
    with chdir(folder):
        fake_results.table("digits-table3")
        fake_results.table("demo", {"title": TITLE, "warnings": ["old"]})
        Path("results/tables/foreign.json").write_text('{"kind": "metrics"}')
        index.main(REPORT)
        yield folder


def text(place: Path, name: str = "demo") -> str:
    return (place / f"results/report/{name}.html").read_text(encoding="utf-8")


def test_rendering_again_gives_the_same_bytes(place: Path):
    _, *beside = report.outputs("demo", REPORT)
    before = [path.read_bytes() for path in beside]
    assert text(place) == report.render(Path("results/tables/demo.json"), beside)
    report.write(Path("results/tables/demo.json"), REPORT)
    assert [path.read_bytes() for path in beside] == before


def test_pages_are_small(place: Path):
    assert max(path.stat().st_size for path in (place / "results/report").glob("*.html")) < 700_000


def test_the_list_has_every_table_and_keeps_the_pages_that_are_right(place: Path):
    listed = text(place, "index")
    assert re.findall(r'<a href="(.*?)">', listed) == ["methods.html", "demo.html", "digits-table3.html"]
    assert "foreign.json is no table, it has no base" in listed
    three = listed[listed.index("digits-table3.html") :]
    assert "supported" in three and "<code>dmd2</code>" in three and "<code>4be1c02d9</code>" in three
    pages = [place / f"results/report/{name}.html" for name in ROWS]
    pages[0].write_text(pages[0].read_text() + "<!-- kept -->")
    table = Path("results/tables/demo.json")
    table.write_text(table.read_text() + " ")
    before = pages[1].read_text()
    index.main(REPORT)
    assert pages[0].read_text().endswith("<!-- kept -->") and pages[1].read_text() != before


def test_text_from_tables_is_escaped(place: Path):
    assert "<script" not in text(place)
    assert "One seed &lt;script&gt;" in text(place)


def test_says_the_verdicts_the_best_value_and_the_warning(place: Path):
    three, one = text(place, "digits-table3"), text(place)
    assert three.count('class="chip supported"') > 1  # also in the reading guide
    said = "No claim is decided: a verdict needs 3 training seeds, and this table has one."
    assert one.count(said) == 1 and 'class="chip' not in one and "needs 3 seeds" not in one
    assert said in Path("results/tables/demo.md").read_text() and said in text(place, "index")
    assert "<b>Warning:</b> old." in one
    row = re.search(r'<tr class="reference">.*?</tr>', three, re.DOTALL)
    assert row and row[0].count("<strong>") >= 1 and "<code>dmd2</code>" in row[0]


def test_latex_is_escaped_and_complete(place: Path):
    tex = (place / "results/report/demo.tex").read_text()
    assert tex.count(r" \\") == 1 + 8 and r"\caption{One seed <script>" in tex and r"$\times$" in tex
    assert re.search(r"\\texttt\{dmd2\} & \\checkmark .*\\textbf\{", tex)
    cells = {line.count(" & ") for line in tex.splitlines() if line.endswith(r"\\")}
    columns = re.search(r"\\begin\{tabular\}\{(\w+)\}", tex)
    assert columns and cells == {len(columns[1]) - 1}


def test_panels_of_the_log_and_run_times(place: Path):
    page = text(place)
    assert "Line chart of the distribution matching loss" in page and "Line chart of the denoising loss of the" in page
    row = re.search(r"<th scope=\"row\">all</th>(.*?)</tr>", page)
    trained, measured, both = (float(text) for text in re.findall(r"<td>(.*?)</td>", row[1] if row else ""))
    assert trained > 6 * 90 and measured == round(6 * 12.3 + 2 * 4.0, 1) and abs(trained + measured - both) <= 1


def test_small_numbers_on_an_axis_keep_their_digits():
    with figures.drawing("any"):
        figure, axes = figures.panel(3.5, 2.0)
        axes.plot([1, 2], [0.002, 0.5])
        assert figures.scaled(axes, "y", [0.002, 0.5], 10) == ", log scale"
        assert ">0.003<" in figures.svg(figure, "")


def test_missing_grid_is_named(place: Path, tmp_path: Path):
    table = json.loads(Path("results/tables/demo.json").read_text())
    table["rows"][0]["grid"] = {"0": "results/runs/digits/gone/seed0/grid.png"}
    changed = tmp_path / "demo.json"
    changed.write_text(json.dumps(table))
    with pytest.raises(UserError, match=r"results/runs/digits/gone/seed0/grid.png is missing.*Snakemake"):
        report.render(changed)


def test_missing_or_foreign_bundle_is_named(place: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"nowhere.json is missing: make it with dmd2 run nowhere"):
        report.render(Path("results/tables/nowhere.json"))
    foreign = tmp_path / "metrics.json"
    foreign.write_text('{"kind": "metrics"}')
    with pytest.raises(UserError, match=r"metrics.json is no table, it has no base: .*dmd2 run metrics"):
        report.render(foreign)


def test_diverged_run_is_shown_and_not_called_best(place: Path, tmp_path: Path):
    table = json.loads(Path("results/tables/demo.json").read_text())
    run = table["rows"][3]
    run["values"]["fd"] = {"0": math.nan}
    for snapshot in run["curves"]["0"]:
        snapshot["fd"] = math.nan
    changed = tmp_path / "demo.json"
    changed.write_text(json.dumps(table))
    row = re.search(r'<tr class="reference">.*?</tr>', report.render(changed), re.DOTALL)
    assert row and "<td>nan</td>" in row[0]


def test_large_grid_is_scaled_down(tmp_path: Path):
    Image.effect_noise((1280, 768), 50).convert("RGB").save(tmp_path / "grid.png")
    grid = report.sample_grid(tmp_path / "grid.png", 128)
    assert (grid.width, grid.height, grid.small) == (640, 384, False)
    assert len(grid.url) < 300_000


@pytest.mark.parametrize("light, dark", ARMS)
def test_lines_stand_out_from_the_page(place: Path, light: str, dark: str):
    pages = re.findall(r"--page: (#\w{6})", text(place))
    assert contrast(light, pages[0]) > 3 and contrast(dark, pages[1]) > 3  # WCAG 2.1, 1.4.11


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.fixture(scope="module")
def browser(place: Path, tmp_path_factory: pytest.TempPathFactory):
    """Headless Chromium."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (pip install -e .[dev])")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("no Chromium here (Debian: apt install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    window = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield window
    finally:
        window.quit()


@pytest.fixture(params=["index", "methods", *ROWS])
def opened(request: pytest.FixtureRequest, browser, place: Path):
    """A page with its folded parts unfolded."""
    browser.get((place / f"results/report/{request.param}.html").as_uri())
    browser.execute_script("document.querySelectorAll('details').forEach(part => part.open = true)")
    return browser


def test_nothing_is_fetched_and_nothing_complained_of(opened):
    messages = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    requests = [message["params"] for message in messages if message["method"] == "Network.requestWillBeSent"]
    page = opened.current_url  # the browser's own first tab asks for chrome:// files
    asked = [request["request"]["url"] for request in requests if request["documentURL"] == page]
    assert page in asked
    assert [url for url in asked if url != page and not url.startswith("data:")] == []
    assert opened.get_log("browser") == []


@pytest.mark.parametrize("opened", ROWS, indirect=True)
def test_every_row_and_picture_is_shown(opened):
    rows = opened.find_elements("css selector", "table.main tbody tr")
    assert len(rows) == 8  # six students and two teacher samplers
    assert all(row.is_displayed() and row.size["height"] > 10 for row in rows)
    assert all(table.is_displayed() for table in opened.find_elements("css selector", "table"))
    widths = opened.execute_script("return [...document.images].map(image => image.complete && image.naturalWidth)")
    assert len(widths) == 8 and all(widths)
    figures = opened.find_elements("css selector", "svg[role=img]")
    assert len(figures) == 3 + 2 + 6  # curves, quantities of the log, brightness of six runs
    assert all(figure.size["width"] > 150 and figure.size["height"] > 80 for figure in figures)


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_the_window(opened, width: int, scheme: str):
    feature = {"name": "prefers-color-scheme", "value": scheme}
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    assert opened.execute_script("return document.documentElement.scrollWidth") <= width
    ink, page = opened.execute_script(
        "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor].map(c => c.match(/\\d+/g))"
    )
    assert (int(ink[0]) < int(page[0])) == (scheme == "light")


def test_page_is_accessible(opened):
    faults = opened.execute_script("""
        const bad = (what, selector, wrong) => [...document.querySelectorAll(selector)].filter(wrong)
            .map(element => what + ": " + element.outerHTML.slice(0, 80));
        const ids = [...document.querySelectorAll("[id]")].map(element => element.id);
        const levels = [...document.querySelectorAll("h1, h2, h3, h4")].map(heading => +heading.tagName[1]);
        return [
            ...bad("no alternative text", "img", image => !image.alt),
            ...bad("no label", "svg[role=img]", image => !image.getAttribute("aria-label")),
            ...bad("no caption", "table", table => !table.caption),
            ...bad("no scope", "th", head => !head.scope),
            ...bad("dead link", "a[href^='#'], use", link => !document.querySelector(
                link.getAttribute("href") || link.getAttribute("xlink:href"))),
            ...ids.filter((id, i) => ids.indexOf(id) !== i).map(id => "id used twice: " + id),
            ...levels.filter((level, i) => level > (levels[i - 1] || 0) + 1).map(level => "skipped to h" + level),
        ];""")
    assert faults == []
