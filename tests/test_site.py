"""The documentation site: built strictly, whole, and without the network."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from browser import chromium

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site; broken links and anchors, pages that the navigation lacks, are errors."""
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


def test_every_page_is_there(site: Path) -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        assert (site / page.relative_to(ROOT / "docs")).with_suffix(".html").exists(), page
    for example in (ROOT / "examples").glob("*.py"):
        assert (site / "examples" / example.name).with_suffix(".html").exists(), example
    assert not list(site.rglob("site.py"))
    recipes = (site / "recipes.html").read_text()
    for recipe in (ROOT / "recipes").glob("*.yaml"):
        assert recipe.stem in recipes


def test_the_api_says_what_arguments_are(site: Path) -> None:
    text = re.sub(r"<[^>]+>", "", (site / "api" / "training.html").read_text())
    assert "Optimizer steps of the whole run; schedules are fractions of it." in text


def loaded(html: str) -> list[str]:
    """Addresses that a browser follows by itself."""
    tags = re.findall(r"<(?:script|img|iframe|source|video)\b[^>]*\bsrc=\"?([^\s\">]+)", html)
    for link in re.findall(r"<link\b[^>]*>", html):
        rel, href = (re.search(rf'\b{name}="?([^">]+)', link) for name in ("rel", "href"))
        assert rel is not None
        assert href is not None
        if rel[1] not in ("prev", "next", "canonical"):
            tags.append(href[1])
    return tags


def test_nothing_comes_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        found = loaded(page.read_text())
        assert len(found) >= 5
        assert not [address for address in found if re.match(r"(https?:)?//", address)], page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(\W?(https?:)?//", sheet.read_text()), sheet


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    sync_api = pytest.importorskip("playwright.sync_api")
    path = chromium()
    if path is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-gpu"]
        )
        yield started
        started.close()


@pytest.mark.parametrize("name", ["index", "start", "faq", "api/training", "methods/chase"])
@pytest.mark.parametrize("width", [360, 1200])
def test_a_browser_opens_it(browser, site: Path, name: str, width: int) -> None:
    """From the file system: no console error, no request elsewhere, nothing that sticks out."""
    page = browser.new_page(viewport={"width": width, "height": 900})
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto((site / f"{name}.html").as_uri())
    page.wait_for_load_state("networkidle")
    assert page.inner_text("h1")
    assert said == []
    assert all(address.startswith("file:") for address in asked)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def test_search_finds(browser, site: Path) -> None:
    """Browsers run no search on pages that come from the file system; `mkdocs serve` is enough."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(site))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            page = browser.new_page(viewport={"width": 1300, "height": 900})
            home = f"http://127.0.0.1:{server.server_port}/"
            asked = []
            page.on("request", lambda request: asked.append(request.url))
            page.goto(f"{home}index.html")
            page.click(".md-search__input")  # loads the index
            page.wait_for_load_state("networkidle")
            page.keyboard.type("GradScaler", delay=20)
            page.wait_for_selector(".md-search-result__link[href*='faq.html']")
            assert "GradScaler skips steps" in page.inner_text(".md-search-result")
            assert all(address.startswith(home) for address in asked)
            page.close()
        finally:
            server.shutdown()
            thread.join()
