"""The report page: what is in the file, and what a headless Chromium makes of it.

Without a browser the tests that need one are skipped, but not in CI, which installs it.
"""

from __future__ import annotations

import base64
import gzip
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from models import build, example_inputs

import mxnorm_pass
from mxnorm_pass import Graph, Report, Site
from mxnorm_pass.report.page import bytes_text, change_text
from mxnorm_pass.report.reason import SkipReason
from mxnorm_pass.report.subgraph import Subgraph, SubgraphNode, Traffic

HOSTILE = "<script>document.title = 'hacked'</script>&\"'</code>"
MODULES = {
    "model.layers.0.input_layernorm": {"estimator": "exact"},
    "model.layers.1.mlp.*": False,
}


@pytest.fixture(scope="module")
def llama() -> Report:
    """A training step: two fused norms, an exact one, two skipped."""
    model = build("Llama")
    return mxnorm_pass.explain(model, **example_inputs(model), options={"modules": MODULES})


def many_sites(count: int) -> Report:
    """A graph of norms that read each other, each fused from three ops into one."""
    before, after, sites = [], [], []
    for i in range(count):
        norm = f"model.layers.{i // 2}.{'post_attention' if i % 2 else 'input'}_layernorm"
        inputs = (f"mul_{i - 1}",) if i else ()
        names = [f"pow_{i}", f"rsqrt_{i}", f"mul_{i}"]
        before += [f'    {name}: "f32[8, 64]" = torch.ops.aten.op({name})' for name in names]
        after.append(f'    mul_{i}: "f32[8, 64]" = torch.ops.mxnorm_pass.norm_cast(x)')
        old = [SubgraphNode(n, "aten.op.default", inputs, part="norm", bytes=4096) for n in names]
        new = SubgraphNode(names[2], "mxnorm_pass.norm_cast.default", change="added", bytes=9)
        traffic = Traffic(3 * 4096, 4096)
        sites.append(
            Site(
                norm,
                (f"model.layers.{i // 2}.self_attn.q_proj",),
                "fused" if i % 5 else "skipped",
                reason=None if i % 5 else SkipReason.DISABLED,
                estimator=(None, "exact", "mxnorm", "mxnorm", "mxnorm")[i % 5],
                format="mxfp8 e4m3fn rceil block 32" if i % 5 else None,
                before=Subgraph(tuple(old), traffic),
                after=Subgraph((new,), Traffic(9, 9)) if i % 5 else None,
            )
        )
    code = ["\n".join(["def forward():", *lines, "    return ()"]) for lines in (before, after)]
    report = Report()
    report.add(Graph("inference", *code, sites=tuple(sites)))
    return report


def save(report: Report, folder: Path) -> str:
    report.save_html(folder / "report.html")
    return (folder / "report.html").read_text()


def embedded(page: str, name: str) -> str:
    found = re.search(f'id="{name}">([^<]*)<', page)
    assert found is not None
    return gzip.decompress(base64.b64decode(found[1])).decode()


def test_page_holds_the_report_once_and_no_address(llama, tmp_path) -> None:
    page = save(llama, tmp_path)
    (graph,) = llama.graphs
    (data,) = json.loads(embedded(page, "data"))["graphs"]
    assert data["before"] == graph.before and data["after"] == graph.after
    assert [site["norm"] for site in data["sites"]] == [site.norm for site in graph.sites]
    assert not re.search(r"https?://|@import|url\(", page)
    assert "torch.ops" not in page, "code is in the compressed data alone"
    assert save(llama, tmp_path) == page, "the same report gives the same page"


def test_names_and_code_are_escaped(tmp_path) -> None:
    page = save(hostile_report(), tmp_path)
    assert HOSTILE not in page and "&lt;script&gt;" in page
    assert page.count("<script") == 3


def hostile_report() -> Report:
    node = SubgraphNode(HOSTILE, HOSTILE, (), HOSTILE, HOSTILE, "norm", "removed", bytes=1)
    cut = Subgraph((node,), Traffic(1, None))
    code = f"    {HOSTILE}\n    x = {HOSTILE}\n"
    site = Site(HOSTILE, (HOSTILE,), detail=HOSTILE, reason=SkipReason.WIDTH, before=cut)
    fused = Site(HOSTILE, (HOSTILE,), "fused", estimator="mxnorm", before=cut, after=cut)
    return Report([Graph(HOSTILE, code, code + "y", {HOSTILE: 1}, {}, (site, fused))])


def test_pages_of_reports_without_subgraphs_and_of_nothing(tmp_path) -> None:
    old = Report([Graph("inference", "x", "y", sites=(Site("norm"),))])
    assert "inference" in save(old, tmp_path)
    assert "No graph was compiled" in save(Report(), tmp_path)
    assert len(save(Report(), tmp_path)) < 100_000, "no library where nothing is drawn"


def test_page_is_as_readable_as_any_new_file(tmp_path) -> None:
    save(Report(), tmp_path)
    (tmp_path / "new").touch()
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1 and len(list(tmp_path.iterdir())) == 2


def test_two_hundred_sites_stay_small(tmp_path) -> None:
    assert len(save(many_sites(200), tmp_path)) < 2_000_000


@pytest.mark.parametrize(
    ("count", "text"),
    [(None, "unknown"), (0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (300 * 2**20, "300 MiB")],
)
def test_bytes_text(count, text) -> None:
    assert bytes_text(count) == text


def test_change_text() -> None:
    assert [change_text(100, 88), change_text(3, 6), change_text(9, 9)] == ["−12%", "+100%", "±0%"]
    assert change_text(None, 1) == change_text(0, 1) == change_text(1, None) == ""


# ---- in a browser


class Browser:
    """A headless Chromium that notes every request, and the console."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, report: Report, folder: Path) -> None:
        save(report, folder)
        self.driver.get((folder / "report.html").as_uri())

    def find(self, selector: str) -> list[Any]:
        return list(self.driver.find_elements("css selector", selector))

    def shown(self, selector: str = "tr.site") -> list[Any]:
        return [element for element in self.find(selector) if element.is_displayed()]

    def wait_for(self, selector: str, count: int = 1) -> list[Any]:
        deadline = time.monotonic() + 20
        while len(found := self.find(selector)) < count:
            assert time.monotonic() < deadline, f"{selector} does not appear"
            time.sleep(0.02)
        return found

    def requests(self) -> list[str]:
        messages = [json.loads(entry["message"])["message"] for entry in self.log("performance")]
        sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return [params["request"]["url"] for params in sent]

    def log(self, kind: str) -> list[Any]:
        return list(self.driver.get_log(kind))


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    driver_path = shutil.which("chromedriver")
    if binary is None or driver_path is None:
        missing = "chromium and chromium-driver are not installed"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.add_argument("--window-size=1280,900")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(driver_path)
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


@pytest.fixture
def browser(chromium) -> Iterator[Browser]:
    """Whatever a test does, the console stays clean and nothing but the file is asked for."""
    browser = Browser(chromium)
    chromium.get("about:blank")
    browser.log("performance"), browser.log("browser")
    yield browser
    assert browser.log("browser") == []
    outside = [u for u in browser.requests() if not u.startswith(("file:", "data:", "blob:"))]
    assert outside == []


def test_a_click_opens_diagrams_and_marked_code(llama, tmp_path, browser) -> None:
    browser.open(llama, tmp_path)
    assert [row.get_attribute("data-status") for row in browser.shown()] == [
        "exact",
        "fused",
        "fused",
        "skipped",
        "skipped",
    ]
    browser.find("tr.site button")[1].click()
    browser.wait_for(".sides[data-ready]")
    before, after = browser.shown(".diagram svg")
    assert "rsqrt" in before.text and "rsqrt" not in after.text
    assert "add_norm_cast" in after.text and "gate_proj" in after.text
    removed, added = (browser.shown(f".line.{kind}") for kind in ("removed", "added"))
    assert any("aten.rsqrt.default" in line.text for line in removed)
    assert any("mxnorm_pass.add_norm_cast.default" in line.text for line in added)
    browser.find(".segments button")[1].click()
    browser.wait_for(".sides[data-ready]")
    assert all("mm" not in svg.text.split() for svg in browser.shown(".diagram svg"))


def test_a_diagram_leads_to_its_code(llama, tmp_path, browser) -> None:
    browser.open(llama, tmp_path)
    browser.find("tr.site button")[4].click()
    browser.wait_for(".sides[data-ready]")
    (box,) = [n for n in browser.find("svg g.node") if n.text.startswith("rsqrt")]
    box.click()
    (marked,) = browser.find(".line.marked")
    assert "aten.rsqrt.default" in marked.text
    browser.find(".check input")[0].click()
    browser.wait_for(".sides[data-ready]")
    assert any("view" in n.text for n in browser.find("svg g.node:not(.context)"))


def test_a_near_miss_is_told_and_drawn(llama, tmp_path, browser) -> None:
    browser.open(llama, tmp_path)
    browser.find("tr.site button")[4].click()
    browser.wait_for(".sides[data-ready]")
    site = llama.sites[4]
    assert site.near_miss is not None and site.reason is not None
    text = browser.find(".reason")[0].text
    for part in (site.reason.value, site.reason.cure, site.near_miss.node, site.near_miss.found):
        assert part.replace("`", "") in text.replace("`", "")
    assert len(browser.find("svg .missed")) == 1


def test_filters(llama, tmp_path, browser) -> None:
    browser.open(llama, tmp_path)
    browser.find("input[value=skipped]")[0].click()
    assert len(browser.shown()) == 3
    query = browser.find("#query")[0]
    query.send_keys("q_proj LAYERS.1")
    assert [row.get_attribute("data-site") for row in browser.shown()] == ["2"]
    assert browser.find("#shown")[0].text == "1 of 5 norms"
    query.send_keys(" nothing like it")
    assert browser.shown() == [] and len(browser.shown("p.nothing")) == 1


def test_keyboard_alone_opens_and_closes(llama, tmp_path, browser) -> None:
    browser.open(llama, tmp_path)
    button = browser.find("tr.site button")[0]
    assert button.get_attribute("aria-expanded") == "false"
    button.send_keys("\n")
    browser.wait_for(".sides[data-ready]")
    assert button.get_attribute("aria-expanded") == "true"
    detail = browser.find(f"#{button.get_attribute('aria-controls')}")[0]
    assert detail.is_displayed()
    button.send_keys(" ")
    assert not detail.is_displayed()


def test_hostile_names_stay_text(tmp_path, browser) -> None:
    browser.open(hostile_report(), tmp_path)
    for button in browser.find("tr.site button"):
        button.click()
    browser.wait_for(".sides[data-ready]", 2)
    browser.find("details.whole summary")[0].click()
    browser.wait_for(".whole .line")
    assert browser.driver.title == "MXNorm report: 2 norms"
    assert browser.find("tr.site button")[0].text == HOSTILE
    assert len(browser.find("body script, svg script")) == 3


def test_whole_graph_marks_what_changed(llama, tmp_path, browser) -> None:
    browser.open(llama, tmp_path)
    browser.find("details.whole summary")[0].click()
    browser.wait_for(".whole .line")
    (graph,) = llama.graphs
    marked = [line.get_attribute("textContent") for line in browser.find(".whole .line.added")]
    new = set(graph.after.splitlines()) - set(graph.before.splitlines())
    assert len(marked) == sum(line in new for line in graph.after.splitlines())


def test_two_hundred_sites_work(tmp_path, browser) -> None:
    browser.open(many_sites(200), tmp_path)
    assert len(browser.find("tr.site")) == 200
    (query,) = browser.find("#query")
    query.send_keys("layers.99")
    assert len(browser.find("tr.site:not([hidden])")) == 2
    browser.shown("tr.site button")[1].click()
    browser.wait_for(".sides[data-ready]")


def test_narrow_screens_need_no_sideways_scrolling(tmp_path, browser) -> None:
    long_name = ".".join(["a_module_with_quite_a_long_name"] * 8)
    report = many_sites(3)
    (graph,) = report.graphs
    sites = tuple(replace(s, norm=long_name, consumers=(long_name + "x",)) for s in graph.sites)
    report.graphs = [replace(graph, sites=sites)]
    metrics = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        browser.open(report, tmp_path)
        browser.find("tr.site button")[1].click()
        browser.wait_for(".sides[data-ready]")
        width = browser.driver.execute_script("return document.documentElement.scrollWidth")
        assert width <= 400
    finally:
        browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
