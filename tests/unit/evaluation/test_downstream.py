"""Downstream accuracy with generators that are known: the real images themselves, noise, one class."""

from collections.abc import Callable
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
import torch
from conftest import Cell

from fedlight.data import digits
from fedlight.data.dataset import Dataset
from fedlight.data.partition import assign
from fedlight.evaluation import downstream
from fedlight.evaluation.downstream import Downstream
from fedlight.experiment.finished import open_cell
from fedlight.runtime.seeds import derive_seed

IMAGES, CHANCE = 256, 0.1


@pytest.fixture
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Downstream:
    """Client 0 has three quarters of the digits, client 1 all images of the digit 3 in the rest."""
    monkeypatch.setattr(downstream, "MIN_STEPS", 40)
    complete = digits.load()
    data = Dataset(complete.train.first(IMAGES), complete.test, complete.classes)
    rest = np.arange(3 * IMAGES // 4, IMAGES)
    threes = rest[data.train.labels[rest] == 3]
    return Downstream(data, [np.arange(3 * IMAGES // 4), threes], [0, 1], str(tmp_path))


def test_a_generator_of_the_real_images_gives_the_accuracy_of_real_images_and_noise_gives_chance(
    known: Downstream,
) -> None:
    train, test = known.dataset.train, known.dataset.test
    labels = torch.from_numpy(train.labels)
    real = known.all()
    assert known.generated(train.pixels, labels) == real > 0.8
    noise = torch.randint(256, train.pixels.shape, generator=torch.Generator().manual_seed(0)).byte()
    deviation = (CHANCE * (1 - CHANCE) / len(test)) ** 0.5
    assert known.generated(noise, labels) < CHANCE + 0.1 + 3 * deviation  # a digit may look like some noise


def test_a_client_of_one_class_recognises_that_class_alone(known: Downstream) -> None:
    share = float((known.dataset.test.labels == 3).mean())
    assert known.own(1) == pytest.approx(share)
    assert known.own(None) == pytest.approx((known.own(0) + share) / 2)


def test_accuracies_on_real_images_are_cached_by_the_content_of_the_images(
    known: Downstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = known.own(1)
    monkeypatch.setattr(Downstream, "_measure", lambda *_: pytest.fail("it trains again"))
    assert known.own(1) == first
    (file,) = Path(known.cache).glob("downstream/*.json")
    monkeypatch.undo()
    file.write_text("{")  # damaged
    monkeypatch.setattr(downstream, "MIN_STEPS", 40)
    assert known.own(1) == first


@pytest.mark.slow
@pytest.mark.parametrize("method", ["UDEC", "FULL"])
def test_a_cell_compares_generated_images_with_those_of_a_client_and_with_all(
    cell: Callable[..., Cell], cache: Path, method: str
) -> None:
    options = ["clients=2", "partition=shards", "partition.classes=5", "model.conditional=true"]
    made = cell(f"method={method}", *options, "evaluation.samples=70", "evaluation.downstream=true")
    entry = made.result["fid"]["downstream_accuracy"]
    complete = digits.load()
    data = Dataset(complete.train.first(120), complete.test, complete.classes)
    config = open_cell(made.folder).config
    indices = assign(config.partition, data.train.labels, 2)
    expected = Downstream(data, indices, [0, 1], str(cache))
    images = [
        open_cell(made.folder).sample(client, 70, seed=derive_seed(2023, "sample", 2, client or 0))
        for client in ((0, 1) if method == "UDEC" else (None,))
    ]
    generated = [expected.generated(drawn, torch.arange(70) % 10) for drawn in images]
    assert entry["all"] == expected.all()
    assert entry["generated"] == pytest.approx(mean(generated))
    assert entry["own"] == pytest.approx(expected.own(None))
    assert entry["own"] < entry["all"]
    if method == "UDEC":
        assert (entry["per_client"], entry["own_per_client"]) == (
            generated,
            [expected.own(0), expected.own(1)],
        )
    else:
        assert (entry["per_client"], entry["own_per_client"]) == (None, None)
    assert made.rows("rounds.csv")[-1]["downstream_accuracy"] == repr(entry["generated"])
