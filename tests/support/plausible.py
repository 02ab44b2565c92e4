"""Cells as a sweep leaves them, written without training, for tests of what reads them."""

import csv
import json
import random
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

METHODS = ("FULL", "USPLIT", "UDEC", "ULATDEC", "LOCAL", "CENTRAL")
CLIENT_LEVEL = {"UDEC", "ULATDEC", "LOCAL"}
SECONDS = 2.5  # of a client's round
PER_ROUND = {"FULL": 2000, "USPLIT": 1500, "UDEC": 500, "ULATDEC": 1100, "LOCAL": 0, "CENTRAL": 0}


def write_cell(
    sweep: Path,
    method: str = "FULL",
    clients: int = 5,
    *,
    data: str = "digits",
    partition: str = "iid",
    seed: int = 1,
    rounds: int = 4,
    extractor: str | None = "classifier",
    status: str = "completed",
    error: str | None = None,
    picture: bool = True,
    extractor_sha256: str = "aa",
    sections: dict[str, Any] | None = None,
) -> Path:
    """Writes the files of a cell, numbers by chance; returns its folder. `sections`: of its configuration."""
    settings: dict[str, Any] = {
        "name": sweep.name,
        "seed": seed,
        "clients": clients,
        "rounds": rounds,
        "epochs": 2,
        "method": {"name": method} | ({"pool": True} if method == "CENTRAL" else {}),
        "data": {"name": data, "limit": None},
        "partition": {"name": partition, "seed": 7},
        "model": {"name": "tiny"},
        "optimizer": {"lr": 0.001},
        "evaluation": {"extractor": extractor, "steps": 50},
    }
    for key, value in (sections or {}).items():
        settings[key] = settings.get(key, {}) | value if isinstance(value, dict) else value
    chance = random.Random(json.dumps(settings))
    suffix = f"{chance.getrandbits(32):08x}"
    folder = sweep / f"{method}-K{clients}-{data}-{partition}-tiny-R{rounds}-E2-s{seed}-{suffix}"
    (folder / "samples").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))

    per_client = [chance.uniform(20, 90) for _ in range(clients)] if method in CLIENT_LEVEL else None
    fid = sum(per_client) / clients if per_client else chance.uniform(15, 40)
    params = PER_ROUND.get(method, 1000) * clients
    with (folder / "rounds.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("round", "train_loss", "params_cumulative", "bytes_cumulative", "seconds", "fid"))
        for round_ in range(1, rounds + 1):
            scored = fid * (1 + 0.3 * (rounds - round_)) if extractor and round_ % 2 == 0 else ""
            crossed = params * round_
            table.writerow((round_, 0.4 / round_, crossed, 4 * crossed, SECONDS * clients, scored))
    with (folder / "partition.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("client", "label", "count"))
        table.writerows((c, label, chance.randrange(50)) for c in range(clients) for label in range(10))
    if picture:
        for name in (f"round_{rounds:03d}.png", "real.png"):
            noise = Image.frombytes("L", (64, 16), chance.randbytes(64 * 16))
            noise.resize((1440, 360), Image.Resampling.NEAREST).save(folder / "samples" / name)

    score = {
        "extractor": extractor,
        "scope": "clients" if per_client else "global",
        "value": fid,
        "std": chance.uniform(1, 9) if per_client else None,
        "per_client": per_client,
        "clients": list(range(clients)) if per_client else None,
        "extractor_accuracy": 0.9812,
        "extractor_sha256": extractor_sha256,
        "samples": 1000,
        "sampler": "ddim",
        "steps": 50,
        "reference": "test",
        "kid": fid / 1000,
        "precision": chance.random(),
        "recall": chance.random(),
        "inception_score": 4.98,
        "coverage": {"share": 1.0, "entropy": 2.21},
        "own": {"value": fid, "per_client": per_client} if per_client else None,
    }
    result = {
        "schema": 1,
        "status": status,
        "cell": folder.name,
        **{key: settings[key] for key in ("name", "clients", "rounds", "epochs", "seed")},
        **{key: settings[key]["name"] for key in ("method", "data", "partition", "model")},
        "exchange": {
            "params_total": params * rounds,
            "bytes_total": 4 * params * rounds,
            "reduction": 1 - PER_ROUND.get(method, 1000) / 2000,
        },
        "train_loss": 0.4 / max(rounds, 1) if status == "completed" else None,
        "fid": score if extractor and status == "completed" else None,
        "seconds": {"total": chance.uniform(10, 9000)},
        "versions": {"fedlight": "0.1.0", "torch": "2.5.0"},
        "error": error,
    }
    (folder / "result.json").write_text(json.dumps(result, indent=2))
    return folder


def write_grid(sweep: Path, **axes: Any) -> Iterator[Path]:
    """Writes the cells of a grid; each axis is a list of values for an argument of `write_cell`."""
    for values in product(*axes.values()):
        yield write_cell(sweep, **dict(zip(axes, values, strict=True)))


def read_result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())
