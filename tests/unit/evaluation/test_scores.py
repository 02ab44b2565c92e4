"""Scores: known answers on digits, an independent computation, and torch-fidelity called directly."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from frechet import frechet
from torch import Tensor
from torch.nn import functional

from fedlight.data import digits
from fedlight.evaluation import classifier, reference
from fedlight.evaluation.extractor import Extractor, Features
from fedlight.evaluation.reference import Moments, Reference, make_reference
from fedlight.evaluation.scores import score

TRAIN, TEST = digits.load().train, digits.load().test  # disjoint
LABELS = torch.from_numpy(TRAIN.labels)


@pytest.fixture(scope="module")
def real(digits_classifier: Extractor, cache: Path) -> Reference:
    return make_reference(TEST.pixels, digits_classifier, str(cache))


@pytest.fixture
def scored(digits_classifier: Extractor, real: Reference) -> Callable[[Tensor], dict[str, float]]:
    """The scores of images against the test set."""
    return lambda pixels: score(digits_classifier(pixels), real)


def noisy(strength: int) -> Tensor:
    noise = torch.randn(TRAIN.pixels.shape, generator=torch.Generator().manual_seed(0))
    return (TRAIN.pixels + strength * noise).round().clamp(0, 255).byte()


def blurred(strength: float) -> Tensor:
    """By a Gaussian whose standard deviation is `strength` pixels."""
    at = torch.arange(-4, 5)
    weights = torch.exp(-(at**2) / (2 * strength**2))
    weights = torch.outer(weights, weights) / weights.sum() ** 2
    return functional.conv2d(TRAIN.pixels.float(), weights[None, None], padding=4).round().byte()


def without_classes(strength: int) -> Tensor:
    """Without the first `strength` of the ten digits."""
    return TRAIN.pixels[strength <= LABELS]


# ---- FID


def test_a_set_is_at_distance_0_from_itself(scored: Callable[[Tensor], dict[str, float]]) -> None:
    same = scored(TEST.pixels)
    assert abs(same["fid"]) < 1e-3
    assert (same["precision"], same["recall"]) == (1, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damaged", "strengths"),
    [
        (noisy, [8, 16, 32, 64, 128, 256]),
        (blurred, [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1]),
        (without_classes, [1, 2, 3, 4, 5, 6, 7, 8]),
    ],
)
def test_fid_grows_with_the_damage_from_a_small_distance_between_unseen_and_training_images(
    scored: Callable[[Tensor], dict[str, float]],
    damaged: Callable[[float], Tensor],
    strengths: list[float],
) -> None:
    fids = [scored(TRAIN.pixels)["fid"], *(scored(damaged(strength))["fid"] for strength in strengths)]
    assert fids[0] < 0.3
    assert fids == sorted(set(fids))
    assert fids[-1] > 30 * fids[0]


@pytest.mark.parametrize("pixels", [TRAIN.pixels, noisy(32), blurred(0.6), without_classes(3)[:100]])
def test_fid_is_the_frechet_distance_of_two_gaussians(
    digits_classifier: Extractor, scored: Callable[[Tensor], dict[str, float]], pixels: Tensor
) -> None:
    expected = frechet(digits_classifier(pixels).values, digits_classifier(TEST.pixels).values)
    assert scored(pixels)["fid"] == pytest.approx(expected, rel=1e-6)


def test_fid_of_gaussians_known_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    white = torch.linalg.qr(torch.randn(200, 4, generator=generator).double()).Q
    white = white - white.mean(dim=0)
    spread = (white @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(white.T))).T).float()

    def seen(values: Tensor) -> Features:
        return Features(values, torch.zeros(len(values), 2))

    real = Reference(seen(spread), Moments.of(spread))  # mean 0, covariance 1
    moved = score(seen(3 * spread + torch.tensor([1.0, 2, 0, 0])), real)["fid"]
    assert moved == pytest.approx(1 + 4 + 4 * (3 - 1) ** 2, rel=1e-5)


# ---- its kin


def test_the_scores_are_torch_fidelity_s_own(
    digits_classifier: Extractor, cache: Path, scored: Callable[[Tensor], dict[str, float]]
) -> None:
    class Pixels(torch.utils.data.Dataset):
        def __init__(self, pixels: Tensor) -> None:
            self.pixels = pixels

        def __len__(self) -> int:
            return len(self.pixels)

        def __getitem__(self, position: int) -> Tensor:
            return self.pixels[position]

    (weights,) = cache.glob("classifier/digits-*.safetensors")
    pixels = noisy(48)[:300]
    theirs = torch_fidelity.calculate_metrics(
        input1=Pixels(pixels),
        input2=Pixels(TEST.pixels),
        feature_extractor=classifier.NAME,
        feature_extractor_weights_path=weights,
        fid=True,
        kid=True,
        prc=True,
        isc=True,
        kid_subset_size=150,  # half of the smaller set
        batch_size=128,
        save_cpu_ram=True,
        cuda=False,
        cache=False,
        verbose=False,
    )
    ours = scored(pixels)
    assert ours["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)  # theirs in float32
    assert ours["kid"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3)
    assert (ours["precision"], ours["recall"]) == (theirs["precision"], theirs["recall"])
    assert ours["inception_score"] == pytest.approx(theirs["inception_score_mean"])
    assert ours["kid"] > 0.01
    assert 0.1 < ours["precision"] < 0.9


def test_strange_images_cost_precision_and_missing_classes_recall(
    scored: Callable[[Tensor], dict[str, float]],
) -> None:
    good, strange, few = (scored(pixels) for pixels in (TRAIN.pixels, noisy(128), without_classes(7)))
    assert strange["precision"] < 0.7 * good["precision"]
    assert strange["recall"] > 0.9 * good["recall"]
    assert few["precision"] > 0.9 * good["precision"]
    assert few["recall"] < 0.4 * good["recall"]


def test_the_inception_score_counts_the_classes_in_sight(
    scored: Callable[[Tensor], dict[str, float]],
) -> None:
    for classes in (1, 2, 5):
        seen = scored(TRAIN.pixels[classes > LABELS])["inception_score"]
        assert seen == pytest.approx(classes, rel=0.1)


def test_scores_repeat_to_the_last_digit_and_draw_from_no_global_generator(
    scored: Callable[[Tensor], dict[str, float]],
) -> None:
    first = scored(noisy(32))
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002
    before = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    assert scored(noisy(32)) == first
    assert np.array_equal(np.random.get_state()[1], before[0])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[1])


# ---- references


def test_a_reference_is_extracted_once_and_kept_by_its_images(
    digits_classifier: Extractor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_reference(TEST.pixels, digits_classifier, str(tmp_path))
    other = make_reference(TEST.pixels.flip(0), digits_classifier, str(tmp_path))
    assert not torch.equal(first.features.values, other.features.values)
    monkeypatch.setattr(reference, "save_file", None)  # nothing can be written any more
    again = make_reference(TEST.pixels, digits_classifier, str(tmp_path))
    assert torch.equal(again.features.values, first.features.values)
    assert torch.equal(again.moments.covariance, first.moments.covariance)


def test_the_moments_of_a_reference_are_numpy_s(digits_classifier: Extractor, real: Reference) -> None:
    values = digits_classifier(TEST.pixels).values.double().numpy()
    assert np.allclose(real.moments.mean, values.mean(axis=0), rtol=1e-12)
    assert np.allclose(real.moments.covariance, np.cov(values, rowvar=False), rtol=1e-9, atol=1e-12)
