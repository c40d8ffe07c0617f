#!/usr/bin/env python3
"""Drives the page of `lesskv serve` in a headless Chromium as a user would, and fails where it is not as docs/server.md says.

    tools/page_test/page_test.py --lesskv build/release/apps/lesskv/lesskv
    tools/page_test/page_test.py --lesskv ... --model SmolLM2-135M-Instruct.Q4_1.gguf --kv "h2o(5%)+less" --screenshots docs

The first form is the test, on the bundled model. The second asks one question and keeps pictures of the page, of a wide and of
a narrow window. Exit status 77: there is no Chromium here.
"""
import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from devtools import Browser, Failed
from small_png import small_png

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"wide": (1280, 800), "narrow": (390, 844)}
SKIPPED = 77
QUESTION = "Tell me of the sea."  # which the bundled model answers without an end, as it repeats itself
MOST = "50000"  # tokens of an answer that is there to be stopped, however late that is
LONG = ["--ctx", "100000", "--max-output", MOST]
KEY = "sk-4Jw0Zq7Tn2"  # no word that the model may say
ENTER, ESCAPE = ("Enter", 13), ("Escape", 27)


class Server:
    """`slowly`: without the processor's instruction sets, so that no answer of the bundled model ends before it is stopped;
    by one thread, as several would wait for each other on a busy machine."""

    def __init__(self, program, model, *more, key=None, slowly=False):
        environment = {name: value for name, value in os.environ.items() if name != "LESSKV_API_KEY"}
        if slowly:
            environment["LESSKV_ISA"] = "scalar"
            more = [*more, "-t", "1"]
        if key:
            environment["LESSKV_API_KEY"] = key
        self.process = subprocess.Popen([program, "serve", "-m", model, "--port", "0", *more], env=environment,
                                        stderr=subprocess.PIPE, text=True)
        said = ""
        for line in self.process.stderr:
            said += line
            if address := re.search(r"http://127\.0\.0\.1:\d+", line):
                self.url = address.group() + "/"
                return
        raise Failed(f"lesskv serve does not start: {said}")

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=120) as reply:
            return json.load(reply)

    def close(self):
        self.process.kill()
        self.process.wait()
        self.process.stderr.close()


def require(condition, sentence):
    if not condition:
        raise Failed(sentence)


def turns(page):
    return page.value("[...document.querySelectorAll('#log .turn')].map(turn => turn.innerText)")


def text_of(page, name):
    return page.value(f"document.getElementById('{name}').textContent")


def choose(page, policy):
    page.value(f"""(() => {{ const list = document.getElementById('policy');
        list.value = {json.dumps(policy)}; list.dispatchEvent(new Event('change', {{bubbles: true}})); }})()""")
    require(page.value("document.getElementById('policy').value") == policy, f"the page offers no policy {policy}")


def answered(page, n, seconds=240):
    """Until the conversation has n turns and the last one is whole."""
    page.wait(f"document.querySelectorAll('#log .turn').length === {n} && !document.getElementById('send').disabled && "
              "document.getElementById('status').textContent.includes('generated')", "no answer has come", seconds)


def ask(page, text, n):
    page.type("#question", text)
    page.press(*ENTER)
    answered(page, n)


def resident_columns(page):
    """Columns of the picture's first and last line that have the colour of what is resident, and the picture's width."""
    return page.value("""(() => {
        const canvas = document.getElementById('canvas'), copy = new OffscreenCanvas(canvas.width, canvas.height);
        const context = copy.getContext('2d', {willReadFrequently: true});
        context.drawImage(canvas, 0, 0);
        const colour = getComputedStyle(document.querySelector('#resident i')).backgroundColor.match(/\\d+/g).map(Number);
        const count = y => {
            const pixels = context.getImageData(0, y, canvas.width, 1).data;
            let n = 0;
            for (let i = 0; i < pixels.length; i += 4) n += colour.every((c, k) => c === pixels[i + k]);
            return n;
        };
        let last = canvas.height - 1;
        while (last > 0 && context.getImageData(0, last, 1, 1).data[3] === 0) --last;
        return [count(0), count(last), canvas.width];
    })()""")


def cache_bytes(page):
    """What the page says: bytes of the cache and of a full one, in KiB."""
    units = {"KiB": 1, "MiB": 1024}
    found = re.match(r"([\d.]+) (\w+) against ([\d.]+) (\w+) of a full f16 cache", text_of(page, "bytes"))
    require(found, "the bytes are not shown: " + text_of(page, "bytes"))
    return float(found[1]) * units[found[2]], float(found[3]) * units[found[4]]


def check_cache(page, policy, rows):
    """The picture, the counts and the meter agree, and say that each head has so many rows (None: all)."""
    found = re.match(re.escape(policy) + r": (\d+) of (\d+) tokens resident", text_of(page, "numbers"))
    require(found, f"the counts of {policy} are not shown: " + text_of(page, "numbers"))
    resident, seen = int(found[1]), int(found[2])
    require(resident == (rows or seen), f"{policy}: {resident} of {seen} tokens are said to be resident")
    require(resident_columns(page) == [resident, resident, seen],
            f"{policy}: {resident} of {seen} tokens resident are drawn as {resident_columns(page)}")
    have, full = cache_bytes(page)
    meter = page.value("document.getElementById('meter').firstElementChild.getBoundingClientRect().width / "
                       "document.getElementById('meter').clientWidth")
    require(abs(meter - min(1, have / full)) < 0.02, f"the meter shows {meter:.2f} where {have} of {full} KiB are taken")
    return have / full


def check_an_answer_streams(page, server):
    page.value("""(() => {
        window.lengths = new Set();
        new MutationObserver(() => {
            const answer = document.querySelector('#log .assistant span');
            if (answer && answer.textContent) lengths.add(answer.textContent.length);
        }).observe(document.getElementById('log'), {subtree: true, childList: true, characterData: true});
    })()""")
    page.type("#temperature", "0")
    page.type("#most", MOST)  # a busy browser shows pieces together: there are always more of them
    page.type("#question", QUESTION)
    page.click("#send")
    page.wait("lengths.size >= 5", "the answer does not grow", 240)
    require(not page.value("document.getElementById('stop').disabled"), "the answer came all at once")
    page.click("#stop")
    page.wait("document.getElementById('status').textContent === 'Stopped.'", "an answer cannot be stopped")


def check_an_answer(page, server):
    page.click("#clear")
    page.type("#most", "192")
    ask(page, QUESTION, 2)
    require(turns(page)[0].startswith("you\n" + QUESTION), f"the question is not shown: {turns(page)[0]}")
    require(re.search(r"^\d+ prompt tokens, \d+ of them .* \d+ generated", text_of(page, "status")), text_of(page, "status"))
    share = check_cache(page, "full", None)
    require(share > 0.9, f"a full cache takes {share:.2f} of a full cache's bytes")


def check_the_policy_changes(page, server):
    for policy, rows in {"window(16)": 16, "h2o(32)+less": 32}.items():
        choose(page, policy)
        page.click("#clear")
        ask(page, QUESTION, 2)
        share = check_cache(page, policy, rows)
        require(share < 0.7, f"{policy} takes {share:.2f} of a full cache's bytes")
    shown = page.value("[...document.querySelectorAll('.legend li')].filter(item => item.offsetParent).map(item => item.id)")
    require(shown == ["resident", "absorbed"], f"the legend explains {shown}")
    require(", 0 of them" in text_of(page, "status"), "another policy's cache cannot be gone on with")
    ask(page, QUESTION, 4)
    require(re.search(r"tokens, [1-9]\d* of them from a kept cache", text_of(page, "status")),
            "the next turn does not go on with the kept cache: " + text_of(page, "status"))


def running_texts(server):
    return len(server.get("slots")["running"])


def check_stopping(page, server):
    page.type("#most", MOST)
    for stop in (lambda: page.click("#stop"), lambda: page.press(*ESCAPE)):
        page.click("#clear")
        page.type("#question", QUESTION)
        page.press(*ENTER)
        page.wait("document.querySelectorAll('#log .turn').length === 2 && "
                  "document.querySelector('#log .turn:last-child span').textContent.length > 20", "no answer has begun")
        require(running_texts(server) == 1, "the server does not say that a text runs")
        stop()
        page.wait("document.getElementById('status').textContent === 'Stopped.'", "an answer cannot be stopped")
        end = time.monotonic() + 120
        while running_texts(server) > 0:
            require(time.monotonic() < end, "the server goes on with an answer that was stopped")
            time.sleep(0.05)
        said = turns(page)
        require(len(said) == 2 and len(said[-1]) > 20, "what had been said does not stay")
        require(page.value("!document.getElementById('send').disabled && document.getElementById('stop').disabled"),
                "the buttons do not come back")


def check_reloading(page, server):
    said, temperature = turns(page), page.value("document.getElementById('temperature').value")
    page.load("Page.reload")
    page.wait("document.getElementById('policy').length > 0", "the page does not come again")
    require(turns(page) == said, "the conversation is gone when the page is loaded again")
    require(page.value("document.getElementById('policy').value") == "h2o(32)+less", "the policy is forgotten")
    require(page.value("document.getElementById('temperature').value") == temperature, "the temperature is forgotten")
    require(text_of(page, "bytes") == "Nothing has been read yet", "the picture of a cache is kept without the cache")
    page.type("#most", "16")
    ask(page, "Once more.", len(said) + 2)
    check_cache(page, "h2o(32)+less", 32)
    page.click("#clear")
    require(turns(page) == [] and text_of(page, "bytes") == "Nothing has been read yet", "a new conversation is not empty")
    page.load("Page.reload")
    page.wait("document.getElementById('policy').length > 0", "the page does not come again")
    require(turns(page) == [], "a conversation that was ended is there again")


def check_what_people_write_is_text(page, server):
    page.type("#question", "<img src=x onerror=alert(1)> & <b>bold</b>")
    page.click("#send")
    answered(page, 2)
    require("<img src=x onerror=alert(1)> & <b>bold</b>" in turns(page)[0], f"a question is changed: {turns(page)[0]}")
    require(page.value("document.querySelectorAll('#log img').length") == 0, "a question becomes markup")


def check_it_fits(page, server):
    require(page.value("document.getElementById('key').offsetParent === null"), "a server without keys is shown a field for one")
    for size, (width, height) in SIZES.items():
        page.size(width, height)
        over = page.value("document.documentElement.scrollWidth - innerWidth")
        require(over <= 0, f"the {size} page is {over} pixels too wide")
        for name in ("send", "question", "meter" if size == "wide" else "status", "canvas" if size == "wide" else "log"):
            bottom = page.value(f"document.getElementById('{name}').getBoundingClientRect().bottom")
            require(0 < bottom <= height, f"{name} is not in sight on the {size} page: it ends at {bottom:.0f} of {height}")
    page.size(*SIZES["wide"])


def check_no_errors(page, server):
    """Nothing was asked of anybody but the server, and the console is empty."""
    urls = {request["request"]["url"] for request in page.seen("Network.requestWillBeSent")}
    foreign = [url for url in urls if not url.startswith((server.url, "data:"))]
    require(not foreign and len(urls) > 2, f"the page asks others than its server: {foreign}")
    said = [entry["entry"]["text"] for entry in page.seen("Log.entryAdded") if entry["entry"]["level"] in ("warning", "error")]
    said += [call["type"] + ": " + str(call["args"]) for call in page.seen("Runtime.consoleAPICalled")]
    said += [thrown["exceptionDetails"]["exception"].get("description") for thrown in page.seen("Runtime.exceptionThrown")]
    require(not said, f"the console says: {said}")


def check_a_key(page, server):
    page.wait("document.getElementById('status').textContent.includes('asks for an API key')", "no key is asked for")
    page.type("#key", "wrong")
    page.press("Tab", 9)
    page.wait("document.getElementById('status').textContent.includes('does not know this API key')", "a wrong key is not told")
    page.type("#key", KEY)
    page.press("Tab", 9)
    page.wait("document.getElementById('policy').length > 0", "the key does not open the page")
    page.type("#temperature", "0")
    ask(page, "The sea was", 2)
    check_cache(page, "window(64)", 64)
    kept = page.value("dispatchEvent(new Event('pagehide')), JSON.stringify(sessionStorage)")
    require("The sea was" in kept and KEY not in kept, "the key is kept: " + kept)


def check_a_server_that_goes(page, server):
    sentence = "The server cannot be reached. Is it still running?"
    page.type("#most", MOST)
    page.type("#question", " and then")
    page.press(*ENTER)
    page.wait("document.querySelectorAll('#log .assistant').length === 2 && "
              "document.querySelector('#log .turn:last-child span').textContent.length > 20", "no answer has begun")
    server.close()
    page.wait("document.querySelector('#log .error') !== null", "a server that goes away is not told")
    require(turns(page)[-1] == "error\n" + sentence, f"a server that goes away is told as: {turns(page)[-1]}")
    require(len(turns(page)[-2]) > 20, "what had been said does not stay")
    n = len(turns(page))
    page.type("#question", "Are you there?")
    page.click("#send")
    page.wait("document.querySelectorAll('#log .error').length === 2", "a server that is gone is not told")
    require(turns(page)[-1] == "error\n" + sentence and len(turns(page)) == n + 1, f"the turns are {turns(page)}")
    require(page.value("document.getElementById('question').value") == "Are you there?", "the question is lost")
    thrown = page.seen("Runtime.exceptionThrown")
    require(not thrown, f"the page throws: {thrown}")


def run_checks(server, browser, *checks):
    page = Browser(browser)
    try:
        page.size(*SIZES["wide"])
        page.load("Page.navigate", url=server.url)
        for check in checks:
            begin = time.monotonic()
            try:
                check(page, server)
            except Failed as failed:
                raise Failed(f"{check.__name__}: {failed}") from failed
            print(f"{check.__name__:34} {time.monotonic() - begin:5.1f} s", flush=True)
    finally:
        page.close()
        server.close()


def test(options, browser):
    chat = [*LONG, "--chat-template", "plain"]
    run_checks(Server(options.lesskv, options.model, *chat, "--allow-kv", "window(16)", "--allow-kv", "h2o(32)+less", slowly=True),
               browser, check_an_answer_streams, check_an_answer, check_the_policy_changes, check_it_fits,
               check_stopping, check_reloading, check_what_people_write_is_text, check_no_errors)
    # Without a chat format, the page continues plain text.
    run_checks(Server(options.lesskv, options.model, *LONG, "--kv", "window(64)", key=KEY, slowly=True), browser,
               check_a_key, check_a_server_that_goes)


def screenshots(page, folder, name):
    folder.mkdir(parents=True, exist_ok=True)
    for size, (width, height) in SIZES.items():
        page.size(width, height)
        time.sleep(0.3)  # the window lays itself out anew
        (folder / f"{name}-{size}.png").write_bytes(small_png(page.picture()))


def take_screenshots(options, browser):
    server = Server(options.lesskv, options.model, "--kv", options.kv, "--allow-kv", "full", "--ctx", str(options.ctx))
    page = Browser(browser)
    try:
        page.size(*SIZES["wide"])
        page.load("Page.navigate", url=server.url)
        page.wait("document.getElementById('policy').length > 0", "the policies are not shown")
        page.type("#temperature", "0")
        page.type("#most", "150")
        for i, question in enumerate(options.question):
            ask(page, question, 2 * i + 2)
        screenshots(page, options.screenshots, "page")
    finally:
        page.close()
        server.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lesskv", type=Path, default=ROOT / "build/release/apps/lesskv/lesskv")
    parser.add_argument("--model", type=Path, default=ROOT / "models/lesskv-small.gguf")
    parser.add_argument("--chromium", default="chromium")
    parser.add_argument("--screenshots", type=Path, help="folder for pictures of the page, instead of the test")
    parser.add_argument("--kv", default="h2o(5%)+less", help="of the pictures")
    parser.add_argument("--ctx", type=int, default=2048, help="of the pictures")
    parser.add_argument("--question", action="append", default=[], help="of the pictures; may be repeated")
    options = parser.parse_args()
    browser = shutil.which(options.chromium)
    if browser is None:
        print(f"page_test: SKIPPED: there is no {options.chromium}")
        return SKIPPED
    try:
        if options.screenshots:
            take_screenshots(options, browser)
        else:
            test(options, browser)
    except Failed as failed:
        print(f"page_test: {failed}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
