"""Progress bars of libraries as stages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from huggingface_hub import snapshot_download
from tqdm import tqdm
from tqdm.auto import tqdm as automatic

from s2w.actors import bars, stages

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {"config.json": b"{}", "model-00001-of-00002.safetensors": b"a" * 3_000_000, "model.bin": b"b"}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What the bars tell."""
    told: list[tuple[str, str]] = []
    monkeypatch.setattr(stages, "enter", lambda name, detail="": told.append((name, detail)))
    bars.report()
    return told


@pytest.mark.parametrize("kind", [tqdm, automatic])
def test_bars_of_libraries_tell_their_stage(
    kind: type[tqdm], seen: list[tuple[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(kind(["a", "b"], desc="Loading safetensors checkpoint shards")) == ["a", "b"]
    assert list(kind(iter("c"), total=7, desc="Capturing CUDA graphs (decode, FULL)")) == ["c"]
    assert list(kind({"w": 1}.items(), desc="Loading weights")) == [("w", 1)]
    # Other bars stay what they are, and so do those that are switched off, as on ranks other than the first.
    assert list(kind("x", desc="Counting")) + list(kind("y")) == ["x", "y"]
    assert list(kind("z", desc="Loading weights", disable=True)) == ["z"]
    assert seen == [
        ("loading weights", "shard 1 of 2"),
        ("loading weights", "shard 2 of 2"),
        ("capturing CUDA graphs", "1 of 7"),
        ("loading weights", "tensor 1 of 1"),
    ]
    assert "Loading safetensors checkpoint shards: 100%" in capsys.readouterr().err


class Hub(BaseHTTPRequestHandler):
    """The hub, with one model."""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/"):
            kind = path.removeprefix("/api/models/tiny/model/").partition("/")[0]
            tree = [{"type": "file", "path": name, "size": len(data), "oid": name} for name, data in FILES.items()]
            answer = {"revision": {"id": "tiny/model", "sha": COMMIT, "siblings": []}, "tree": tree}[kind]
            self._send(json.dumps(answer).encode(), "application/json")
        else:
            self._send(FILES[path.rpartition("/")[2]], "application/octet-stream")

    do_HEAD = do_GET

    def _send(self, data: bytes, kind: str) -> None:
        self.send_response(200)
        name = self.path.rpartition("/")[2]
        headers = {"Content-Length": len(data), "Content-Type": kind, "ETag": f'"{name}"', "X-Repo-Commit": COMMIT}
        for header, value in headers.items():
            self.send_header(header, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_download_tells_files_and_bytes(
    hub: str, tmp_path: Path, seen: list[tuple[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    path = snapshot_download(
        "tiny/model",
        endpoint=hub,
        cache_dir=tmp_path,
        allow_patterns=["*.json", "*.safetensors"],
        tqdm_class=bars.downloads("tiny/model"),
    )
    assert sorted(file.name for file in Path(path).iterdir()) == sorted(FILES)[:2]
    assert {name for name, _ in seen} == {"downloading tiny/model"}
    details = [detail for _, detail in seen]
    assert "0 of 2 files, 3 of 3 MB" in details or "1 of 2 files, 3 of 3 MB" in details
    assert details[-1] == "2 of 2 files, 3 of 3 MB"
    assert capsys.readouterr().err == ""
