"""The metrics of a model's images: those of torch-fidelity, density and coverage."""

from threading import RLock

from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric
from tqdm import tqdm

from fedlight.evaluation.density import density_coverage
from fedlight.evaluation.extractor import Features
from fedlight.evaluation.reference import Moments, Reference
from fedlight.runtime.errors import BadInput

KID_SUBSETS, KID_MAX_SUBSET = 100, 1000  # torch-fidelity's defaults
METRICS = ("kid", "precision", "recall", "density", "coverage_knn")
"""What `score` returns beside `fid`."""
LOGIT_METRICS = ("inception_score",)
"""What it also returns where the extractor has logits: classifier and inception."""
NEIGHBOURS = 3  # of precision and recall, arXiv 1904.06991

tqdm.set_lock(RLock())  # its default is a semaphore, which a killed worker would leak


def metric_names(extractor: str) -> tuple[str, ...]:
    """The metrics beside `fid` that every model has with an extractor."""
    return (*METRICS, *LOGIT_METRICS) if extractor in ("classifier", "inception") else METRICS


def check_budget(samples: int, reference: int, source: str, extractor: str, dimension: int) -> None:
    """Raises BadInput for too few samples or reference images: the covariance must have full rank.

    Args:
        samples: number of images to generate.
        reference: number of real images.
        source: of the real images, test or train.
        extractor: its name.
        dimension: number of its features.
    """
    features = f"the number of features of the {extractor} extractor"
    if samples <= dimension:
        raise BadInput(
            f"evaluation.samples must be more than {dimension}, {features}, or 0 for no scores; got {samples}"
        )
    if reference <= dimension:
        raise BadInput(
            f"evaluation.reference={source}: {reference} images are too few, it takes more than "
            f"{dimension}, {features}; choose another reference or extractor, or "
            "evaluation.samples=0 for no scores"
        )


def score(generated: Features, reference: Reference) -> dict[str, float]:
    """Scores generated images against real ones; random subsets have a fixed seed.

    Returns:
        `fid`: Fréchet distance of the features' Gaussians (arXiv 1706.08500), 0 or more, lower is better.
        `kid`: kernel distance (arXiv 1801.01401), unbiased, with mean 0 for equal distributions.
        `precision`, `recall`: share of generated images inside the manifold of the real ones, and of real
        images inside that of the generated ones (arXiv 1904.06991), in 0..1.
        `density`, `coverage_knn`: as `density_coverage` returns them (arXiv 2002.09797, 5 neighbours).
        `inception_score`: from the extractor's logits, if it has any (arXiv 1606.03498), 1..classes, higher
        is better.
    """
    real = reference.features
    subset = min(KID_MAX_SUBSET, len(generated.values) // 2, len(real.values) // 2)
    kid = kid_features_to_metric(
        generated.values.double(),
        real.values.double(),
        kid_subsets=KID_SUBSETS,
        kid_subset_size=subset,
        verbose=False,
    )
    manifolds = prc_features_to_metric(
        generated.values, real.values, prc_neighborhood=NEIGHBOURS, save_cpu_ram=True, verbose=False
    )
    metrics = {
        "fid": frechet(Moments.of(generated.values), reference.moments),
        "kid": kid[KEY_METRIC_KID_MEAN],
        "precision": manifolds[KEY_METRIC_PRECISION],
        "recall": manifolds[KEY_METRIC_RECALL],
        **density_coverage(generated.values, real.values, reference.radii),
    }
    if generated.logits is not None:
        metrics["inception_score"] = isc_features_to_metric(generated.logits)[KEY_METRIC_ISC_MEAN]
    return metrics


def frechet(generated: Moments, real: Moments) -> float:
    """FID, the Fréchet distance of two Gaussians (arXiv 1706.08500)."""
    metrics = fid_statistics_to_metric(_statistics(generated), _statistics(real), verbose=False)
    return metrics[KEY_METRIC_FID]


def _statistics(moments: Moments) -> dict[str, object]:
    return {"mu": moments.mean.numpy(), "sigma": moments.covariance.numpy()}
