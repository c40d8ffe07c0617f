#!/usr/bin/env python3
"""Many clients of `lesskv serve` at once, each one stream after the other, and what they had to wait for.

    lesskv serve -m models/lesskv-small.gguf --parallel 8 --queue 32 --port 8080 &
    tools/load_test/load_test.py --port 8080 --streams 8 --seconds 60

Half of the requests go on with the client's last text, as conversations do, the others begin a new one behind a common
beginning. Python's own library only. Exit status 1 when an answer was wrong: not a status that was to be expected, or a
stream without its end.
"""
import argparse
import http.client
import json
import os
import random
import sys
import threading
import time

SYSTEM = "It was a cold evening, and the old men of the harbour sat around the fire and told stories. One of them said: "
OPENINGS = ["The sea was", "My brother once", "A ship came", "Nobody knew", "In the winter", "The captain had"]


class Client(threading.Thread):
    def __init__(self, number, options):
        super().__init__(daemon=True)
        self.options, self.random = options, random.Random(number)
        self.first, self.gaps, self.total = [], [], []
        self.tokens = self.cached = self.prompt = 0
        self.statuses, self.wrong = {}, []
        self.text = None

    def next_prompt(self):
        if self.text is not None and self.random.random() < 0.5:
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
            body["kv_policy"] = self.options.kv
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("LESSKV_API_KEY"):
            headers["Authorization"] = "Bearer " + key
        connection = http.client.HTTPConnection(self.options.host, self.options.port, timeout=120)
        try:
            begin = time.monotonic()
            connection.request("POST", "/v1/completions", json.dumps(body), headers)
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
    parser.add_argument("--kv", default="", help="cache policy of the requests")
    options = parser.parse_args()
    clients = [Client(number, options) for number in range(options.streams)]
    begin = time.monotonic()
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    seconds = time.monotonic() - begin
    every = lambda name: [value for client in clients for value in getattr(client, name)]
    count = lambda name: sum(getattr(client, name) for client in clients)
    statuses = {}
    for client in clients:
        for status, n in client.statuses.items():
            statuses[status] = statuses.get(status, 0) + n
    print(f"{options.streams} streams, {seconds:.1f} s, statuses {dict(sorted(statuses.items()))}")
    print(f"generated   {count('tokens')} tokens, {count('tokens') / seconds:.1f} tokens/s")
    print(f"prompts     {count('prompt')} tokens, {count('cached')} of them cached")
    print(f"first token {spread(every('first'))}")
    print(f"next token  {spread(every('gaps'))}")
    print(f"whole text  {spread(every('total'))}")
    for error in every("wrong")[:10]:
        print("wrong:", error)
    return 1 if every("wrong") or not count("tokens") else 0


if __name__ == "__main__":
    sys.exit(main())
