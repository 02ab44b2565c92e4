"""FID and speed of every sampler and step count on a finished cell, against DDPM in 1000 steps.

python benchmarks/sampling.py runs/NAME/CELL [--samples N] [--seeds N] [--out FILE.json]
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from fedlight.diffusion.sampling import sample
from fedlight.evaluation.reference import make_reference
from fedlight.evaluation.scores import score
from fedlight.finished import DEVICE, open_cell
from fedlight.parts import image_shape, load_data, make_extractor

GRID = [
    *(("ddpm", steps) for steps in (1000, 500, 250, 200, 100, 50)),
    *(("sde-dpm-solver++", steps) for steps in (10, 20, 25, 40, 50)),
    *(("ddim", steps) for steps in (10, 20, 25, 40, 50, 100)),
    *(("dpm-solver++", steps) for steps in (8, 10, 20, 25, 40, 50)),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cell", type=Path)
    parser.add_argument("--client", type=int)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    cell = open_cell(arguments.cell)
    config = OmegaConf.load(arguments.cell / "config.yaml")
    whole = load_data(config, cell.settings)
    extractor = make_extractor(cell.settings, whole, DEVICE)
    reference = make_reference(whole.train.pixels, extractor, cell.settings.evaluation.cache)
    cell.module.to(DEVICE).load_state_dict(cell.state(arguments.client))

    rows = []
    for sampler, steps in GRID:
        fids, start = [], time.perf_counter()
        for seed in range(arguments.seeds):
            images = sample(
                cell.module.denoiser,
                cell.module.schedule,
                (arguments.samples, *image_shape(cell.settings)),
                sampler=sampler,
                steps=steps,
                seed=seed,
            )
            fids.append(score(extractor(images), reference)["fid"])
        seconds = (time.perf_counter() - start) / arguments.seeds
        rows.append(
            {
                "sampler": sampler,
                "steps": steps,
                "fid": float(np.mean(fids)),
                "fid_std": float(np.std(fids, ddof=1)) if len(fids) > 1 else None,
                "fid_against_ddpm": float(np.mean(fids)) / (rows[0]["fid"] if rows else float(np.mean(fids))),
                "images_per_second": arguments.samples / seconds,
                "speed_against_ddpm": (rows[0]["seconds"] if rows else seconds) / seconds,
                "seconds": seconds,
            }
        )
        print(rows[-1], flush=True)

    title = (
        f"{cell.folder.name}, {arguments.samples} images x {arguments.seeds} seeds against the training set"
    )
    table = Table(title=title)
    for column in ("sampler", "steps", "FID", "against DDPM", "images/s", "speed against DDPM"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["sampler"],
            str(row["steps"]),
            f"{row['fid']:.3f}" + (f" ± {row['fid_std']:.3f}" if row["fid_std"] is not None else ""),
            f"{row['fid_against_ddpm'] - 1:+.1%}",
            f"{row['images_per_second']:.0f}",
            f"{row['speed_against_ddpm']:.0f}x",
        )
    Console(width=110).print(table)
    if arguments.out:
        arguments.out.write_text(json.dumps({"cell": cell.folder.name, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
