"""A headless Chromium, spoken to over a pipe in its DevTools protocol: nothing to install beside the browser."""

import json
import os
import shutil
import subprocess
from contextlib import contextmanager
from itertools import count
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe")


class Page:
    """An open page; ``requests`` are the addresses it has asked for."""

    def __init__(self, commands, answers):
        self._commands, self._answers = commands, answers
        self._numbers = count(1)
        self.requests: list[str] = []
        self.errors: list[str] = []
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network"):
            self.call(f"{domain}.enable")

    def open(self, file: Path, width: int, dark: bool = False) -> None:
        size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=file.as_uri())
        self._until("Page.loadEventFired")

    def run(self, script: str) -> object:
        """The value of a script, as JSON."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def call(self, method: str, **parameters) -> dict:
        number = next(self._numbers)
        command = {"id": number, "method": method, "params": parameters}
        if self._session:
            command["sessionId"] = self._session
        self._commands.write(json.dumps(command).encode() + b"\0")
        self._commands.flush()
        while (message := self._next()).get("id") != number:
            pass
        assert "error" not in message, message
        return message["result"]

    def _until(self, method: str) -> None:
        while self._next().get("method") != method:
            pass

    def _next(self) -> dict:
        message = bytearray()
        while (byte := self._answers.read(1)) != b"\0":
            assert byte, "the browser has gone"
            message += byte
        told = json.loads(message)
        if told.get("method") == "Network.requestWillBeSent":
            self.requests.append(told["params"]["request"]["url"])
        if told.get("method") == "Runtime.exceptionThrown":
            self.errors.append(told["params"]["exceptionDetails"]["text"])
        return told


@contextmanager
def chromium(profile: Path):
    """A page of a browser with a profile of its own."""
    to_browser, from_us = os.pipe()
    to_us, from_browser = os.pipe()
    # The browser reads its third descriptor and writes its fourth.
    start = f'exec "$0" "$@" 3<&{to_browser} 4>&{from_browser}'
    command = ["bash", "-c", start, CHROMIUM, *FLAGS, f"--user-data-dir={profile}"]
    with subprocess.Popen(command, pass_fds=(to_browser, from_browser), stderr=subprocess.DEVNULL) as process:
        os.close(to_browser)
        os.close(from_browser)
        try:
            with os.fdopen(from_us, "wb") as commands, os.fdopen(to_us, "rb") as answers:
                yield Page(commands, answers)
        finally:
            process.terminate()
