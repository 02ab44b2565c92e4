"""The memorisation check: copies of training images are recognised, unseen images are not suspected."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Cell
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from PIL import Image

from fedlight.data import digits
from fedlight.evaluation.extractor import Extractor
from fedlight.evaluation.memorisation import CopyCheck, Memorisation
from fedlight.experiment.finished import open_cell
from fedlight.loggers import pictures
from fedlight.runtime.errors import BadInput
from fedlight.runtime.seeds import derive_seed

DIGITS = digits.load()


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values)[:, None]


def test_ratios_are_those_of_a_computation_by_hand() -> None:
    result = CopyCheck(train=column(0, 10), test=column(1, 5))(column(0, 4, 7.5))
    assert result.generated == pytest.approx([0, 4 / 1, 2.5 / 2.5])
    assert result.unseen == pytest.approx([1 / 4, 5 / 4])  # each against the other test image


def test_an_image_that_is_in_both_sets_counts_as_a_training_image() -> None:
    result = CopyCheck(train=column(0, 3), test=column(3, 9, 12))(column(3, 9))
    assert result.generated[0] == 0
    assert np.isfinite(result.generated).all()
    assert result.generated[1] > 1000  # a copy of a test image
    assert result.unseen == pytest.approx([6 / 3, 9 / 3])
    assert result.duplicates.tolist() == [1, 0, 0]


def test_duplicates_inside_a_set_are_counted_and_the_test_set_s_left_out() -> None:
    result = CopyCheck(train=column(0, 10, 10, 10), test=column(1, 5, 5, 1, 5))(column(4))
    assert result.unseen == pytest.approx([1 / 4, 5 / 4])
    assert result.duplicates.tolist() == [0, 3, 2]
    summary = result.summary()
    assert summary.pop("duplicates") == {"test_in_train": 0, "test": 3, "train": 2}
    assert summary == pytest.approx({"ratio": 4, "ratio_unseen": 0.75, "suspect": 0})


@pytest.mark.parametrize("test", [(3, 3), (0, 3), (0, 10), (3,)])
def test_fewer_than_two_unseen_test_images_are_rejected(test: tuple[float, ...]) -> None:
    with pytest.raises(
        BadInput, match=r"memorisation needs at least 2 distinct test images .* got [01]: set"
    ):
        CopyCheck(train=column(0, 10), test=column(*test))


def test_an_outlier_is_no_copy_even_with_few_training_images() -> None:
    result = CopyCheck(train=column(0), test=column(10, 11, 12, 13))(column(0.1, 1000))
    assert result.generated == pytest.approx([0.1 / 9.9, 1000 / 987])
    assert result.unseen == pytest.approx([10, 11, 12, 13])
    assert result.summary()["suspect"] == 0.5


@pytest.mark.parametrize("where", ["both", "within", "neither"])
def test_duplicates_change_neither_what_is_suspect_nor_the_numbers(
    digits_classifier: Extractor, where: str
) -> None:
    train, test = DIGITS.train.pixels[:1100], DIGITS.test.pixels
    if where == "both":
        train = torch.cat([train, test[:8]])  # 2 % of the test images
    if where == "within":
        test = torch.cat([test, test[:8].repeat(3, 1, 1, 1)])
    check = CopyCheck(digits_classifier(train).values, digits_classifier(test).values)
    copies = check(digits_classifier(train).values)
    honest = check(digits_classifier(DIGITS.train.pixels[1100:]).values)
    for result in (copies, honest):
        assert np.isfinite(result.generated).all()
        assert np.isfinite(result.unseen).all()
        json.dumps(result.summary(), allow_nan=False)
    assert copies.summary()["suspect"] == 1
    assert honest.summary()["suspect"] < 0.03
    assert len(copies.unseen) == 360 - 8 * (where == "both")
    expected = {"both": (8, 0), "within": (0, 24), "neither": (0, 0)}[where]
    duplicates = copies.summary()["duplicates"]
    assert (duplicates["test_in_train"], duplicates["test"]) == expected


def test_models_are_joined_into_one_check() -> None:
    check = CopyCheck(train=column(0, 10), test=column(1, 5))
    joined = Memorisation.joined([check(column(0)), check(column(4, 7.5))])
    assert joined.generated == pytest.approx(check(column(0, 4, 7.5)).generated)
    assert joined.unseen == pytest.approx(check(column(0)).unseen)


def test_copies_of_training_images_are_suspect_and_unseen_images_are_not(
    digits_classifier: Extractor,
) -> None:
    train, unseen = DIGITS.train.pixels[:1100], DIGITS.train.pixels[1100:]
    test = DIGITS.test.pixels
    check = CopyCheck(digits_classifier(train).values, digits_classifier(test).values)
    noise = torch.randint(-8, 9, train[:200].shape, generator=torch.Generator().manual_seed(0))
    nearly = (train[:200] + noise).clamp(0, 255).byte()
    copies, near, honest = (
        check(digits_classifier(pixels).values).summary() for pixels in (train[:200], nearly, unseen)
    )
    assert copies["ratio"] < 1e-3
    assert copies["suspect"] > 0.95
    assert near["suspect"] > 10 * honest["suspect"]
    assert honest["suspect"] < 0.03
    assert honest["ratio"] == pytest.approx(honest["ratio_unseen"], rel=0.2)


def test_a_cell_reports_memorisation_where_it_is_configured(
    cell: Callable[..., Cell], digits_classifier: Extractor
) -> None:
    made = cell("rounds=0", "evaluation.samples=65", "evaluation.memorisation=true")
    images = open_cell(made.folder).sample(None, 65, seed=derive_seed(2023, "sample", 0, 0))
    train, test, drawn = (
        digits_classifier(pixels).values.double()
        for pixels in (DIGITS.train.pixels[:120], DIGITS.test.pixels, images)
    )
    near, far = (torch.cdist(drawn, known).min(dim=1).values for known in (train, test))
    among = torch.cdist(test, test).fill_diagonal_(torch.inf).min(dim=1).values
    unseen = torch.cdist(test, train).min(dim=1).values / among
    summary = made.result["fid"]["memorisation"]
    assert summary.pop("duplicates") == {"test_in_train": 0, "test": 0, "train": 0}
    assert summary == pytest.approx(
        {
            "ratio": np.median(near / far),
            "ratio_unseen": np.median(unseen),
            "suspect": float((near / far < np.quantile(unseen, 0.01)).double().mean()),
        },
        rel=1e-4,
    )
    assert np.asarray(Image.open(made.folder / "memorisation.png")).std() > 10


def test_suspect_is_what_lies_nearer_than_99_of_100_unseen_images() -> None:
    unseen = np.arange(1, 101) / 10  # 0.1, 0.2, ... 10
    result = Memorisation(np.array([0.01, 0.05, 3, 4, 9]), unseen, np.zeros(3, np.int64)).summary()
    del result["duplicates"]
    assert result == pytest.approx({"ratio": 3, "ratio_unseen": 5.05, "suspect": 2 / 5})


def test_the_names_in_the_histogram_hide_no_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    save = pictures._save
    monkeypatch.setattr(pictures, "_save", lambda figure, path: (drawn.append(figure), save(figure, path)))
    pictures.memorisation_histogram(tmp_path / "h.png", np.linspace(0, 2, 99), np.linspace(0, 2, 99), "")
    (figure,) = drawn
    (names,) = figure.findobj(Legend)
    assert [text.get_text() for text in names.get_texts()] == ["unseen test images", "generated images"]
    assert not names.get_window_extent().overlaps(figure.axes[0].get_window_extent())
