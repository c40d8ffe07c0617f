#!/usr/bin/env python3
"""Long conversations that share a server's cache memory: what is generated, how long a turn waits, what is read anew.

    lesskv serve -m MODEL --ctx 4096 --parallel 12 --queue 12 --kv-memory 144M --kv full --allow-kv "h2o(5%)+less" &
    tools/load_test/conversations.py --url http://127.0.0.1:8080 --text BOOK.txt --conversations 12 --turns 3 --kv "h2o(5%)+less"

Every conversation begins with a piece of the text of its own; each further turn adds what was answered and a little more of the
text, and asks at once. All conversations run side by side, turn by turn. Any server with OpenAI's /v1/completions will do, as long
as its usage says how many tokens of a prompt it had. Python's own library only.
"""
import argparse
import http.client
import json
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

from load_test import headers, spread


class Conversation(threading.Thread):
    def __init__(self, text, options, turn):
        super().__init__(daemon=True)
        self.text, self.options, self.turn = text, options, turn
        self.turns, self.wrong = [], []  # a turn: (seconds to the first token, usage)

    def run(self):
        said, at = self.text[:self.options.prompt_chars], self.options.prompt_chars
        for _ in range(self.options.turns):
            self.turn.wait()
            try:
                said += self.ask(said)
            except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
                self.wrong.append(repr(error))
            said, at = said + "\n" + self.text[at:at + self.options.question_chars], at + self.options.question_chars

    def ask(self, prompt):
        body = {"prompt": prompt, "max_tokens": self.options.answer_tokens, "temperature": 0, "stream": True,
                "stream_options": {"include_usage": True}}
        if self.options.kv:
            body["kv_policy"] = self.options.kv
        if self.options.say is not None:
            body["logit_bias"] = {str(self.options.say): 100}
        url = urlsplit(self.options.url)
        connection = http.client.HTTPConnection(url.hostname, url.port, timeout=self.options.timeout)
        try:
            begin, first, answer, usage = time.monotonic(), None, "", None
            connection.request("POST", "/v1/completions", json.dumps(body), headers())
            reply = connection.getresponse()
            if reply.status != 200:
                raise ValueError(f"status {reply.status}: {reply.read()}")
            for line in reply:
                if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise ValueError(event["error"]["message"])
                usage = event.get("usage") or usage
                if event.get("choices") and event["choices"][0]["text"]:
                    first = first or time.monotonic() - begin
                    answer += event["choices"][0]["text"]
            if usage is None:
                raise ValueError("a stream without its usage")
            self.turns.append((first or time.monotonic() - begin, usage))
            return answer
        finally:
            connection.close()


def cached(usage):
    return (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)


def report(name, turns, seconds):
    usages = [usage for _, usage in turns]
    generated, prompt = (sum(usage[field] for usage in usages) for field in ("completion_tokens", "prompt_tokens"))
    anew = sum(cached(usage) < usage["prompt_tokens"] / 2 for usage in usages)
    print(f"{name:6} {seconds:6.1f} s  {generated} tokens, {generated / seconds:.2f} tokens/s  prompts {prompt} tokens, "
          f"{prompt - sum(map(cached, usages))} read, {anew} of {len(usages)} anew  first token {spread([first for first, _ in turns])}",
          flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--text", type=Path, action="append", required=True, help="files of text, one after the other")
    parser.add_argument("--conversations", type=int, default=12)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--prompt-chars", type=int, default=12000, help="of the first turn")
    parser.add_argument("--question-chars", type=int, default=120, help="of each further turn")
    parser.add_argument("--answer-tokens", type=int, default=48)
    parser.add_argument("--kv", default="", help="cache policy, for lesskv")
    parser.add_argument("--say", type=int, help="a token that all answers consist of: what a model of random weights says would not become "
                                                "the same tokens again, and its next turn be read anew")
    parser.add_argument("--timeout", type=float, default=600, help="seconds that a server may say nothing")
    options = parser.parse_args()
    text = "".join(path.read_text(encoding="utf-8", errors="replace") for path in options.text)
    share = len(text) // options.conversations
    if share < options.prompt_chars + options.turns * options.question_chars:
        parser.error(f"the text has {len(text)} characters, too few for {options.conversations} conversations")
    ends = []
    turn = threading.Barrier(options.conversations, action=lambda: ends.append(time.monotonic()))
    talks = [Conversation(text[n * share:(n + 1) * share], options, turn) for n in range(options.conversations)]
    for talk in talks:
        talk.start()
    for talk in talks:
        talk.join()
    ends.append(time.monotonic())
    for error in [error for talk in talks for error in talk.wrong][:10]:
        print("wrong:", error)
    if any(talk.wrong for talk in talks):
        return 1
    report("first", [talk.turns[0] for talk in talks], ends[1] - ends[0])
    if options.turns > 1:
        report("later", [turn for talk in talks for turn in talk.turns[1:]], ends[-1] - ends[1])
    report("all", [turn for talk in talks for turn in talk.turns], ends[-1] - ends[0])
    return 0


if __name__ == "__main__":
    sys.exit(main())
