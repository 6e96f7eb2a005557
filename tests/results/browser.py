"""A headless Chromium to test pages with, spoken to by its DevTools protocol."""

import asyncio
import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """One tab. `problems` are errors on its console, `requests` the URLs that it asked for."""

    def __init__(self):
        self.problems: list[str] = []
        self.requests: list[str] = []
        self._loop = asyncio.new_event_loop()
        self._number = 0

    def __enter__(self) -> "Browser":
        self._folder = tempfile.mkdtemp()
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        options += ["--no-first-run", "--disable-background-networking", "--remote-debugging-port=0"]
        command = [CHROMIUM, *options, f"--user-data-dir={self._folder}", "about:blank"]
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(command, stdout=quiet, stderr=quiet, env=os.environ | {"HOME": self._folder})
        port = Path(self._folder) / "DevToolsActivePort"
        end = time.monotonic() + 120
        while not (port.exists() and port.read_text().count("\n")):
            assert self._process.poll() is None and time.monotonic() < end, "chromium did not start"
            time.sleep(0.1)
        self._run(self._connect(port.read_text().split("\n")[0]))
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *exception) -> None:
        self._run(self._session.close())
        self._process.terminate()
        self._process.wait(30)
        self._loop.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _run(self, work):
        return self._loop.run_until_complete(asyncio.wait_for(work, 120))

    async def _connect(self, port: str) -> None:
        self._session = aiohttp.ClientSession()
        async with self._session.get(f"http://127.0.0.1:{port}/json/list") as answer:
            tab = next(tab for tab in await answer.json() if tab["type"] == "page")
        self._socket = await self._session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0)

    async def _until(self, wanted) -> dict:
        while True:
            message = json.loads((await self._socket.receive()).data)
            self._note(message)
            if wanted(message):
                return message

    def _note(self, message: dict) -> None:
        what, told = message.get("method"), message.get("params", {})
        if what == "Runtime.exceptionThrown":
            details = told["exceptionDetails"]
            self.problems.append(details.get("exception", {}).get("description") or details["text"])
        elif what == "Log.entryAdded" and told["entry"]["level"] == "error":
            self.problems.append(told["entry"]["text"])
        elif what == "Runtime.consoleAPICalled" and told["type"] in ("error", "assert"):
            self.problems.append(json.dumps(told["args"]))
        elif what == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])

    def call(self, method: str, **arguments) -> dict:
        """A command of the protocol, and its result."""
        self._number += 1
        number = self._number
        self._run(self._socket.send_json({"id": number, "method": method, "params": arguments}))
        answer = self._run(self._until(lambda message: message.get("id") == number))
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, path: Path) -> None:
        """Open a file, and wait until it has loaded."""
        self.call("Page.navigate", url=path.resolve().as_uri())
        self._run(self._until(lambda message: message.get("method") == "Page.loadEventFired"))

    def evaluate(self, expression: str):
        """The value of a JavaScript expression; of a promise, what it comes to."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def press(self, key: str, shift: bool = False) -> None:
        text = {"text": key} if len(key) == 1 else {}
        code = {"ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35, " ": 32, "Tab": 9}[key]
        common = {"key": key, "windowsVirtualKeyCode": code, "modifiers": 8 * shift}
        self.call("Input.dispatchKeyEvent", type="keyDown", **common, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def size(self, width: int, height: int, phone: bool = False) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1 + phone, mobile=phone
        )

    def scheme(self, name: str) -> None:
        """light or dark"""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def screenshot(self, path: Path, selector: str | None = None) -> None:
        """Of an element, or of the whole page."""
        clip = self.evaluate(
            f"(() => {{ const box = document.querySelector({json.dumps(selector or 'html')}).getBoundingClientRect();"
            "return {x: box.x + scrollX, y: box.y + scrollY, width: box.width, height: box.height, scale: 1}; })()"
        )
        data = self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))
