"""A model goes to a Hub that runs on this machine, with a card of its cell; without one, a line says how."""

import base64
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Cell, invoke

from fedlight import export

TOKEN = "hf_secretsecretsecretsecretsecret"


class Hub(BaseHTTPRequestHandler):
    """The calls of huggingface_hub that make a repository and a commit of small files."""

    requests: list[tuple[str, str | None, bytes]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.requests.append((self.path, self.headers["Authorization"], body))
        answer: dict[str, Any] = {"errors": [], "warnings": [], "url": "https://huggingface.co/lab/model"}
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            answer["files"] = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files
            ]
        if "/commit/" in self.path:
            answer |= {
                "success": True,
                "commitOid": "0" * 40,
                "commitUrl": f"https://huggingface.co/lab/model/commit/{'0' * 40}",
            }
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    handler = type("Recorded", (Hub,), {"requests": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield handler
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("conditional", [False, True])
def test_a_model_is_pushed_with_a_card_of_its_cell(
    cell: Callable[..., Cell], hub: type[Hub], capsys: pytest.CaptureFixture[str], conditional: bool
) -> None:
    made = cell("clients=2", "rounds=1", f"model.conditional={str(conditional).lower()}", "privacy=client")
    capsys.readouterr()
    assert invoke(str(made.folder), "--push", "lab/model", main=export.main) == 0
    printed = capsys.readouterr()
    assert "uploaded to https://huggingface.co/lab/model" in printed.out
    assert TOKEN not in printed.out + printed.err

    assert {token for path, token, _ in hub.requests if "validate" not in path} == {f"Bearer {TOKEN}"}
    create = next(body for path, _, body in hub.requests if path == "/api/repos/create")
    assert "private" in (json.loads(create).get("visibility"), *json.loads(create))
    commit = next(body for path, _, body in hub.requests if "/commit/" in path)
    lines = [json.loads(line)["value"] for line in commit.splitlines()]
    files = {line["path"]: base64.b64decode(line["content"]) for line in lines if "path" in line}
    assert files.keys() == {
        str(path.relative_to("model")) for path in Path("model").rglob("*") if path.is_file()
    }
    assert {"model_index.json", "unet/diffusion_pytorch_model.safetensors", "README.md"} <= files.keys()

    card = files["README.md"].decode()
    _, metadata, text = card.split("---\n", 2)
    assert yaml.safe_load(metadata)["library_name"] == "diffusers"
    assert "license" not in yaml.safe_load(metadata)
    assert "# license: (fill in" in metadata
    assert 'from_pretrained("lab/model", trust_remote_code=True)' in text
    assert ("class_labels=" in text) == conditional
    exchange = made.result["exchange"]["params_total"]
    for line in (
        "| method | FULL |",
        "| data set | digits |",
        "| partition over the clients | iid |",
        f"| parameters, both ways | {exchange:,} |",
        "| rounds | 1 of 1 |",
        "None: no images were scored.",
        f"| epsilon | {made.result['privacy']['epsilon']:.4g} |",
    ):
        assert line in text, line


def test_without_a_hub_the_folder_is_written_and_a_line_says_how_to_push_it(
    cell: Callable[..., Cell], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    made = cell("clients=2", "rounds=1")
    capsys.readouterr()
    assert invoke(str(made.folder), "--push", "lab/model", "--out", "out", main=export.main) == 1
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert "out is written and not uploaded" in line
    assert line.endswith("hf auth login; hf upload lab/model out")
    assert TOKEN not in printed.out + printed.err
    assert "No differential privacy" in Path("out/README.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--push", "model"], "--push: model must be OWNER/NAME"),
        (["--push", "lab/a model"], "--push: "),
        ([], "--out FOLDER is missing"),
    ],
)
def test_a_name_that_is_no_repository_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert invoke(str(tmp_path), *options, main=export.main) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
