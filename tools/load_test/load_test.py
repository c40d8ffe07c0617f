#!/usr/bin/env python3
"""Many clients of `lesskv serve` at once, each one stream after the other, and what they had to wait for.

    lesskv serve -m models/lesskv-small.gguf --parallel 8 --queue 32 --port 8080 &
    tools/load_test/load_test.py --port 8080 --streams 8 --seconds 60

Half of the requests go on with the client's last text, as conversations do, the others begin a new one behind a common
beginning. --rude N adds so many of each kind of client that behaves badly: they vanish, send garbage, read slowly, or never. What
the server holds (resident memory with --pid, caches by /metrics) is printed over time. Python's own library only.
Exit status 1 when an answer was wrong (not a status that was to be expected, or a stream without its end), caches took more than
the server's --kv-memory, its memory grew by more than a sixth from the second to the last quarter of the time, or a first token
took longer than --first-within.
"""
import argparse
import http.client
import json
import os
import random
import socket
import sys
import threading
import time
import urllib.request
from statistics import median

SYSTEM = "It was a cold evening, and the old men of the harbour sat around the fire and told stories. One of them said: "
LONGEST = 2000  # characters that a conversation goes on from
OPENINGS = ["The sea was", "My brother once", "A ship came", "Nobody knew", "In the winter", "The captain had"]


def headers():
    key = os.environ.get("LESSKV_API_KEY")
    return {"Content-Type": "application/json", **({"Authorization": "Bearer " + key} if key else {})}


class Client(threading.Thread):
    def __init__(self, number, options):
        super().__init__(daemon=True)
        self.options, self.random = options, random.Random(number)
        self.first, self.gaps, self.total = [], [], []
        self.tokens = self.cached = self.prompt = 0
        self.statuses, self.wrong = {}, []
        self.text = None

    def next_prompt(self):
        # Texts that grew without end would need more and more memory by themselves.
        if self.text is not None and len(self.text) < LONGEST and self.random.random() < 0.5:
            return self.text + " And then"
        return SYSTEM + self.random.choice(OPENINGS)

    def run(self):
        end = time.monotonic() + self.options.seconds
        while time.monotonic() < end:
            try:
                self.one(self.next_prompt())
            except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
                self.wrong.append(repr(error))
                time.sleep(0.1)

    def one(self, prompt):
        body = {"prompt": prompt, "max_tokens": self.options.tokens, "temperature": 0.7, "stream": True,
                "stream_options": {"include_usage": True}}
        if self.options.kv:
            body["kv_policy"] = self.random.choice(self.options.kv)
        connection = http.client.HTTPConnection(self.options.host, self.options.port, timeout=120)
        try:
            begin = time.monotonic()
            connection.request("POST", "/v1/completions", json.dumps(body), headers())
            reply = connection.getresponse()
            self.statuses[reply.status] = self.statuses.get(reply.status, 0) + 1
            if reply.status == 429:
                return time.sleep(float(reply.headers["Retry-After"]))
            if reply.status == 400:  # the text has become longer than the context
                self.text = None
                return None
            if reply.status != 200:
                raise ValueError(reply.read())
            self.read(reply, prompt, begin)
        finally:
            connection.close()

    def read(self, reply, prompt, begin):
        last, text, done = begin, "", False
        for line in reply:
            if not line.startswith(b"data: "):
                continue
            now = time.monotonic()
            if line.startswith(b"data: [DONE]"):
                done = True
                break
            event = json.loads(line[6:])
            if "error" in event:
                raise ValueError(event["error"]["message"])
            if usage := event.get("usage"):
                self.tokens += usage["completion_tokens"]
                self.prompt += usage["prompt_tokens"]
                self.cached += usage["prompt_tokens_details"]["cached_tokens"]
            elif piece := event["choices"][0]["text"]:
                (self.gaps if text else self.first).append(now - last)
                text, last = text + piece, now
        if not done:
            raise ValueError("a stream without its end")
        self.total.append(time.monotonic() - begin)
        self.text = prompt + text


class Rude(threading.Thread):
    """A client of which nothing is asked but that others do not suffer from it. `kinds` lists the ways."""

    def __init__(self, number, options, kind):
        super().__init__(daemon=True)
        self.options, self.random, self.kind = options, random.Random(number), kind
        self.done = 0

    def run(self):
        end = time.monotonic() + self.options.seconds
        while time.monotonic() < end:
            try:
                with socket.socket() as connection:
                    # A small buffer of its own, so that what it does not read becomes the server's matter soon.
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
                    connection.settimeout(60)
                    connection.connect((self.options.host, self.options.port))
                    getattr(self, self.kind)(connection, end)
            except OSError:
                time.sleep(0.05)
            self.done += 1

    def ask(self, connection, **more):
        prompt = SYSTEM + self.random.choice(OPENINGS)
        body = json.dumps({"prompt": prompt, "max_tokens": 200, "stream": True, **more}).encode()
        lines = ["POST /v1/completions HTTP/1.1", "Host: " + self.options.host, f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in headers().items()]
        connection.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + body)

    def vanishes(self, connection, end):
        """Goes at once, while it waits, or in the middle of the answer."""
        self.ask(connection)
        for _ in range(self.random.choice([0, 0, 1, 5])):
            connection.recv(512)
        time.sleep(self.random.choice([0, 0.05, 0.5]))

    def garbage(self, connection, end):
        body = self.random.choice([b"{", b"[]", b"null", b'{"prompt": 7}', b'{"prompt": "a", "max_tokens": -1}', b"\xff" * 100,
                                   b'{"prompt": "a", "nonsense": 1}', b"[" * 5000, b'{"prompt": "' + b"a" * 200000 + b'"}'])
        connection.sendall(self.random.choice([
            self.random.randbytes(2000), b"GET /" + b"a" * 20000 + b" HTTP/1.1\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\n",
            b"POST /v1/completions HTTP/1.1\r\nContent-Length: 999999999999\r\n\r\n{",
            b"POST /v1/completions HTTP/1.1\r\nContent-Length: 50\r\n\r\n{",
            b"POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body]))
        connection.settimeout(2)
        connection.recv(4096)

    def slow(self, connection, end):
        self.ask(connection, logprobs=5)
        while time.monotonic() < end and connection.recv(256):
            time.sleep(0.02)

    def never(self, connection, end):
        self.ask(connection, logprobs=5, max_tokens=1000)
        time.sleep(max(0, min(20, end - time.monotonic())))

    kinds = ("vanishes", "garbage", "slow", "never")


class Watch(threading.Thread):
    """What the server holds, once a second."""

    def __init__(self, options):
        super().__init__(daemon=True)
        self.options, self.stop = options, threading.Event()
        self.samples, self.unreachable = [], 0  # (seconds, resident bytes, bytes of caches); times that /metrics failed
        self.begin = time.monotonic()
        self.kv_memory = json.loads(self.get("/props"))["kv_memory"]

    def get(self, path):
        url = f"http://{self.options.host}:{self.options.port}{path}"
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers()), timeout=30) as reply:
            return reply.read()

    def resident(self):
        with open(f"/proc/{self.options.pid}/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS:"))

    def run(self):
        every, next_print = self.options.seconds / 20, 0
        while not self.stop.wait(1):
            try:
                metrics = dict(line.rsplit(" ", 1) for line in self.get("/metrics").decode().splitlines() if line[:1] != "#")
            except OSError:
                self.unreachable += 1
                continue
            caches = int(metrics["lesskv_kv_bytes"]) + int(metrics["lesskv_idle_bytes"])
            seconds, resident = time.monotonic() - self.begin, self.resident() if self.options.pid else 0
            self.samples.append((seconds, resident, caches))
            if seconds >= next_print:
                next_print += every
                print(f"{seconds:6.0f} s  resident {mib(resident)}  caches {mib(caches)}  running {metrics['lesskv_requests_running']}"
                      f"  queued {metrics['lesskv_requests_queued']}", flush=True)

    def quarter(self, n):
        """Median of the resident bytes in a quarter of the time."""
        length = self.options.seconds / 4
        values = [resident for seconds, resident, _ in self.samples if n * length <= seconds < (n + 1) * length]
        return median(values) if values else 0

    def faults(self):
        most = max((caches for _, _, caches in self.samples), default=0)
        second, last = self.quarter(1), self.quarter(3)
        print(f"caches      at most {mib(most)} of {mib(self.kv_memory)}")
        if self.options.pid:
            print(f"resident    second quarter {mib(second)}, last quarter {mib(last)}, at most {mib(max(s[1] for s in self.samples))}")
        if self.unreachable:
            yield f"/metrics was not answered {self.unreachable} times"
        if self.kv_memory and most > self.kv_memory:
            yield f"caches took {mib(most)} of {mib(self.kv_memory)}"
        if last > 7 / 6 * second:
            yield f"resident memory grew from {mib(second)} to {mib(last)}"


def mib(n):
    return f"{n / (1 << 20):.1f} MiB"


def spread(values, unit=1000):
    if not values:
        return "none"
    values = sorted(values)
    at = lambda share: values[min(len(values) - 1, int(share * len(values)))] * unit
    return f"median {at(0.5):.0f} ms, 95 % {at(0.95):.0f} ms, most {values[-1] * unit:.0f} ms"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--tokens", type=int, default=32, help="of an answer")
    parser.add_argument("--kv", action="append", help="cache policy of the requests; one of several is drawn for each")
    parser.add_argument("--rude", type=int, default=0, help="clients of each kind that behaves badly")
    parser.add_argument("--pid", type=int, help="of the server on this machine, whose memory is watched")
    parser.add_argument("--first-within", type=float, default=float("inf"), help="seconds that a first token may take")
    options = parser.parse_args()
    watch = Watch(options)
    clients = [Client(number, options) for number in range(options.streams)]
    rude = [Rude(number, options, kind) for number in range(options.rude) for kind in Rude.kinds]
    begin = time.monotonic()
    for thread in [watch, *clients, *rude]:
        thread.start()
    for thread in [*clients, *rude]:
        thread.join()
    seconds = time.monotonic() - begin
    watch.stop.set()
    watch.join()
    every = lambda name: [value for client in clients for value in getattr(client, name)]
    count = lambda name: sum(getattr(client, name) for client in clients)
    statuses = {}
    for client in clients:
        for status, n in client.statuses.items():
            statuses[status] = statuses.get(status, 0) + n
    print(f"{options.streams} streams, {seconds:.1f} s, statuses {dict(sorted(statuses.items()))}")
    if rude:
        print("rude        " + ", ".join(f"{kind} {sum(r.done for r in rude if r.kind == kind)} times" for kind in Rude.kinds))
    print(f"generated   {count('tokens')} tokens, {count('tokens') / seconds:.1f} tokens/s")
    print(f"prompts     {count('prompt')} tokens, {count('cached')} of them cached")
    print(f"first token {spread(every('first'))}")
    print(f"next token  {spread(every('gaps'))}")
    print(f"whole text  {spread(every('total'))}")
    wrong = every("wrong") + list(watch.faults())
    if every("first") and max(every("first")) > options.first_within:
        wrong.append(f"a first token took {max(every('first')):.1f} s")
    for error in wrong[:10]:
        print("wrong:", error)
    return 1 if wrong or not count("tokens") else 0


if __name__ == "__main__":
    sys.exit(main())
