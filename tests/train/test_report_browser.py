"""The page of `gossamer report` in headless Chromium, as a reader opens it.

Needs the package playwright and a Chromium; `make test` installs both, see tests/browser.py.
"""

import shutil
import sys

import pytest

from browser import chromium
from gossamer.train import cli

sync_api = pytest.importorskip("playwright.sync_api")

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

TINY = ["--model", "vgg-small", "--width", "0.25", "--epochs", "2", "--threads", "1"]
TINY += ["--density", "0.2", "--channel_sparsity", "0.4", "--min_channels", "2"]
SIZES = {"desktop": (1200, 900), "phone": (360, 740)}

# Whether the page is light; drawings too small to read; colours of lines, texts and bars that
# cannot be told from what is behind them.
LOOK = """() => {
    const brightness = colour => {
        const [r, g, b] = colour.match(/[\\d.]+/g).map(Number);
        return (0.299 * r + 0.587 * g + 0.114 * b) / 255;
    };
    const all = (where, property) =>
        [...document.querySelectorAll(where)].map(part => getComputedStyle(part)[property]);
    const behind = brightness(all('section', 'backgroundColor')[0]);
    const lines = all('svg path[style*="stroke-width: 1.6"]', 'stroke');
    const texts = all('svg text', 'fill');
    const bars = all('.rail i, .meter i', 'backgroundColor');
    if (lines.length < 10 || texts.length < 50 || bars.length < 12) throw Error('little is drawn');
    return [
        behind > 0.5,
        all('svg', 'width').filter(width => parseFloat(width) < 280),
        [...lines, ...texts, ...bars].filter(one => Math.abs(brightness(one) - behind) < 0.2),
    ];
}"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The page of one run, and of two side by side."""
    folder = tmp_path_factory.mktemp("browser")
    with pytest.MonkeyPatch.context() as patch, (folder / "out").open("w") as out:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", out)
        runs = [str(folder / name) for name in ("one", "two")]
        assert cli.main(["train", *TINY, "--baseline", "--out", runs[0]]) == 0
        shutil.copytree(runs[0], runs[1])
        assert cli.main(["report", *runs, "--quick", "--out", str(folder / "two.html")]) == 0
    return {"one": folder / "one" / "report.html", "two": folder / "two.html"}


@pytest.fixture(scope="module")
def browser():
    path = chromium()
    if path is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-gpu"]
        )
        yield started
        started.close()


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("name", "scheme", "size"),
    [
        ("one", "light", "desktop"),
        ("one", "dark", "phone"),
        ("two", "dark", "desktop"),
        ("two", "light", "phone"),
    ],
)
def test_the_page_opens(browser, pages, tmp_path, name, scheme, size):
    width, height = SIZES[size]
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(pages[name].as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    shot = tmp_path / "page.png"
    page.screenshot(path=shot, full_page=True)

    assert said == []
    assert asked == [pages[name].as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing sticks out
    assert shot.stat().st_size > 20_000
    assert page.evaluate(LOOK) == [scheme == "light", [], []]
    page.close()
