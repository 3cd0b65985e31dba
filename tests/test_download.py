"""Fetching public data by name, from a server on this machine that speaks as much of the hub's language as is needed."""

import hashlib
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from conftest import ROOT

CHUNK = 10 * 2**20  # huggingface_hub writes such pieces; what had come of the next one is lost when a connection breaks
BODY = bytes(range(256)) * (int(2.4 * CHUNK) // 256)
SHA256, COMMIT = hashlib.sha256(BODY).hexdigest(), "c0ffee" * 6 + "c0ff"


class Hub:
    """What the server has and does, and what it was asked: (method, path, Range)."""

    def __init__(self):
        self.body, self.etag, self.cut, self.down, self.asked = BODY, SHA256, None, False, []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self):
                hub.asked.append(("HEAD", self.path, None))
                if not self.path.startswith("/datasets/jingyaogong/minimind_dataset/resolve/") or not self.path.endswith("/dpo.jsonl"):
                    self.send_response(404)
                    self.send_header("X-Error-Code", "EntryNotFound")
                    return self.end_headers()
                self.send_response(302)  # as for a big file: it lies on another host, and what is known of it stands in the redirection
                for name, value in {"Location": hub.url.replace("127.0.0.1", "localhost") + "/storage/blob", "X-Repo-Commit": COMMIT, "X-Linked-ETag": f'"{hub.etag}"',
                                    "X-Linked-Size": str(len(BODY)), "Content-Length": "0"}.items():
                    self.send_header(name, value)
                self.end_headers()

            def do_GET(self):
                hub.asked.append(("GET", self.path, self.headers["Range"]))
                if self.path != "/storage/blob":
                    return self.do_HEAD()
                if hub.down:
                    self.send_response(503)
                    return self.end_headers()
                start = int(re.match(r"bytes=(\d+)-", self.headers["Range"] or "bytes=0-").group(1))
                rest = hub.body[start:]
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(rest)))
                self.send_header("Content-Disposition", 'attachment; filename="../../escaped.jsonl";')
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(hub.body) - 1}/{len(hub.body)}")
                self.end_headers()
                self.wfile.write(rest[:hub.cut])

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def ranges(self):
        return [wanted for method, path, wanted in self.asked if (method, path) == ("GET", "/storage/blob")]


@pytest.fixture
def hub():
    hub = Hub()
    threading.Thread(target=hub.server.serve_forever, daemon=True).start()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def environment(hub, offline="0"):
    return {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": offline, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1,localhost"}


def download(hub, folder, *words, offline="0"):
    """The command in a process of its own, whose environment knows the hub (and nothing of the offline switch of the other tests)."""
    return subprocess.run([sys.executable, "-m", "data_prep.download", *words, "--out", folder / "raw"], cwd=ROOT, env=environment(hub, offline),
                          capture_output=True, text=True, timeout=100)


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def one_line(result, *words):
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2 and len(errors) == 1 and "Traceback" not in result.stderr, result.stderr
    assert all(str(word) in errors[0] for word in words), errors
    return errors[0]


def test_a_file_is_fetched_checked_and_named_by_us(hub, tmp_path):
    result = download(hub, tmp_path, "dpo", "--revision", "v2")
    assert result.returncode == 0, result.stderr
    assert names(tmp_path) == ["raw/dpo.jsonl"] and (tmp_path / "raw/dpo.jsonl").read_bytes() == BODY  # and nothing at ../../escaped.jsonl
    assert f"SHA-256 {SHA256[:16]}" in result.stdout
    assert f"next: python -m data_prep.pairs --input {tmp_path / 'raw/dpo.jsonl'} " in result.stdout
    assert [path.split("/")[5] for _, path, _ in hub.asked if "/resolve/" in path] == ["v2", COMMIT, COMMIT]  # asked for v2, fetched that very commit

    again = download(hub, tmp_path, "dpo")
    assert "is there already" in again.stdout and len(hub.ranges()) == 1
    (tmp_path / "raw/dpo.jsonl").write_bytes(BODY[:-1] + b"!")
    one_line(download(hub, tmp_path, "dpo"), "SHA-256", "move it away")


def test_a_broken_download_goes_on_where_it_stopped(hub, tmp_path):
    """huggingface_hub begins ten gigabytes anew after a broken run, since 1.18: it deletes what it had. Here whole pieces are fetched once."""
    hub.cut = CHUNK + CHUNK // 2
    killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "raw", hub.url], cwd=ROOT, env=environment(hub), capture_output=True, timeout=100)
    assert killed.returncode == 9 and hub.ranges() == [None]
    part, = names(tmp_path)
    assert re.fullmatch(r"raw/dpo\.jsonl\.[0-9a-f]{12}\.part", part) and (tmp_path / part).stat().st_size == CHUNK

    hub.down = True
    one_line(download(hub, tmp_path, "dpo"), f"broken off after {CHUNK / 1e6:.1f} MB", "goes on there")
    assert names(tmp_path) == [part]

    hub.down, hub.cut, hub.asked = False, CHUNK + CHUNK // 4, []  # cut off once more, inside one run
    result = download(hub, tmp_path, "dpo")
    assert result.returncode == 0 and "goes on at" in result.stdout, result.stderr
    assert hub.ranges() == [f"bytes={CHUNK}-", f"bytes={2 * CHUNK}-"]
    assert names(tmp_path) == ["raw/dpo.jsonl"] and (tmp_path / "raw/dpo.jsonl").read_bytes() == BODY


KILLED = """
import os, sys, time
from pathlib import Path
time.sleep = lambda seconds: os._exit(9)  # the pause before http_get's second try: here the process dies
from data_prep import download
download.fetch("dpo", Path(sys.argv[1]), sys.argv[2])
"""


def test_another_version_is_not_glued_to_the_old_one(hub, tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/dpo.jsonl.0123456789ab.part").write_bytes(b"of yesterday")
    assert download(hub, tmp_path, "dpo").returncode == 0 and hub.ranges() == [None]
    assert (tmp_path / "raw/dpo.jsonl").read_bytes() == BODY


def test_wrong_bytes_are_refused_and_removed(hub, tmp_path):
    hub.body = BODY[:-1] + b"!"
    one_line(download(hub, tmp_path, "dpo"), "SHA-256", "removed", "--endpoint")
    assert names(tmp_path) == []


def test_a_hub_without_a_checksum_is_named_and_cannot_choose_a_path(hub, tmp_path):
    hub.etag = "../../../escaped"
    result = download(hub, tmp_path, "dpo")
    assert result.returncode == 0 and "no SHA-256" in result.stdout, result.stderr
    assert names(tmp_path) == ["raw/dpo.jsonl"]


def test_what_cannot_be_fetched_is_one_line_with_a_way_out(hub, tmp_path):
    way_out = ("modelscope.cn", "hf-mirror.com", tmp_path / "raw")
    one_line(download(hub, tmp_path, "pretrain_t2t_mini"), "404", "resolve/main/pretrain_t2t_mini.jsonl", *way_out)
    one_line(download(hub, tmp_path, "dpo", offline="1"), "HF_HUB_OFFLINE", *way_out)
    hub.server.shutdown()
    hub.server.server_close()
    one_line(download(hub, tmp_path, "dpo"), hub.url, *way_out)
    assert not (tmp_path / "raw").exists()


def test_names(hub, tmp_path):
    from data_prep.download import SETS
    error = one_line(download(hub, tmp_path, "pretrain_hq"), "pretrain_hq")
    listed = download(hub, tmp_path)
    assert listed.returncode == 0 and all(name in error and f"\n{name} " in "\n" + listed.stdout for name in SETS)
    one_line(download(hub, tmp_path, "dpo", "--endpoint", "hf-mirror.com"), "--endpoint hf-mirror.com")
    assert not hub.asked and not (tmp_path / "raw").exists()
