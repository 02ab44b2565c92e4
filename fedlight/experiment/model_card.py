"""The model card of an exported model, for the Hugging Face Hub: what `result.json` says of its cell."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from fedlight.config import CellConfig
from fedlight.reporting import numbers
from fedlight.runs.reader import CellFiles, Result
from fedlight.runtime.errors import BadInput
from fedlight.runtime.printable import plain_line

METADATA = {
    "library_name": "diffusers",
    "pipeline_tag": "unconditional-image-generation",
    "tags": ["diffusion", "federated-learning", "fedlight"],
}
NO_LICENCE = "# license: (fill in, such as apache-2.0)"  # the Hub refuses an empty value
TEMPLATE = """\
---
{metadata}{licence}
---

# {title}

A {kind} of {data} images, trained by federated learning with fedlight. It is {whose} of the cell `{cell}`.

## How to draw images

{usage}

## Training data

{data_table}

## Training

{training_table}

## Exchange

{exchange_table}

## Scores

{scores}

## Privacy

{privacy}

## Licence

Not set. Whoever publishes this model chooses one, as the rights in the training data allow.

## Made with

{versions}
"""
SCORES = {
    "value": "FID, lower is better",
    "kid": "KID, lower is better",
    "precision": "precision",
    "recall": "recall",
    "inception_score": "inception score",
    "coverage.share": "share of the classes that occur",
    "label_accuracy.all": "share of the images that match their label",
}


def write_card(out: Path, cell: Path, config: CellConfig, client: int | None, repo: str, load: str) -> None:
    """Writes `README.md` beside an exported model; a README that is there becomes its section on use.

    Args:
        out: folder of the exported model.
        cell: folder of its cell.
        config: of the cell.
        client: whose own model it is; None for the global one.
        repo: OWNER/NAME on the Hub.
        load: line of Python that loads the model from `out`.

    Raises:
        BadInput: the cell's result cannot be read.
    """
    files = CellFiles(cell)
    result = files.result
    if result is None:
        raise BadInput(f"{cell}: {files.problems.get('result.json', 'result.json is missing')}")
    readme = out / "README.md"
    usage = f"```python\n{load.replace(str(out), repo)}\n```"
    if readme.is_file():
        usage = readme.read_text(encoding="utf-8").partition("\n")[2].strip().replace('"."', f'"{repo}"')
    card = TEMPLATE.format(
        metadata=yaml.safe_dump(METADATA, sort_keys=False),
        licence=NO_LICENCE,
        title=repo.rpartition("/")[2],
        kind="class-conditional diffusion model" if config.model.conditional else "diffusion model",
        data=_code(config.data.name),
        whose="the global model" if client is None else f"the model of client {client}",
        cell=cell.name,
        usage=usage,
        data_table=_table(_describe_data(config)),
        training_table=_table(_describe_training(config, files)),
        exchange_table=_table(_describe_exchange(result)),
        scores=_describe_scores(config, result, client),
        privacy=_describe_privacy(result),
        versions=", ".join(f"{name} {_text(version)}" for name, version in result.versions.items()),
    )
    readme.write_text(card, encoding="utf-8")


def _describe_data(config: CellConfig) -> Iterable[tuple[str, Any]]:
    channels, height, width = config.data.shape
    yield "data set", config.data.name
    yield "image size", f"{width} x {height}, {channels} channels"
    yield (
        "images",
        "all of the training set" if config.data.limit is None else f"the first {config.data.limit}",
    )
    yield "clients", config.clients
    yield "partition over the clients", config.partition.name


def _describe_training(config: CellConfig, files: CellFiles) -> Iterable[tuple[str, Any]]:
    yield "method", config.method.name
    yield "model", config.model.name
    yield "algorithm", config.algorithm.name if config.algorithm else "FedAvg"
    yield "compression", config.transform.name if config.transform else "none"
    yield "rounds", f"{len(files.rounds)} of {config.rounds}"
    yield "local epochs a round", config.epochs
    yield "share of the clients in a round", f"{config.fraction:g}"
    yield "learning rate", f"{config.optimizer.lr:g}"
    yield "seed", config.seed


def _describe_exchange(result: Result) -> Iterable[tuple[str, Any]]:
    exchange = result.exchange
    yield "parameters, both ways", numbers.count(exchange.params_total)
    yield "bytes, both ways", numbers.data_volume(exchange.bytes_total)
    if exchange.reduction is not None:
        yield "parameters saved against FULL", f"{exchange.reduction:.1%}"


def _describe_scores(config: CellConfig, result: Result, client: int | None) -> str:
    """The scores of the model; those of the clients' mean where clients were evaluated."""
    fid, evaluation = result.fid, config.evaluation
    if fid is None:
        return "None: no images were scored."
    lines: list[tuple[str, Any]] = []
    if fid.clients and fid.per_client and client in fid.clients:
        lines.append(("FID of this model", f"{fid.per_client[fid.clients.index(client)]:.4g}"))
    mean = f", mean over {len(fid.clients)} clients" if fid.clients else ""
    for name, meaning in SCORES.items():
        if (value := result.quality(name)) is not None:
            lines.append((f"{meaning}{mean}", f"{value:.4g}"))
    sampler = f"{evaluation.steps} steps of {_code(evaluation.sampler)}"
    how = f"Of {evaluation.samples:,} images, drawn in {sampler}, against the {evaluation.reference} images"
    how += f", with features of {_code(fid.extractor)}"
    caution = ""
    if fid.extractor == "classifier":
        caution = "; such an FID compares with others of the same classifier alone"
    return f"{how}{caution}.\n\n{_table(lines)}"


def _describe_privacy(result: Result) -> str:
    privacy = result.privacy
    if privacy is None:
        return (
            "No differential privacy: what the model has memorised of its training images is not bounded. "
            "`fedlight audit` measures it."
        )
    unit = "client" if privacy.kind == "client" else "image"
    return _table(
        [
            ("guarantee", f"(epsilon, delta) differential privacy of one {unit}"),
            ("epsilon", f"{privacy.epsilon:.4g}"),
            ("delta", f"{privacy.delta:g}"),
            ("noise multiplier", f"{privacy.noise:.4g}"),
            ("clip", f"{privacy.clip:g}"),
        ]
    )


def _table(rows: Iterable[tuple[str, Any]]) -> str:
    lines = [f"| {_text(name)} | {_text(value)} |" for name, value in rows]
    return "\n".join(["| | |", "|---|---|", *lines])


def _text(value: Any) -> str:
    """A value in a cell of a Markdown table; it may be of an untrusted configuration."""
    line = plain_line(str(value))
    return "".join(f"\\{character}" if character in "\\`*_[]<>|#" else character for character in line)


def _code(name: str) -> str:
    return f"`{plain_line(name).replace('`', '')}`"
