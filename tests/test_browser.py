"""The set-up of the browser tests: it installs what it can, and never fails `make test`."""

from __future__ import annotations

import subprocess

import pytest

import browser


def test_nothing_is_done_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(browser, "chromium", lambda: "/usr/bin/chromium")
    monkeypatch.setattr(browser, "install", lambda: pytest.fail("there was one"))
    browser.main()


@pytest.mark.parametrize(("root", "apt"), [(True, 0), (True, 100), (False, 0)])
def test_apt_and_then_playwright(
    root: bool,
    apt: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """apt-get as root, playwright where that is not to be or fails; neither raises."""
    asked = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        asked.append(command)
        if command[0] != "apt-get":
            raise subprocess.TimeoutExpired(command, 1)
        return subprocess.CompletedProcess(command, apt)

    monkeypatch.setattr(browser, "chromium", lambda: None)
    monkeypatch.setattr(browser.sys, "platform", "linux")
    monkeypatch.setattr(browser.os, "geteuid", lambda: 0 if root else 1000)
    monkeypatch.setattr(browser.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(browser.subprocess, "run", run)
    browser.main()
    by_apt = [command[-1] for command in asked if command[0] == "apt-get"]
    assert by_apt == (["update", "fonts-dejavu-core"] if root and not apt else ["update"] * root)
    by_playwright = [command for command in asked if command[-2:] == ["install", "chromium"]]
    assert len(by_playwright) == (not root or apt > 0)
    assert "no Chromium to be had" in capsys.readouterr().err
