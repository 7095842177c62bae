"""Open a page in a headless Chromium without a network; screenshots, and what was wrong.

python tests/page_in_browser.py PAGE.html FOLDER
"""

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
from itertools import count
from pathlib import Path
from threading import Timer
from typing import NamedTuple

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTHS = {"phone": 360, "desktop": 1280}
# Its elements that stand out of the window to the right, save in a box that scrolls.
MEASURE = """(() => {
  const inner = document.documentElement.clientWidth
  const out = [...document.body.querySelectorAll("*")].filter(e =>
    e.getBoundingClientRect().right > inner + 1 && !e.closest(".scroll"))
  return {inner, scroll: document.scrollingElement.scrollWidth,
          out: out.map(e => e.tagName + ": " + e.textContent.slice(0, 60)),
          letters: Math.min(...[...document.querySelectorAll("p, td, th, figcaption")].map(
            e => parseFloat(getComputedStyle(e).fontSize)))}
})()"""


class Seen(NamedTuple):
    """A page as it was shown: CSS pixels, texts of elements that stand out, and what was wrong."""

    inner: int
    scroll: int
    out: list[str]
    letters: float  # the smallest of the texts
    problems: list[str]  # messages of the console, exceptions, failed loads
    requests: list[str]  # everything that was loaded besides the page


def browser() -> str | None:
    """A Chromium on the path, if there is one."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def look(page: Path, width: int, *, dark: bool = False, shot: Path | None = None) -> Seen:
    """Show a page at a width, offline; `shot` is written with all of it."""
    to_read, to_browser = os.pipe()
    from_browser, to_write = os.pipe()
    # What the browser still writes while it ends is nobody's loss.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        # It reads its file 3 and writes its file 4: the protocol of its developer tools.
        options = ["--headless", "--remote-debugging-pipe", f"--user-data-dir={home}"]
        options += ["--no-first-run", "--disable-gpu", "--hide-scrollbars"]
        options += ["--no-sandbox"] if os.geteuid() == 0 else []
        # Of shells, not all know descriptors of two digits.
        process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{to_read} 4>&{to_write}', "bash", browser(), *options],
            pass_fds=(to_read, to_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        # One that hangs is one that ends: nothing more can be read.
        late = Timer(60, process.kill)
        late.start()
        try:
            with os.fdopen(to_browser, "wb", 0) as write, os.fdopen(from_browser, "rb") as read:
                seen = _look(write, read, page, width, dark, shot)
        finally:
            late.cancel()
            process.terminate()
            process.wait()
    return seen


def _look(write, read, page, width, dark, shot) -> Seen:
    numbers, events = count(1), []

    def receive():
        text = bytearray()
        while (byte := read.read(1)) != b"\0":
            if not byte:
                raise OSError("The browser ended.")
            text += byte
        return json.loads(text)

    def call(method, session=None, **params):
        number = next(numbers)
        message = {"id": number, "method": method, "params": params}
        message |= {"sessionId": session} if session else {}
        write.write(json.dumps(message).encode() + b"\0")
        while (answer := receive()).get("id") != number:
            events.append(answer)
        if "error" in answer:
            raise OSError(f"{method}: {answer['error']}")
        return answer["result"]

    target = call("Target.createTarget", url="about:blank")["targetId"]
    session = call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    for part in ("Page", "Runtime", "Log", "Network"):
        call(f"{part}.enable", session)
    speed = {"latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    call("Network.emulateNetworkConditions", session, offline=True, **speed)
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    call("Emulation.setDeviceMetricsOverride", session, **size)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    call("Emulation.setEmulatedMedia", session, features=[scheme])
    call("Page.navigate", session, url=page.resolve().as_uri())
    while not any(event.get("method") == "Page.loadEventFired" for event in events):
        events.append(receive())
    options = {"expression": MEASURE, "returnByValue": True}
    measured = call("Runtime.evaluate", session, **options)["result"]["value"]
    if shot:
        data = call("Page.captureScreenshot", session, captureBeyondViewport=True)["data"]
        shot.write_bytes(base64.b64decode(data))
    problems = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
    requests = [
        e["params"]["request"]["url"]
        for e in events
        if e.get("method") == "Network.requestWillBeSent"
    ]
    return Seen(
        **measured,
        problems=[json.dumps(e["params"]) for e in events if e.get("method") in problems],
        requests=[url for url in requests if url != page.resolve().as_uri()],
    )


if __name__ == "__main__":
    page, folder = map(Path, sys.argv[1:])
    folder.mkdir(parents=True, exist_ok=True)
    for name, width in WIDTHS.items():
        for dark in (False, True):
            shot = folder / f"{page.stem}-{name}{'-dark' if dark else ''}.png"
            print(shot, look(page, width, dark=dark, shot=shot))
