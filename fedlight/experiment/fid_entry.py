"""The `fid` entry of `result.json`: the scores of all evaluated models and their means."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from fedlight.config import CellConfig
from fedlight.evaluation.bootstrap import bootstrap_entry
from fedlight.evaluation.extractor import Extractor
from fedlight.evaluation.memorisation import Memorisation
from fedlight.evaluation.scores import LOGIT_METRICS, METRICS
from fedlight.experiment.model_evaluation import GROUPS, ModelEvaluation


def fid_entry(
    evaluations: Mapping[int | None, ModelEvaluation],
    memorisation: Memorisation | None,
    extractor: Extractor,
    config: CellConfig,
    trained: int,
    downstream_all: float | None = None,
) -> dict[str, Any]:
    """The entry; a mean is taken over the models that have the metric, and is None where none has it.

    Args:
        evaluations: client -> evaluation of its own model; None -> that of the global model.
        memorisation: the check of all models' images together.
        extractor: of the scores.
        config: of the cell.
        trained: the number of clients that have trained.
        downstream_all: accuracy of a classifier that is trained on all real images; None where none is.
    """
    metrics = [evaluation.metrics for evaluation in evaluations.values()]
    clients = [client for client in evaluations if client is not None]
    fids = [values["fid"] for values in metrics]
    means = {
        name: float(np.mean([values[name] for values in metrics if name in values]))
        for name in dict.fromkeys(name for values in metrics for name in values)
    }
    grouped: dict[str, dict[str, Any]] = {
        group: {name: means.get(f"{group}.{name}") for name in names}
        for group, names in GROUPS.items()
        if f"{group}.{names[0]}" in means
    }
    own = {"value": means.get("own_fid"), "per_client": _listed(metrics, "own_fid")}
    draws = config.evaluation.bootstrap
    errors = [values["fid_standard_error"] for values in metrics] if draws else []
    if "downstream_accuracy" in grouped:
        grouped["downstream_accuracy"] |= {
            "all": downstream_all,
            "per_client": _listed(metrics, "downstream_accuracy.generated") if clients else None,
            "own_per_client": _listed(metrics, "downstream_accuracy.own") if clients else None,
        }
    return {
        "extractor": extractor.name,
        "scope": "clients" if clients else "global",
        "value": means["fid"],
        "std": float(np.std(fids, ddof=1)) if len(fids) > 1 else None,
        "per_client": fids if clients else None,
        "clients": clients or None,
        "trained_clients": trained if clients else None,
        "extractor_accuracy": extractor.accuracy,
        "extractor_sha256": extractor.sha256,
        "samples": config.evaluation.samples,
        "sampler": config.evaluation.sampler,
        "steps": config.evaluation.steps,
        "reference": config.evaluation.reference,
        **{name: means.get(name) for name in (*METRICS, *LOGIT_METRICS)},
        **grouped,
        **({"bootstrap": bootstrap_entry(means["fid"], errors, draws)} if draws else {}),
        "own": own if clients else None,
        "memorisation": memorisation.summary() if memorisation else None,
    }


def _listed(metrics: Iterable[Mapping[str, float]], name: str) -> list[float | None]:
    """A metric of each model; None for those that lack it."""
    return [values.get(name) for values in metrics]
