"""Bundles to and from the hub, against a small server on this machine that speaks its protocol."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest
import torch

from torchfolio.bundle import BundleError, load_bundle, push_bundle, save_bundle
from torchfolio.hub import HubError
from torchfolio.models import MLP

REVISION = "a" * 40


class Hub(BaseHTTPRequestHandler):
    """Keeps repositories as files by name."""

    repositories: ClassVar[dict[str, dict[str, bytes]]] = {}

    def answer(self, body: object, code: int = 200) -> None:
        content = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            return self.listing("/".join(parts[2:4]), "tree" in parts)
        files = self.repositories.get("/".join(parts[:2]), {})
        if len(parts) != 5 or parts[2] != "resolve" or parts[4] not in files:
            return self.answer({"error": "not found"}, 404)
        content = files[parts[4]]
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", REVISION)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def listing(self, name: str, tree: bool) -> None:
        files = self.repositories.get(name)
        if files is None:
            return self.answer({"error": "Repository not found"}, 404)
        if tree:
            rows = [{"type": "file", "path": f, "size": len(c), "oid": "0" * 40} for f, c in files.items()]
            return self.answer(rows)
        siblings = [{"rfilename": f} for f in files]
        self.answer({"id": name, "modelId": name, "sha": REVISION, "private": False, "siblings": siblings})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path.endswith("/repos/create"):
            given = json.loads(body)
            name = f"{given.get('organization') or 'me'}/{given['name']}"
            self.repositories.setdefault(name, {})
            return self.answer({"url": f"http://{self.headers['Host']}/{name}", "id": name})
        name = "/".join(self.path.split("/")[3:5])
        if "/preupload/" in self.path:
            wanted = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.answer({"files": wanted})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.repositories[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        self.answer({"commitUrl": f"http://{self.headers['Host']}/{name}/commit/{REVISION}", "commitOid": REVISION})

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub")
    import huggingface_hub.constants as constants

    Hub.repositories.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    for name, value in {
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(constants, name, value)
    yield Hub.repositories
    server.shutdown()
    server.server_close()


@pytest.fixture
def net(tmp_path):
    net = MLP(4, 3)
    save_bundle(net, tmp_path / "net", example=torch.randn(2, 4))
    return net.eval()


def test_there_and_back(hub, net, tmp_path):
    (tmp_path / "net" / "history.csv").write_text("epoch\n")
    (tmp_path / "net" / "secret.txt").write_text("stays here")
    address = push_bundle(tmp_path / "net", "me/net")
    assert address.endswith("/me/net")
    assert sorted(hub["me/net"]) == ["bundle.json", "history.csv", "model.safetensors"]
    x = torch.randn(5, 4)
    torch.testing.assert_close(load_bundle("hf:me/net").model(x), net(x))


def test_a_pickle_on_the_hub_is_not_even_fetched(hub, net, tmp_path):
    push_bundle(tmp_path / "net", "me/net")
    hub["me/net"]["evil.pkl"] = b"c"
    load_bundle("hf:me/net")
    assert not list((tmp_path / "hub").rglob("evil.pkl"))


@pytest.mark.parametrize(
    ("name", "message"),
    [("hf:me/none", "no bundle to be had"), ("hf:", "expected hf:owner/name"), ("hf:a/b/c", "expected hf:owner/name"),
     ("hf:me/half", "has no model.safetensors")],
)  # fmt: skip
def test_what_is_not_there(hub, name, message):
    hub["me/half"] = {"bundle.json": b"{}"}
    with pytest.raises(HubError, match=message):
        load_bundle(name)


def test_a_broken_bundle_is_not_sent(hub, net, tmp_path):
    weights = tmp_path / "net" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(BundleError, match="not sent"):
        push_bundle(tmp_path / "net", "me/net")
    assert "me/net" not in hub
