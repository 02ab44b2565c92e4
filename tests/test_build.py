"""How the parts of a cell are chosen by its configuration."""

import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from test_secure_noise import settings
from toy import toy_server, toy_setup, toy_site

from fedlight.experiment import build
from fedlight.experiment.agreement import agreed_hash, check_agreed, read_agreement, write_agreement
from fedlight.experiment.build import check, make_algorithm, worker_room
from fedlight.experiment.evaluate import _shown, even_labels
from fedlight.experiment.extensions import blamed
from fedlight.federation.algorithms.scaffold import Scaffold
from fedlight.federation.transport.inline import Inline
from fedlight.federation.transport.processes import Processes
from fedlight.loggers import pictures
from fedlight.runtime.errors import BadInput

SMALL = ("clients=2", "data.limit=20", "trainer.accelerator=cpu")


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ([], Processes),
        (["transport=inline"], Inline),
        (["transport=processes"], Processes),
        (["rounds=0"], Inline),
        (["method=CENTRAL", "transport=processes"], Inline),
    ],
)
def test_the_transport_is_the_configured_one(arguments: list[str], kind: type, tmp_path: Path) -> None:
    made = check(settings(*SMALL, *arguments), elsewhere=False)
    assert made is not None
    setup = toy_setup()
    site, server = toy_site(setup, tmp_path), toy_server(setup)
    with ExitStack() as ending:
        transport = made.transport(tmp_path, site, server, lambda: None, lambda: None, ending)
        assert type(transport) is kind


@pytest.mark.parametrize(
    ("device", "threads", "workers", "room"),
    [("cpu", 1, None, 8), ("cpu", 3, None, 2), ("cpu", 9, None, 1), ("cpu", None, None, 1)]
    + [("cpu", 1, 5, 5), ("cuda", 1, None, 1), ("cuda", 1, 3, 3)],
)
def test_workers_fill_the_cores_and_share_no_gpu(
    device: str, threads: int | None, workers: int | None, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "CORES", 8)
    trainer = settings().trainer.model_copy(update={"threads": threads, "workers": workers})
    made = settings().model_copy(update={"trainer": trainer})
    assert worker_room(made, torch.device(device)) == room


def test_an_algorithm_is_one_of_ours_or_refused() -> None:
    assert type(make_algorithm(settings("algorithm=scaffold"))) is Scaffold
    other = settings("algorithm=scaffold").algorithm.model_copy(update={"target": "torch.nn.Identity"})
    with pytest.raises(BadInput, match="must be a subclass of FedAvg, got Identity"):
        make_algorithm(settings().model_copy(update={"algorithm": other}))


def test_a_grid_of_clients_holds_a_row_a_client_and_that_of_the_server_all_images() -> None:
    many = f"evaluation.grid={pictures.COLUMNS + 5}"
    assert _shown(settings("method=FULL", many)) == pictures.COLUMNS + 5
    assert _shown(settings("method=UDEC", many)) == pictures.COLUMNS
    assert _shown(settings("method=UDEC", "evaluation.grid=3")) == 3


def test_an_error_in_our_own_code_is_no_fault_of_the_users() -> None:
    made = settings("algorithm=scaffold")
    with pytest.raises(Exception) as caught:  # noqa: PT011
        Scaffold().report(None, None, None, None, 0)  # type: ignore[arg-type]
    assert "scaffold.py" in "".join(traceback.format_exception(caught.value))
    assert blamed(caught.value, made) is None
    own: dict[str, Any] = {"_target_": "toy.Toy"}
    with pytest.raises(Exception) as caught:  # noqa: PT011
        toy_setup(optimizer=None).module.configure_optimizers()
    model = made.model.model_copy(update={"unet": own})
    message = blamed(caught.value, made.model_copy(update={"model": model}))
    assert message is not None
    assert message.startswith("model.unet toy.Toy: ")


def test_a_conditional_model_is_asked_for_each_class_in_turn() -> None:
    labels = even_labels(settings("model.conditional=true"), 8, 3)
    assert labels is not None
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert even_labels(settings("model.conditional=false"), 8, 3) is None


def test_a_trainer_of_a_client_writes_and_prints_nothing() -> None:
    made = check(settings(*SMALL, "epochs=3"), elsewhere=False)
    assert made is not None
    trainer = made.make_trainer(callbacks=[])
    assert (trainer.max_epochs, trainer.num_devices) == (3, 1)
    assert not trainer.loggers
    assert not trainer.checkpoint_callbacks
    assert trainer.progress_bar_callback is None
    assert not any("Summary" in type(callback).__name__ for callback in trainer.callbacks)


def test_an_agreement_holds_no_path_and_each_reader_has_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDLIGHT_CACHE", "/ours/cache")
    monkeypatch.setenv("FEDLIGHT_INCEPTION", "/ours/weights")
    path = tmp_path / "cell.yaml"

    def config(whose: str) -> dict[str, Any]:
        data = {"root": f"/{whose}/images", "cache": f"/{whose}/cache", "batch_size": 8}
        scores = {"weights": f"/{whose}/weights", "cache": f"/{whose}/cache", "samples": 100}
        return {"seed": 3, "data": data, "evaluation": scores}

    write_agreement(path, config("theirs"))
    assert "theirs" not in path.read_text()
    assert read_agreement(path, "/ours/images") == config("ours")
    check_agreed(path, agreed_hash(path))
    with pytest.raises(BadInput, match="was agreed"):
        check_agreed(path, "0" * 64)
