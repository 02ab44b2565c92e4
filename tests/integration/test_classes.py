"""Class names: one number for each, in a simulation as the user orders them, in a deployment as agreed."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import invoke
from PIL import Image
from torch import Tensor

from fedlight import deploy
from fedlight.config import CellConfig, validate
from fedlight.data import celeba, digits
from fedlight.data.class_names import published_classes
from fedlight.data.fmnist import DEBIAN
from fedlight.data.loading import load
from fedlight.deployment.agreement import hash_agreement
from fedlight.deployment.deployable import load_agreed_config
from fedlight.deployment.institution import Institution
from fedlight.deployment.participants import set_up_institution, set_up_server
from fedlight.deployment.serving import serve
from fedlight.experiment.finished import open_cell
from fedlight.federation.messages import from_bytes
from fedlight.runs.identity import cell_id
from fedlight.runtime.errors import BadInput

GREYS = {"benign": 40, "malignant": 200, "unclear": 120}  # the grey of each image of a class
FOLDER = ["data=image_folder", "data.image_size=8", "data.channels=1", "logger=none"]
SMALL = [*FOLDER, "name=hospitals", "clients=2", "rounds=1", "epochs=1", "evaluation.samples=0"]
CLASSES = "data.classes=[benign,malignant]"


def make_images(root: Path, *classes: str, count: int = 5) -> Path:
    """A folder of images, in which the grey of an image says its class."""
    for name in classes:
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.new("L", (8, 8), GREYS[name]).save(root / name / f"{number}.png")
    return root


def greys_by_label(components: object) -> dict[int, set[int]]:
    """Label: the greys of its images."""
    train = components.dataset.train  # type: ignore[attr-defined]
    return {
        int(label): set(train.pixels[torch.from_numpy(train.labels == label)].flatten().tolist())
        for label in np.unique(train.labels)
    }


def make_app(folder: Path, *arguments: str) -> Path:
    assert invoke("init", str(folder), *SMALL, *arguments, main=deploy.main) == 0
    return folder / "federation" / "cell.yaml"


def check(path: Path, client: int, root: Path) -> int:
    whose = ["--client", str(client), "--agreed", hash_agreement(path), "--data-root", str(root)]
    return invoke("check", str(path.parents[1]), *whose, main=deploy.main)


def composed(*overrides: str) -> CellConfig:
    from hydra import compose, initialize_config_dir

    from fedlight.compose import ROOT, register_resolvers

    register_resolvers()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return validate(compose("config", overrides=[*overrides]))


def test_institutions_number_their_classes_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_app(tmp_path / "app", "data.classes=[unclear,benign,malignant]")
    roots = [
        make_images(tmp_path / "a", "benign", "malignant"),
        make_images(tmp_path / "b", "malignant", "unclear"),
    ]
    made = [
        set_up_institution(load_agreed_config(path, str(root)), client) for client, root in enumerate(roots)
    ]
    assert greys_by_label(made[0]) == {1: {40}, 2: {200}}
    assert greys_by_label(made[1]) == {0: {120}, 2: {200}}
    for components in (*made, set_up_server(load_agreed_config(path, None))):
        assert components.dataset.classes == ("unclear", "benign", "malignant")
    assert check(path, 1, roots[1]) == 0
    assert "classes        unclear 4, benign 0, malignant 4 (as agreed)" in capsys.readouterr().out


def test_a_class_that_was_not_agreed_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_app(tmp_path / "app", CLASSES)
    root = make_images(tmp_path / "b", "malignant", "unclear")
    capsys.readouterr()
    assert check(path, 1, root) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "data.classes has benign, malignant, and these images have another class: unclear;" in line
    with pytest.raises(BadInput, match="another class: unclear;"):
        Institution.make(path, hash_agreement(path), 1, str(root), tmp_path / "memory")


def test_a_conditional_deployment_needs_the_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "app"
    assert invoke("init", str(folder), *SMALL, "model.conditional=true", main=deploy.main) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "make an agreement with data.classes=[FIRST,SECOND,...]" in line
    assert not folder.exists()


def test_an_agreement_without_names_numbers_classes_by_each_institution_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_app(tmp_path / "app")
    assert check(path, 0, make_images(tmp_path / "a", "malignant", "unclear")) == 0
    assert "malignant 4, unclear 4 (of this institution; none were agreed)" in capsys.readouterr().out


def test_a_simulation_orders_class_folders_as_it_is_told(tmp_path: Path) -> None:
    root = f"data.root={make_images(tmp_path / 'a', 'benign', 'malignant')}"
    plain = composed(*SMALL, root)
    ordered = composed(*SMALL, root, "data.classes=[malignant,benign,unclear]")
    assert load(plain.data).classes == ("benign", "malignant")
    dataset = load(ordered.data)
    assert dataset.classes == ("malignant", "benign", "unclear")
    for split in (dataset.train, dataset.test):
        greys = np.array([200, 40, 120])[split.labels]
        assert (split.pixels.flatten(1) == torch.from_numpy(greys)[:, None]).all()
    assert "classes" not in plain.plain()["data"]
    assert cell_id(plain.plain()) != cell_id(ordered.plain())
    with pytest.raises(BadInput, match="another class: malignant;"):
        load(composed(*SMALL, root, "data.classes=[benign]").data)


def test_class_names_are_text() -> None:
    assert composed(*SMALL, "data.classes=[0,12,a b]").data.classes == ["0", "12", "a b"]
    for wrong in ("[a,a]", "[]", "['']", "[true]", "a"):
        with pytest.raises(BadInput, match=r"data\.classes"):
            composed(*SMALL, f"data.classes={wrong}")


def test_the_classes_of_published_sets_are_known_without_their_images() -> None:
    assert published_classes({"_target_": "fedlight.data.digits.load"}) == digits.load().classes
    four = ["A", "B", "C", "D"]
    known = published_classes({"_target_": "fedlight.data.celeba.load", "attributes": four})
    assert known == celeba.class_names(four)
    assert known is not None
    assert (len(known), known[0], known[5]) == (16, "none", "A+C")
    assert published_classes({"_target_": "fedlight.data.image_folder.load"}) is None


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="no Debian package dataset-fashion-mnist")
def test_a_server_without_fashion_mnist_may_train_a_conditional_model_of_it(tmp_path: Path) -> None:
    folder = tmp_path / "app"
    arguments = ["data=fmnist", "clients=2", "rounds=1", "evaluation.samples=0", "model.conditional=true"]
    assert invoke("init", str(folder), "logger=none", *arguments, main=deploy.main) == 0
    config = load_agreed_config(folder / "federation" / "cell.yaml", None)
    server, node = set_up_server(config), set_up_institution(config, 0)
    assert server.dataset.classes == node.dataset.classes
    assert len(server.dataset.train) == 1
    assert server.model.state_dict().keys() == node.model.state_dict().keys()


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Runs the cell of an agreement over a grid without a network; returns the cell's folder."""
    pytest.importorskip("flwr")
    from flwr.supercore.task_identity import TaskIdentity
    from grid import Grid, Node

    monkeypatch.setattr("fedlight.federation.transport.flower.POLL", 0.0)
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)

    def run(path: Path, roots: list[Path]) -> Path:
        made = [
            Institution.make(path, hash_agreement(path), client, str(root), tmp_path / f"memory{client}")
            for client, root in enumerate(roots)
        ]
        nodes = {11 + i.client: Node(i.client, i.answer, agreed=hash_agreement(path)) for i in made}
        serve(Grid(nodes), path, {"output": str(tmp_path / "runs"), "data-root": ""})
        (folder,) = (tmp_path / "runs" / "hospitals").glob("[!.]*")
        return folder

    return run


def test_a_conditional_model_is_trained_where_the_server_has_no_image(
    served: Callable[..., Path], tmp_path: Path
) -> None:
    """Each institution has one class, so that its update moves the embedding of that class and no other's."""
    conditional = [
        "model.conditional=true",
        "model.label_dropout=0.0",
        "evaluation.grid=2",
        "evaluation.steps=2",
    ]
    path = make_app(tmp_path / "app", CLASSES, "method=FULL", *conditional)
    roots = [make_images(tmp_path / "a", "malignant"), make_images(tmp_path / "b", "benign")]
    cell = open_cell(served(path, roots))
    assert cell.num_classes == 2
    name = "unet.class_embedding.weight"
    first, trained = cell.module.state_dict()[name], cell.state(None)[name]
    assert first.shape[0] == 3

    moved: list[Tensor] = []
    for client in range(2):
        (update,) = (tmp_path / f"memory{client}").glob("*/checkpoint/answers/*")
        (values,) = (
            p.tensors[name] for p in from_bytes(update.read_bytes()).payloads.values() if name in p.tensors
        )
        moved.append((values != first).any(1))
    assert moved[0].tolist() == [False, True, False], "malignant is label 1"
    assert moved[1].tolist() == [True, False, False], "benign is label 0"
    assert (trained != first).any(1).tolist() == [True, True, False]
    assert os.listdir(cell.folder / "samples")
