"""The browser that pages are tried in."""

import shutil

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


def find_browser() -> str | None:
    """Path of a Chromium; None where there is none (make browser)."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)
