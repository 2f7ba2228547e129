"""A browser for the tests of the page, and a server that answers what they have written down."""

from __future__ import annotations

import os
import shutil
import threading

import pytest

from page.scripted_server import ScriptedServer

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="package")  # Playwright runs an event loop in this thread, which other tests want for themselves
def context():
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    sandbox = [] if os.geteuid() else ["--no-sandbox"]  # Chromium has none for root
    drawing = ["--disable-gpu", "--in-process-gpu"]  # on the CPU, without a process of its own
    with playwright.sync_playwright() as running:
        context = running.chromium.launch(executable_path=CHROMIUM, args=sandbox + drawing).new_context()
        context.set_default_timeout(5000)
        yield context
        context.close()


@pytest.fixture(scope="package")
def window(context):
    page = context.new_page()
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("console", lambda line: page.errors.append(line.text) if line.type in ("error", "warning") else None)
    return page


@pytest.fixture
def server():
    with ScriptedServer() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def tab(window, server):
    """The page with nothing kept yet: each server has an address of its own. Errors that it reports fail the test."""
    window.set_viewport_size({"width": 1200, "height": 800})
    window.goto(server.url)
    yield window
    window.unroute_all()
    errors = window.errors.copy()
    window.errors.clear()
    assert not errors
