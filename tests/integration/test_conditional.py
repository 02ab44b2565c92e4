"""Conditional models: labels in training, guidance in sampling, and label accuracy."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL, Cell, configured, invoke, slow
from diffusers import DDPMScheduler
from PIL import Image
from torch import Tensor, nn
from torch.optim import Adam

from fedlight import sample as sample_command
from fedlight.data import digits
from fedlight.data.client_data import ClientData
from fedlight.diffusion.ddpm import DDPM
from fedlight.diffusion.sampling import sample
from fedlight.evaluation.extractor import Extractor
from fedlight.evaluation.label_metrics import label_accuracy
from fedlight.experiment import cell as cell_module
from fedlight.experiment.finished import open_cell
from fedlight.runtime.seeds import derive_seed

MakeCell = Callable[..., Cell]
CONDITIONAL = "model.conditional=true"
MODELS = Path(__file__).parents[2] / "configs" / "model"


class Labelled(nn.Module):
    """Predicts 100 a label, and notes the labels; the last of its five stands for none."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.config = SimpleNamespace(num_class_embeds=5)
        self.seen: list[Tensor] = []

    def forward(self, x_t: Tensor, t: Tensor, class_labels: Tensor) -> SimpleNamespace:
        self.seen.append(class_labels)
        return SimpleNamespace(sample=self.weight + 100.0 * class_labels[:, None, None, None].expand_as(x_t))


def labelled_model(dropout: float) -> DDPM:
    slices = {"all": ["weight"]}
    schedule = DDPMScheduler(num_train_timesteps=1000)
    return DDPM(Labelled(), schedule, "mse", partial(Adam, lr=1e-4), slices, label_dropout=dropout)


# ---- labels in training


def test_each_image_comes_with_its_own_label() -> None:
    train = digits.load().train
    indices = np.arange(30, 60)
    data = ClientData(train.pixels, indices, 8, torch.from_numpy(train.labels))
    known = {train.pixels[i].numpy().tobytes(): train.labels[i] for i in indices}
    batches = list(data.train_dataloader())
    assert sum(len(labels) for _, labels in batches) == 30
    for pixels, labels in batches:
        assert [known[image.numpy().tobytes()] for image in pixels] == labels.tolist()
        scaled, same = data.on_after_batch_transfer((pixels, labels), 0)
        assert torch.allclose(scaled, pixels / 127.5 - 1, atol=1e-6)
        assert torch.equal(same, labels)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_labels_reach_the_network_and_a_share_of_them_is_dropped(dropout: float) -> None:
    model, labels = labelled_model(dropout), torch.arange(4).repeat(1000)
    torch.manual_seed(0)
    model.training_step((torch.zeros(4000, 1, 2, 2), labels), 0)
    (seen,) = model.unet.seen
    dropped = seen == 4
    assert dropped.double().mean().item() == pytest.approx(dropout, abs=0.03)
    assert torch.equal(seen[~dropped], labels[~dropped])
    assert labels.max() == 3  # the batch's own tensor is left as it was


@pytest.mark.parametrize("name", ["tiny", "paper", "unet2d"])
def test_the_prediction_depends_on_the_label_and_its_embedding_is_trained(name: str) -> None:
    torch.manual_seed(0)
    unet = configured(MODELS / f"{name}.yaml", 8)[0].unet
    unet = type(unet)(**{**unet.config, "num_class_embeds": 11})
    x, labels = torch.rand(2, 1, 8, 8), torch.tensor([3, 10])
    found = unet(x, 5, class_labels=labels).sample
    assert found.shape == x.shape
    assert not torch.allclose(found, unet(x, 5, class_labels=labels.flip(0)).sample)
    found.square().sum().backward()
    trained = unet.class_embedding.weight.grad.abs().sum(dim=1) > 0
    assert trained.nonzero().flatten().tolist() == [3, 10]


# ---- guidance in sampling


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_guidance_goes_beyond_the_prediction_for_the_label(guidance: float) -> None:
    """eps = eps(no label) + s * (eps(label) - eps(no label)), seen in the image that one step makes of it."""

    class Faint(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))
            self.config = SimpleNamespace(num_class_embeds=5)

        def forward(self, x_t: Tensor, t: Tensor, class_labels: Tensor) -> SimpleNamespace:
            return SimpleNamespace(sample=0.01 * class_labels[:, None, None, None].expand_as(x_t))

    class Known(Faint):
        def forward(self, x_t: Tensor, t: Tensor) -> SimpleNamespace:
            eps = 0.04 + guidance * (0.01 * torch.arange(4) - 0.04)
            return SimpleNamespace(sample=eps[:, None, None, None].expand_as(x_t))

    schedule = DDPMScheduler(num_train_timesteps=2, beta_start=0.5, beta_end=0.5)
    draw = partial(sample, schedule=schedule, shape=(4, 1, 8, 8), sampler="ddim", steps=1, seed=0)
    images = draw(Faint(), labels=torch.arange(4), guidance=guidance)
    assert (images.int() - draw(Known()).int()).abs().max() <= 1
    assert not torch.equal(images[0], images[3])


def test_each_image_of_each_batch_is_conditioned_on_its_label() -> None:
    unet, labels = Labelled(), torch.tensor([3, 1, 0, 2, 2])
    schedule = DDPMScheduler(num_train_timesteps=2)
    sample(unet, schedule, (5, 1, 4, 4), sampler="ddpm", steps=2, seed=0, labels=labels, batch_size=2)
    assert [seen.tolist() for seen in unet.seen] == [[3, 1], [3, 1], [0, 2], [0, 2], [2], [2]]


# ---- label accuracy


def test_label_accuracy_is_split_by_seen_and_unseen_classes() -> None:
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    predicted = torch.tensor([0, 0, 1, 0, 0, 0, 3, 3])  # right: both, one, none, both
    seen = np.array([[True, True, False, False], [False, False, True, True]])
    both = label_accuracy(torch.eye(4)[predicted], labels, seen)
    assert both == pytest.approx({"all": 5 / 8, "held": (3 / 4 + 2 / 4) / 2, "unseen": (2 / 4 + 3 / 4) / 2})
    first = label_accuracy(torch.eye(4)[predicted], labels, seen[:1])
    assert first == pytest.approx({"all": 5 / 8, "held": 3 / 4, "unseen": 2 / 4})
    all_seen = label_accuracy(torch.eye(4)[predicted], labels, np.ones((2, 4), bool))
    assert all_seen == pytest.approx({"all": 5 / 8, "held": 5 / 8})


@pytest.mark.slow
def test_each_column_of_the_grid_shows_one_class(cell: MakeCell) -> None:
    """30 images: three rows of ten classes; two of at most 16 for an unconditional model."""

    def size(*options: str) -> tuple[int, int]:
        made = cell(*options, "rounds=0", "evaluation.grid=30")
        return Image.open(made.folder / "samples" / "round_000.png").size

    free, conditional, clients = size(), size(CONDITIONAL), size(CONDITIONAL, "method=UDEC", "clients=3")
    assert free[0] - conditional[0] == pytest.approx(6 * 0.55 * 144, abs=2)
    assert conditional[1] - free[1] == pytest.approx(0.55 * 144, abs=2)
    assert clients == conditional  # three clients, a row each


@pytest.mark.parametrize("method", ["FULL", *slow("UDEC", "CENTRAL")])
def test_the_label_accuracy_of_a_cell_is_that_of_its_images(
    cell: MakeCell, digits_classifier: Extractor, method: str
) -> None:
    options = [CONDITIONAL, f"method={method}", "partition=shards", "partition.classes=2"]
    made = cell(*options, "evaluation.samples=80", "evaluation.guidance=2")
    accuracy, finished = made.result["fid"]["label_accuracy"], open_cell(made.folder)
    holds = {(int(r["client"]), int(r["label"])) for r in made.rows("partition.csv") if int(r["count"])}
    shares: dict[str, list[float]] = {"all": [], "held": [], "unseen": []}
    for client in range(5):
        of = client if method == "UDEC" else None
        images = finished.sample(of, 80, seed=derive_seed(2023, "sample", 2, of or 0))
        right = digits_classifier(images).logits.argmax(dim=1).numpy() == np.arange(80) % 10
        is_seen = np.array([method == "CENTRAL" or (client, label % 10) in holds for label in range(80)])
        shares["all"].append(right.mean())
        shares["held"].append(right[is_seen].mean())
        shares["unseen"] += [right[~is_seen].mean()] if method != "CENTRAL" else []
    assert accuracy["all"] == pytest.approx(np.mean(shares["all"]))
    assert accuracy["held"] == pytest.approx(np.mean(shares["held"]))
    expected = None if method == "CENTRAL" else pytest.approx(np.mean(shares["unseen"]))
    assert accuracy["unseen"] == expected


# ---- cells


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["seed=1,2"], "set evaluation.guidance=3 optimizer.decay=cosine"),  # one line for both cells
        (["optimizer.decay=cosine"], "set evaluation.guidance=3"),
        (["evaluation.guidance=3"], None),
        (["method=CENTRAL"], None),
        (["evaluation.grid=0"], None),
        (["model.conditional=false"], None),
    ],
)
def test_a_conditional_cell_without_guidance_prints_advice(
    command: Callable[..., int], capfd: pytest.CaptureFixture[str], options: list[str], line: str | None
) -> None:
    cell_module._print_once.cache_clear()
    few = [*SMALL, "-m", "rounds=0", "clients=2", "evaluation.grid=4", CONDITIONAL, *options]
    assert command(*few) == 0
    lines = [text for text in capfd.readouterr().err.splitlines() if "guidance" in text]
    assert len(lines) == (line is not None)
    assert all(text.endswith(str(line)) for text in lines)


def test_the_embedding_of_labels_travels_with_the_slice_that_is_named(cell: MakeCell) -> None:
    def slices(*more: str) -> dict[str, int]:
        return cell("rounds=0", *more).result["slices"]

    plain, default, decoder = slices(), slices(CONDITIONAL), slices(CONDITIONAL, "model.label_slice=decoder")
    table = 11 * 48  # ten digits and none, each as wide as the time embedding: four times 12
    assert default == {**plain, "encoder": plain["encoder"] + table}
    assert decoder == {**plain, "decoder": plain["decoder"] + table}


@pytest.mark.slow
def test_a_conditional_model_starts_from_the_weights_of_the_unconditional_one(cell: MakeCell) -> None:
    plain, conditional = (cell("rounds=0", *more).model for more in ([], [CONDITIONAL]))
    assert conditional.keys() - plain.keys() == {"class_embedding.weight"}
    assert all(torch.equal(conditional[name], plain[name]) for name in plain)


@pytest.mark.slow
def test_the_options_of_conditional_models_change_no_unconditional_cell(cell: MakeCell) -> None:
    off = ["model.conditional=false", "model.label_dropout=0.1", "evaluation.guidance=1.0"]
    assert cell("rounds=0", *off).folder.name == cell("rounds=0").folder.name
    assert cell("rounds=0", CONDITIONAL).folder.name != cell("rounds=0").folder.name


def draw(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str]:
    status = invoke(*map(str, arguments), main=sample_command.main)
    return status, capsys.readouterr().err


@pytest.mark.slow
def test_images_of_one_label_are_drawn_by_command(
    cell: MakeCell, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = cell(CONDITIONAL, "model=unet2d", "rounds=1", "clients=2")
    assert draw(capsys, made.folder, "--label", 3, "--images", 3, "--out", tmp_path / "out")[0] == 0
    expected = open_cell(made.folder).sample(None, 3, label=3)
    images = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "out").iterdir())]
    assert np.array_equal(np.stack(images), expected[:, 0])
    assert not torch.equal(open_cell(made.folder).sample(None, 3, label=4), expected)
    status, error = draw(capsys, made.folder, "--label", 10)
    assert (status, ": label must be 0 to 9, got 10" in error) == (2, True)
    status, error = draw(capsys, cell("rounds=0").folder, "--label", 3)
    assert (status, "the model is not conditional: leave out label" in error) == (2, True)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny", "unet2d"])
def test_images_of_a_conditional_model_match_their_labels(cell: MakeCell, model: str) -> None:
    options = [
        "method=CENTRAL",
        "data.limit=null",
        "clients=1",
        "epochs=4",
        "rounds=1",
        "evaluation.steps=10",
    ]
    made = cell(CONDITIONAL, f"model={model}", *options, "evaluation.samples=200")
    assert made.result["fid"]["label_accuracy"]["all"] > 0.4  # chance is 0.1
