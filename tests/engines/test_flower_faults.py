"""Two nodes and the SuperLink of a federation fail, and it ends all the same; what its server may see."""

import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import invoke
from consortium import NO_POWERS, Consortium, consortium_of_three, missing, until, update_in
from forkserver import warm_python
from PIL import Image

from fedlight import deploy

pytest.importorskip("flwr")

pytestmark = pytest.mark.slow

OWNER = 64_997  # a system user that owns what the institutions have, and nothing else
ROUNDS = 7
TIMEOUT = 100  # seconds
ASKED = ["name=faults", "logger=none", "method=UDEC", f"rounds={ROUNDS}", "epochs=1", "clients=3"]
ASKED += ["data=image_folder", "data.image_size=8", "data.channels=1", f"transport.timeout={TIMEOUT}"]
ASKED += ["evaluation.samples=0", "evaluation.grid=0"]


@dataclass(frozen=True)
class Disturbed:
    """A federation that ended in spite of it all.

    Attributes:
        homes: of the three institutions: images, memory.
        kept: `rounds.csv` when the SuperLink was killed.
    """

    consortium: Consortium
    app: Path
    homes: list[Path]
    kept: bytes

    def rounds(self) -> list[dict[str, str]]:
        return self.consortium.rows(self.app, "rounds.csv")

    def clients(self, direction: str, round_: int) -> set[int]:
        """The clients with a row of the ledger."""
        rows = self.consortium.rows(self.app, "ledger.csv")
        return {
            int(row["client"]) for row in rows if (row["direction"], row["round"]) == (direction, str(round_))
        }


def make_home(folder: Path) -> Path:
    """An institution with ten images, which its owner alone may enter."""
    (folder / "images" / "scans").mkdir(parents=True)
    for number, pixels in enumerate(np.random.default_rng().integers(0, 256, (10, 8, 8), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / "images" / "scans" / f"{number}.png")
    folder.chmod(0o700)
    if os.geteuid() == 0:
        os.chown(folder, OWNER, OWNER)
    return folder


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disturbed]:
    """Node 1 is frozen and node 2 killed; when both are back, the SuperLink is killed and started again."""
    if absent := missing():
        pytest.skip(absent)
    folder = tmp_path_factory.mktemp("faults")
    app, homes = folder / "cell" / "app", [make_home(folder / f"home{client}") for client in range(3)]
    app.parent.mkdir()
    assert invoke("init", str(app), *ASKED, main=deploy.main) == 0
    with consortium_of_three(folder / "all") as consortium:

        def start(client: int, heartbeat: int = 300) -> None:
            consortium.start_node(app, client, f"node{client}", home=homes[client], heartbeat=heartbeat)

        def reports() -> list[str]:
            return [row["reports"] for row in consortium.rows(app, "rounds.csv")]

        def let_in() -> bool:
            """As a supervisor of node 2 would: starts it again while it is refused."""
            if "node2" not in consortium.processes or consortium.processes["node2"].poll() is not None:
                start(2, heartbeat=10)
            return consortium.log("node2").count("SuperNode ID") == 2

        start(0)
        start(1, heartbeat=10)
        start(2, heartbeat=10)
        consortium.submit(app)
        until(lambda: "3" in reports(), 300)
        os.kill(consortium.process("node1"), signal.SIGSTOP)
        consortium.kill("node2")
        until(lambda: "1" in reports(), 300)
        os.kill(consortium.process("node1"), signal.SIGCONT)
        until(let_in, 120)
        until(lambda: "3" in reports()[reports().index("1") :], 300)

        consortium.kill("superlink")
        (rounds,) = consortium.runs(app).glob("*/*/rounds.csv")
        kept = rounds.read_bytes()
        consortium.start_superlink()
        consortium.submit(app)
        until(lambda: consortium.result(app)["status"] == "completed", 300)
        for client in range(3):
            consortium.end(f"node{client}")
        yield Disturbed(consortium, app, homes, kept)


def test_a_node_that_is_killed_and_one_that_is_frozen_drop_out_and_come_back(disturbed: Disturbed) -> None:
    up = [disturbed.clients("up", round_) for round_ in range(1, ROUNDS + 1)]
    assert [len(clients) for clients in up] == [int(row["reports"]) for row in disturbed.rounds()]
    lost = up.index({0})
    assert {0, 1, 2} in up[:lost]
    assert {0, 1, 2} in up[lost:]
    assert disturbed.clients("down", lost + 1) == {0, 1, 2}


def test_a_killed_superlink_costs_no_round_that_was_done_and_none_is_done_twice(disturbed: Disturbed) -> None:
    (rounds,) = disturbed.consortium.runs(disturbed.app).glob("*/*/rounds.csv")
    assert 3 < disturbed.kept.count(b"\n") < ROUNDS + 1
    assert rounds.read_bytes().startswith(disturbed.kept)
    assert [int(row["round"]) for row in disturbed.rounds()] == [*range(1, ROUNDS + 1)]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files to another user")
def test_the_server_may_not_read_what_an_institution_has(disturbed: Disturbed) -> None:
    superlink = disturbed.consortium.process("superlink")
    assert "CapEff:\t0000000000000000" in Path(f"/proc/{superlink}/status").read_text()  # as NO_POWERS has it
    for home in disturbed.homes:
        kept = {path.relative_to(home).parts[0] for path in home.rglob("*") if path.is_file()}
        assert {"images", "memory"} <= kept
        tried = subprocess.run([*NO_POWERS, "ls", home, home / "images"], capture_output=True, text=True)
        assert tried.returncode != 0
        assert tried.stdout == ""
        assert tried.stderr.count("Permission denied") == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has powers to give up")
def test_what_a_server_starts_has_no_powers_either() -> None:
    """The SuperLink's processes come from the fork server, which runs as root."""
    show = "print(*[line for line in open('/proc/self/status') if line.startswith('Cap')])"
    start = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {show!r}], check=True)"
    done = subprocess.run(
        [*NO_POWERS, warm_python(), "-c", start], capture_output=True, text=True, check=True
    )
    powers = dict(line.split() for line in done.stdout.splitlines() if line)
    assert {name for name, bits in powers.items() if int(bits, 16) == 0} >= {"CapEff:", "CapPrm:", "CapBnd:"}


def test_no_image_was_sent(disturbed: Disturbed) -> None:
    for client, home in enumerate(disturbed.homes):
        sent = disturbed.consortium.sent(disturbed.app, f"node{client}")
        assert any(update_in(request) for request in sent.requests())
        images = [torch.from_numpy(np.array(Image.open(path))) for path in home.rglob("*.png")]
        assert len(images) == 10
        assert not sent.holds_any(images)
