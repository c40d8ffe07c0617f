#!/usr/bin/env python3
"""OpenAI's own Python client against lesskv serve: what it sends is taken, and what comes back is what it expects.

Exits with 77, which ctest shows as skipped, where the package openai cannot be imported; `make client-test` brings it
into an environment of its own. LESSKV_CLIENT_PYTHON names another interpreter that has it.
"""
import argparse
import os
import pathlib
import re
import subprocess
import sys

try:
    import openai
except ImportError:
    other = os.environ.get("LESSKV_CLIENT_PYTHON")
    if other and os.path.realpath(other) != os.path.realpath(sys.executable):
        os.environ.pop("LESSKV_CLIENT_PYTHON")
        os.execv(other, [other] + sys.argv)
    print("skipped: the Python package openai is not there (make client-test installs it)", file=sys.stderr)
    sys.exit(77)

ROOT = pathlib.Path(__file__).resolve().parents[2]
KEY = "secret"


class Server:
    """`slowly`: without the processor's instruction sets, so that no answer ends before it should."""

    def __init__(self, program, *options, slowly=False):
        model = ROOT / "models" / "lesskv-small.gguf"
        self.process = subprocess.Popen(
            [program, "serve", "-m", str(model), "-t", "1", "--port", "0", "--alias", "small",
             "--chat-template", "plain", *options],
            stderr=subprocess.PIPE, text=True,
            env={**os.environ, "LESSKV_API_KEY": KEY, **({"LESSKV_ISA": "scalar"} if slowly else {})})
        said = ""
        for line in self.process.stderr:
            said += line
            if found := re.search(r"at (http://127\.0\.0\.1:\d+)", line):
                self.url = found[1] + "/v1"
                return
        sys.exit(f"lesskv serve did not start: {said}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(120)

    def client(self, key=KEY):
        return openai.OpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=300)


def raises(kind, call):
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"expected {kind.__name__}")


MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The sea was"}]
CHAT = dict(model="small", messages=MESSAGES, temperature=0, max_completion_tokens=12)


def test_models(client):
    assert [model.id for model in client.models.list()] == ["small"]
    assert client.models.retrieve("small").id == "small"
    error = raises(openai.NotFoundError, lambda: client.models.retrieve("gpt-4"))
    assert error.code == "model_not_found" and error.param == "model", error


def test_chat(client):
    whole = client.chat.completions.create(**CHAT)
    text = whole.choices[0].message.content
    assert text and whole.choices[0].message.role == "assistant" and whole.choices[0].finish_reason in ("length", "stop")
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    assert whole.usage.completion_tokens <= 12
    assert whole.usage.model_extra["kv"]["spec"] == "full"
    turns = [*MESSAGES, whole.choices[0].message.model_dump(exclude_none=True), {"role": "user", "content": "And then?"}]
    later = client.chat.completions.create(**{**CHAT, "messages": turns})
    assert later.usage.prompt_tokens_details.cached_tokens >= whole.usage.prompt_tokens

    events = list(client.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True}))
    assert events[0].choices[0].delta.role == "assistant"
    assert "".join(event.choices[0].delta.content or "" for event in events if event.choices) == text
    assert [event.choices[0].finish_reason for event in events if event.choices][-1] == whole.choices[0].finish_reason
    assert events[-1].usage.completion_tokens == whole.usage.completion_tokens and not events[-1].choices
    assert all(event.usage is None for event in events[:-1])
    parts = [{"role": "user", "content": [{"type": "text", "text": "The sea was"}]}]
    assert client.chat.completions.create(**{**CHAT, "messages": parts}).choices[0].message.content


def test_logprobs(client):
    answer = client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=3)
    tokens = answer.choices[0].logprobs.content
    assert tokens and "".join(token.token for token in tokens) == answer.choices[0].message.content
    for token in tokens:
        assert token.logprob <= 0 and len(token.top_logprobs) == 3 and bytes(token.bytes).decode() == token.token
        assert token.top_logprobs[0].token == token.token  # at temperature 0
    answer = client.completions.create(model="small", prompt="The sea was", max_tokens=5, temperature=0, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert "".join(logprobs.tokens) == answer.choices[0].text and logprobs.text_offset[0] == 0


def test_several(client):
    options = {**CHAT, "n": 2, "temperature": 1.2, "seed": 7}
    answer = client.chat.completions.create(**options)
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1] and texts[0] != texts[1]
    streamed = ["", ""]
    for event in client.chat.completions.create(**options, stream=True):
        for choice in event.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts, (streamed, texts)


def test_stop(client):
    text = client.chat.completions.create(**CHAT).choices[0].message.content
    stop = text[len(text) // 2 :][:3]
    for given in (stop, [stop]):
        choice = client.chat.completions.create(**CHAT, stop=given).choices[0]
        assert choice.message.content == text[: text.index(stop)] and choice.finish_reason == "stop"


def test_completions(client):
    options = dict(model="small", prompt="The sea was", temperature=0, max_tokens=8)
    whole = client.completions.create(**options)
    assert whole.choices[0].text and whole.usage.completion_tokens <= 8
    streamed = "".join(event.choices[0].text for event in client.completions.create(**options, stream=True))
    assert streamed == whole.choices[0].text
    limited = client.completions.create(**options, extra_body={"kv_policy": "window(16)"})
    assert limited.usage.model_extra["kv"]["spec"] == "window(16)"


def test_responses(client):
    options = dict(model="small", input="The sea was", instructions="Be brief.", temperature=0, max_output_tokens=8, store=False)
    whole = client.responses.create(**options)
    assert whole.output_text and whole.status in ("completed", "incomplete") and whole.usage.output_tokens <= 8
    events = list(client.responses.create(**options, stream=True))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert events[0].type == "response.created" and events[-1].response.output_text == whole.output_text
    # What a response said goes back as it came.
    said = [{"role": "user", "content": "The sea was"}, *(item.model_dump() for item in whole.output),
            {"role": "user", "content": "And then?"}]
    assert client.responses.create(**{**options, "input": said}).output_text is not None


def test_errors(server, client):
    error = raises(openai.BadRequestError, lambda: client.chat.completions.create(**{**CHAT, "temperature": -1}))
    assert error.param == "temperature" and error.type == "invalid_request_error" and error.code is None, error.body
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
    error = raises(openai.BadRequestError, lambda: client.chat.completions.create(**CHAT, tools=[tool]))
    assert error.param == "tools" and "models call no tools here" in error.message
    assert client.chat.completions.create(**CHAT, tools=[], store=False).choices[0].message.content is not None
    long = [{"role": "user", "content": "the sea " * 600}]
    error = raises(openai.BadRequestError, lambda: client.chat.completions.create(**{**CHAT, "messages": long}))
    assert error.code == "context_length_exceeded" and error.param == "messages", error.body
    raises(openai.NotFoundError, lambda: client.chat.completions.create(**{**CHAT, "model": "gpt-4"}))
    error = raises(openai.AuthenticationError, lambda: server.client("wrong").models.list())
    assert error.code == "invalid_api_key"


# What the bundled model answers without an end, as it repeats itself.
ENDLESS = dict(model="small", messages=[{"role": "user", "content": "Tell me of the sea."}], temperature=0)


def test_busy(client):
    with client.chat.completions.create(**ENDLESS, stream=True) as stream:
        next(stream)
        error = raises(openai.RateLimitError, lambda: client.completions.create(model="small", prompt="the", max_tokens=1))
        assert error.response.headers["retry-after"] == "1" and error.code == "rate_limit_exceeded"


def test_late(client):
    error = raises(openai.InternalServerError, lambda: client.chat.completions.create(**ENDLESS))
    assert error.status_code == 504 and error.code == "timeout", error
    raises(openai.APIError, lambda: list(client.chat.completions.create(**ENDLESS, stream=True)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lesskv", required=True, help="the program")
    program = parser.parse_args().lesskv
    print(f"openai {openai.__version__}")
    with Server(program, "--ctx", "512", "--allow-kv", "window(16)") as server:
        client = server.client()
        for test in (test_models, test_chat, test_logprobs, test_several, test_stop, test_completions, test_responses):
            test(client)
            print(f"{test.__name__}: as expected")
        test_errors(server, client)
        print("test_errors: as expected")
    long = ["--ctx", "100000", "--max-output", "50000"]
    with Server(program, "--per-key", "1", *long, slowly=True) as server:
        test_busy(server.client())
        print("test_busy: as expected")
    with Server(program, "--max-seconds", "1", *long, slowly=True) as server:
        test_late(server.client())
        print("test_late: as expected")


if __name__ == "__main__":
    main()
