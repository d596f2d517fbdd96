"""The Chromium in which the pages of `gossamer report` and of the documentation are tested.

    python tests/browser.py     # part of `make test`: installs one where none is found

Without one those tests are skipped, so this never fails; it says in a line what came of it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 300  # seconds, for each of the commands
APT = ["apt-get", "-qq", "-y", "--no-install-recommends", "-o", "Acquire::Retries=0"]


def chromium() -> str | None:
    """The system's Chromium, or the one that playwright has brought."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    return found or _playwrights()


def _playwrights() -> str | None:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return None
    with sync_playwright() as playwright:
        path = playwright.chromium.executable_path
    return path if Path(path).exists() else None


def install() -> None:
    """By apt where this is root on a Linux that has it, else as playwright does."""
    by_apt = [[*APT, "update"], [*APT, "install", "chromium", "fonts-dejavu-core"]]
    root = sys.platform == "linux" and os.geteuid() == 0
    if not (root and shutil.which("apt-get") and all(map(_done, by_apt))):
        _done([sys.executable, "-m", "playwright", "install", "chromium"])


def _done(command: list[str]) -> bool:
    quiet = {"DEBIAN_FRONTEND": "noninteractive", **os.environ}
    try:
        done = subprocess.run(command, capture_output=True, timeout=PATIENCE, env=quiet)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def main() -> None:
    """Install one where there is none; say what came of it."""
    if chromium() is None:
        sys.stderr.write("installing Chromium, for the tests of HTML pages\n")
        install()
        if chromium() is None:
            sys.stderr.write(
                "no Chromium to be had: the tests of HTML pages are skipped; to have them run, "
                "`apt-get install chromium` or `playwright install chromium`\n"
            )


if __name__ == "__main__":
    main()
