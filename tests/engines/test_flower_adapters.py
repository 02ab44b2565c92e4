"""Adapters between institutions: over Flower's grid they have the bits and the ledger of one process."""

from collections.abc import Callable
from pathlib import Path

import pytest
from composed import config
from conftest import SMALL, Cell
from pretrained import save_pretrained, tiny_unet

from fedlight.deployment.agreement import hash_agreement, write_agreement
from fedlight.experiment.cell import run_cell
from fedlight.federation.messages import Update, from_bytes
from fedlight.runs.identity import cell_folder
from fedlight.runtime.lease import acquire_lease

pytest.importorskip("flwr")

from flwr.supercore.task_identity import TaskIdentity
from grid import Grid, Node

from fedlight.deployment.deployable import load_agreed_config
from fedlight.deployment.institution import Institution
from fedlight.deployment.participants import set_up_server
from fedlight.federation.transport.transport import Deployment

LORA = [*SMALL, "clients=2", "finetuning=lora", "finetuning.targets=[attention,convolutions]", "method=UDEC"]


@pytest.mark.parametrize(
    "chosen",
    [
        ["finetuning.rank=[1,3]", "algorithm=scaffold"],
        pytest.param(["finetuning.rank=[2,1]", "transform=best"], marks=pytest.mark.slow),
        pytest.param(["finetuning.train=b", "transform=int4_huffman"], marks=pytest.mark.slow),
    ],
)
def test_institutions_train_adapters_to_the_bits_of_one_process(
    cell: Callable[..., Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: list[str]
) -> None:
    monkeypatch.setenv("FEDLIGHT_PRETRAINED", str(save_pretrained(tmp_path / "pretrained")))
    alone = cell(*LORA[len(SMALL) :], *chosen, "transport=inline")

    path = tmp_path / "cell.yaml"
    write_agreement(path, config(*LORA, *chosen, "transport=flower", "name=agreed").plain())
    agreed = hash_agreement(path)
    monkeypatch.setattr("fedlight.federation.transport.flower.POLL", 0.0)
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    nodes = {}
    for client in range(2):
        institution = Institution.make(path, agreed, client, None, tmp_path / f"memory{client}")
        nodes[11 + client] = Node(client, institution.answer, agreed=agreed)
    served = load_agreed_config(path, None).model_copy(update={"output": str(tmp_path / "served")})
    folder = cell_folder(served)
    with acquire_lease(folder) as lease:
        run_cell(served, lease, set_up_server, Deployment(Grid(nodes), agreed))

    over = Cell(folder)
    for key in ("state_sha256", "client_sha256", "exchange"):
        assert over.result[key] == alone.result[key]
    assert over.rows("ledger.csv") == alone.rows("ledger.csv")
    frozen = [t.contiguous().numpy().tobytes() for t in tiny_unet().state_dict().values() if t.numel() > 8]
    kept = [p.read_bytes() for p in tmp_path.glob("memory*/**/*") if p.is_file()]
    assert any(len(content) > 1000 for content in kept)
    assert not any(tensor in content for tensor in frozen for content in kept)
    left = [from_bytes(p.read_bytes()) for p in tmp_path.glob("memory*/*/*/answers/*")]
    updates = [message for message in left if isinstance(message, Update)]
    names = {name for update in updates for payload in update.payloads.values() for name in payload.tensors}
    assert names
    assert all(".lora_" in name or "delta" in name for name in names)
