"""The configuration of a cell decides its parts."""

import shutil
import traceback
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from composed import config
from toy import Quiet, toy_server, toy_setup, toy_site

from fedlight.config import CellConfig
from fedlight.data import loading
from fedlight.data.class_names import DIGITS
from fedlight.data.loading import load
from fedlight.deployment.agreement import check_agreed, hash_agreement, read_agreement, write_agreement
from fedlight.deployment.terms import Terms
from fedlight.experiment import trial
from fedlight.experiment.cell import _make_folder
from fedlight.experiment.clients import make_transport
from fedlight.experiment.drawing import cycle_labels, grid_images
from fedlight.experiment.setup import make_client_model
from fedlight.experiment.trial import check
from fedlight.experiment.user_code import user_code_error
from fedlight.federation import trainer
from fedlight.federation.algorithms.scaffold import Scaffold
from fedlight.federation.factories import make_algorithm, make_codec
from fedlight.federation.messages import Scores
from fedlight.federation.trainer import max_workers
from fedlight.federation.transport.inline import Inline
from fedlight.federation.transport.processes import Processes
from fedlight.loggers import pictures
from fedlight.runs.checksums import CHECKSUMS
from fedlight.runtime.errors import BadInput, Damaged

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
    made = check(config(*SMALL, *arguments), elsewhere=False)
    assert made is not None
    setup = toy_setup()
    site, server = toy_site(setup, tmp_path), toy_server(setup)
    with ExitStack() as ending:
        transport = make_transport(made, tmp_path, site, server, Quiet(), ending)
        assert type(transport) is kind


def test_a_transport_gets_the_parts_of_its_cell(tmp_path: Path) -> None:
    made = check(config(*SMALL, "method=UDEC", "evaluation.grid=1", "trainer.workers=1"), elsewhere=False)
    assert made is not None
    setup = toy_setup()
    site, server = toy_site(setup, tmp_path), toy_server(setup)

    monitor = Quiet()
    with ExitStack() as ending:
        transport = make_transport(made, tmp_path, site, server, monitor, ending)
        assert isinstance(transport, Processes)
        context = transport._context
    assert (context.site, context.server, context.monitor) == (site, server, monitor)
    assert (context.exit_stack, context.max_workers, context.deployment) == (ending, 1, None)
    with pytest.raises(Damaged, match="carries no tensors, expected grid"):
        context.check_scores(Scores(0, 64 * "0", {}, {}))


@pytest.mark.parametrize(
    ("device", "threads", "workers", "room"),
    [("cpu", 1, None, 8), ("cpu", 3, None, 2), ("cpu", 9, None, 1), ("cpu", None, None, 1)]
    + [("cpu", 1, 5, 5), ("cuda", 1, None, 1), ("cuda", 1, 3, 3)],
)
def test_workers_fill_the_cores_and_share_no_gpu(
    device: str, threads: int | None, workers: int | None, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "CORES", 8)
    section = config().trainer.model_copy(update={"threads": threads, "workers": workers})
    assert max_workers(section, torch.device(device)) == room


def test_a_cell_for_another_machine_may_lack_data_and_devices_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "image").touch()
    image = ("data=image_folder", "data.image_size=8", "data.channels=1")
    made = config("clients=2", *image, f"data.root={tmp_path / 'images'}")
    shutil.rmtree(tmp_path / "images")
    assert check(made, elsewhere=True) is None
    with pytest.raises(BadInput, match=r"images"):
        check(made, elsewhere=False)
    gpu = check(config("clients=2", "data.limit=20", "trainer.accelerator=gpu"), elsewhere=True)
    assert gpu is not None
    assert gpu.device.type == "cpu"

    noted = replace(gpu.dataset, notes=("3 files are no images",))
    monkeypatch.setattr(trial, "load", lambda config: noted)
    for elsewhere in (False, True):
        trial._load_once.cache_clear()
        for arguments in (SMALL, (*SMALL, "rounds=1")):  # the images are loaded once
            check(config(*arguments), elsewhere)
        assert capsys.readouterr().err == ("fedlight: 3 files are no images\n" if elsewhere else "")
    trial._load_once.cache_clear()


def test_an_algorithm_must_be_a_subclass_of_fedavg() -> None:
    assert type(make_algorithm(config("algorithm=scaffold").algorithm)) is Scaffold
    other = config("algorithm=scaffold").algorithm.model_copy(update={"target": "torch.nn.Identity"})
    with pytest.raises(BadInput, match="must be a subclass of FedAvg, got Identity"):
        make_algorithm(other)


def test_a_data_loader_receives_only_configured_options(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[str, dict[str, Any]]] = []
    images = load(config().data)
    monkeypatch.setattr(
        loading, "make_extension", lambda group, node, **more: given.append((group, more)) or images
    )
    load(config().data)
    load(config("+data.range=measured", "+data.skip_unreadable=true").data)
    assert given == [("data", {}), ("data", {"range": "measured", "skip_unreadable": True})]


def test_the_seed_of_the_cell_alone_decides_the_first_weights() -> None:
    def weights(seed: int, noise: int) -> torch.Tensor:
        torch.manual_seed(noise)
        module = make_client_model(config(f"seed={seed}"), DIGITS).module
        return torch.cat([tensor.flatten() for tensor in module.state_dict().values()])

    assert weights(1, noise=2).equal(weights(1, noise=3))
    assert not weights(1, noise=2).equal(weights(2, noise=2))


def test_an_error_says_which_part_cannot_be_made() -> None:
    nowhere = {"_target_": "nowhere.Mine"}
    plain, method = config("transform=topk", "algorithm=scaffold"), toy_setup().method

    def broken(group: str, **change: Any) -> CellConfig:
        return plain.model_copy(update={group: getattr(plain, group).model_copy(update=change)})

    for group, make in {
        "data": lambda: load(broken("data", source=nowhere).data),
        "model.unet": lambda: make_client_model(broken("model", unet=nowhere), DIGITS),
        "transform": lambda: make_codec(broken("transform", up=[nowhere]).transform, method, ()),
        "algorithm": lambda: make_algorithm(broken("algorithm", target="nowhere.Mine").algorithm),
    }.items():
        with pytest.raises(BadInput, match=rf"^{group} nowhere\.Mine: "):
            make()
    deal = {"_target_": "fedlight.data.partition.iid", "skew": 1}
    with pytest.raises(BadInput, match=r"^partition: .*skew"):
        check(broken("partition", deal=deal), elsewhere=False)


def test_the_grid_has_one_row_for_each_client_or_all_images_of_the_global_model() -> None:
    many = f"evaluation.grid={pictures.COLUMNS + 5}"
    assert grid_images(config("method=FULL", many)) == pictures.COLUMNS + 5
    assert grid_images(config("method=UDEC", many)) == pictures.COLUMNS
    assert grid_images(config("method=UDEC", "evaluation.grid=3")) == 3


def test_an_error_is_blamed_on_user_code_only_where_user_code_raised_it() -> None:
    made = config("algorithm=scaffold")
    with pytest.raises(Exception) as caught:  # noqa: PT011
        Scaffold().report(None, None, None, None, 0)  # type: ignore[arg-type]
    assert "scaffold.py" in "".join(traceback.format_exception(caught.value))
    assert user_code_error(caught.value, made) is None
    own: dict[str, Any] = {"_target_": "toy.Toy"}
    with pytest.raises(Exception) as caught:  # noqa: PT011
        toy_setup(optimizer=None).module.configure_optimizers()
    model = made.model.model_copy(update={"unet": own})
    message = user_code_error(caught.value, made.model_copy(update={"model": model}))
    assert message is not None
    assert message.startswith("model.unet toy.Toy: ")


def test_images_of_a_conditional_model_have_the_classes_in_turn() -> None:
    labels = cycle_labels(config("model.conditional=true"), 8, 3)
    assert labels is not None
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert cycle_labels(config("model.conditional=false"), 8, 3) is None


def test_a_trainer_of_a_client_writes_and_prints_nothing() -> None:
    made = check(config(*SMALL, "epochs=3"), elsewhere=False)
    assert made is not None
    trainer = made.make_trainer(callbacks=[])
    assert (trainer.max_epochs, trainer.num_devices) == (3, 1)
    assert not trainer.loggers
    assert not trainer.checkpoint_callbacks
    assert trainer.progress_bar_callback is None
    assert not any("Summary" in type(callback).__name__ for callback in trainer.callbacks)


def test_an_agreement_contains_no_paths_and_each_reader_adds_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDLIGHT_CACHE", "/ours/cache")
    monkeypatch.setenv("FEDLIGHT_INCEPTION", "/ours/weights")
    path = tmp_path / "cell.yaml"

    def config(whose: str) -> dict[str, Any]:
        data = {"root": f"/{whose}/images", "cache": f"/{whose}/cache", "batch_size": 8}
        scores = {"weights": f"/{whose}/weights", "cache": f"/{whose}/cache", "samples": 100}
        scores["extractor"] = "inception"
        return {"seed": 3, "data": data, "evaluation": scores}

    write_agreement(path, config("theirs"))
    assert "theirs" not in path.read_text()
    assert read_agreement(path, "/ours/images") == config("ours")
    check_agreed(path, hash_agreement(path))
    with pytest.raises(BadInput, match="was agreed"):
        check_agreed(path, "0" * 64)


def test_a_started_folder_contains_no_earlier_result(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "cell"
    _make_folder(folder)
    assert {path.name for path in folder.iterdir()} == {"samples", "checkpoint"}
    for name in ("result.json", CHECKSUMS, "rounds.csv"):
        (folder / name).write_text("{}")
    _make_folder(folder)
    assert {path.name for path in folder.iterdir()} == {"samples", "checkpoint", "rounds.csv"}
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match=r"^output: cannot write to .*Not a directory"):
        _make_folder(tmp_path / "file" / "cell")


@pytest.mark.parametrize(("grid", "samples", "rounds"), [(0, 0, []), (1, 0, [2, 4, 5]), (0, 100, [2, 4, 5])])
def test_a_client_sends_images_only_in_the_evaluation_rounds_of_the_agreement(
    grid: int, samples: int, rounds: list[int]
) -> None:
    options = (f"evaluation.grid={grid}", f"evaluation.samples={samples}", "evaluation.every=2")
    terms = Terms.make(config("method=UDEC", "rounds=5", *options), toy_setup().method, ("own", "shared"))
    assert [round_ for round_ in range(1, 6) if terms.draws_after(round_)] == rounds
