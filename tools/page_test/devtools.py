"""A headless Chromium, driven through its DevTools protocol, with Python's own library only."""
import base64
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path


class WebSocket:
    """The client's side of RFC 6455, as far as DevTools needs it: messages of text, sent masked."""

    def __init__(self, url, timeout):
        host, port, path = re.fullmatch(r"ws://([^/:]+):(\d+)(/.*)", url).groups()
        self.socket = socket.create_connection((host, int(port)), timeout)
        self.held = b""
        key = base64.b64encode(os.urandom(16)).decode()
        self.socket.sendall((f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                             f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n").encode())
        while b"\r\n\r\n" not in self.held:
            self.read_some()
        head, self.held = self.held.split(b"\r\n\r\n", 1)
        if b" 101 " not in head.splitlines()[0]:
            raise OSError(f"no WebSocket at {url}: {head.splitlines()[0].decode()}")

    def read_some(self):
        more = self.socket.recv(1 << 16)
        if not more:
            raise OSError("the browser has closed the connection")
        self.held += more

    def send(self, text, opcode=1):
        payload, mask = text.encode() if isinstance(text, str) else text, os.urandom(4)
        n = len(payload)
        size = struct.pack(">B", 0x80 | n) if n < 126 else struct.pack(">BH", 0xFE, n) if n < 1 << 16 else struct.pack(">BQ", 0xFF, n)
        self.socket.sendall(bytes([0x80 | opcode]) + size + mask + bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload)))

    def frame(self):
        """The first frame of what has been read, as (last of its message, opcode, payload); None where it is not whole."""
        if len(self.held) < 2:
            return None
        n, begin = self.held[1] & 0x7F, 2
        if n >= 126:
            begin = 4 if n == 126 else 10
            if len(self.held) < begin:
                return None
            n = int.from_bytes(self.held[2:begin], "big")
        if len(self.held) < begin + n:
            return None
        head, payload, self.held = self.held[0], self.held[begin:begin + n], self.held[begin + n:]
        return head & 0x80, head & 0x0F, payload

    def receive(self, timeout):
        """The next message; None where none is whole in time."""
        end, message = time.monotonic() + timeout, b""
        while True:
            while (frame := self.frame()) is None:
                # Between two frames of one message there is no giving up: what has come would be lost.
                left = end - time.monotonic()
                self.socket.settimeout(60 if message else max(left, 0.001))
                try:
                    self.read_some()
                except TimeoutError:
                    return None
            last, opcode, payload = frame
            if opcode == 8:
                raise OSError("the browser has ended the conversation")
            if opcode == 9:
                self.send(payload, opcode=10)
            elif opcode in (0, 1):
                message += payload
                if last:
                    return message.decode()


class Failed(Exception):
    """Something that is not as it should be, in a sentence."""


class Browser:
    """One page of one browser, with a profile of its own that is gone afterwards. `events` is all that the page reported."""

    def __init__(self, program, patience=120):
        self.patience, self.events, self.last_id = patience, [], 0
        self.profile = tempfile.mkdtemp(prefix="page_test.")
        self.process = subprocess.Popen(
            [program, "--headless=new", "--remote-debugging-port=0", "--no-sandbox", "--disable-gpu", "--no-first-run",
             "--disable-dev-shm-usage", "--disable-extensions", "--hide-scrollbars", "--user-data-dir=" + self.profile, "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            self.socket = WebSocket(self.page_address(), patience)
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.call(domain + ".enable")
            # Its own empty page first: the end of that one must not be taken for the end of another's loading.
            self.wait("document.readyState === 'complete'", "the browser shows no page", patience)
        except BaseException:
            self.close()
            raise

    def page_address(self):
        end, port_file = time.monotonic() + self.patience, Path(self.profile, "DevToolsActivePort")
        while time.monotonic() < end and self.process.poll() is None:
            if port_file.exists() and (lines := port_file.read_text().split()):
                with urllib.request.urlopen(f"http://127.0.0.1:{lines[0]}/json/list", timeout=self.patience) as reply:
                    for target in json.load(reply):
                        if target["type"] == "page":
                            return target["webSocketDebuggerUrl"]
            time.sleep(0.05)
        raise Failed("the browser does not start")

    def close(self):
        self.process.kill()
        self.process.wait()
        for _ in range(50):  # its children notice a moment later, and write until then
            shutil.rmtree(self.profile, ignore_errors=True)
            if not os.path.exists(self.profile):
                break
            time.sleep(0.1)

    def take(self, timeout):
        """Reads one message; what is no answer goes to `events`."""
        text = self.socket.receive(timeout)
        message = json.loads(text) if text else {}
        if "method" in message:
            self.events.append(message)
        return message

    def call(self, method, **params):
        self.last_id += 1
        self.socket.send(json.dumps({"id": self.last_id, "method": method, "params": params}))
        end = time.monotonic() + self.patience
        while time.monotonic() < end:
            message = self.take(end - time.monotonic())
            if message.get("id") == self.last_id:
                if "error" in message:
                    raise Failed(f"{method}: {message['error']['message']}")
                return message["result"]
        raise Failed(f"{method}: the browser does not answer")

    def value(self, expression):
        """What a JavaScript expression, or the promise that it gives, comes to in the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise Failed(f"{expression}: {result['exceptionDetails']['exception'].get('description', 'failed')}")
        return result["result"].get("value")

    def wait(self, expression, sentence, seconds=120):
        """Until the expression is true in the page; else fails with the sentence."""
        end = time.monotonic() + seconds
        while not self.value(expression):
            if time.monotonic() > end:
                raise Failed(sentence)
            time.sleep(0.02)

    def load(self, method, **params):
        """Page.navigate or Page.reload, until the new document is there."""
        before = len(self.seen("Page.loadEventFired"))
        self.call(method, **params)
        end = time.monotonic() + self.patience
        while sum(event["method"] == "Page.loadEventFired" for event in self.events) == before:
            if time.monotonic() > end:
                raise Failed("the page is not loaded")
            self.take(0.1)

    def size(self, width, height):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)

    def click(self, selector):
        """A click of the mouse in the middle of an element, which must be what lies there."""
        x, y, hit = self.value(f"""(() => {{
            const element = document.querySelector({json.dumps(selector)});
            element.scrollIntoView({{block: 'nearest'}});
            const box = element.getBoundingClientRect(), x = box.x + box.width / 2, y = box.y + box.height / 2;
            return [x, y, element.contains(document.elementFromPoint(x, y))];
        }})()""")
        if not hit:
            raise Failed(f"{selector} cannot be clicked: it is hidden, or something lies over it")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, selector, text):
        """Replaces what a field has by typed text."""
        self.click(selector)
        self.value(f"document.querySelector({json.dumps(selector)}).select()")
        self.call("Input.insertText", text=text)

    def press(self, key, code):
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)

    def picture(self):
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def seen(self, method):
        """Parameters of the events of a kind so far."""
        self.value("0")  # takes in what has been sent until now
        return [event["params"] for event in self.events if event["method"] == method]
