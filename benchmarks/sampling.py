"""FID, lost variance and speed of every sampler and step count, against DDPM in 1000 steps.

python benchmarks/sampling.py [runs/NAME/CELL] [--samples N] [--seeds N] [--quick] [--out FILE.json]

Images are drawn from a finished cell's model and scored against its training set; without a cell, from the
default cell's untrained model, for the speed alone. The lost variance is that of normal pixels of deviation
0.25, whose score function is known exactly: the loss is due to the sampler alone.
"""

import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from common import composed, parser, show, write
from diffusers import DDPMScheduler
from torch import Tensor, nn

from fedlight.data.class_names import DIGITS
from fedlight.data.loading import load
from fedlight.diffusion.sampling import sample
from fedlight.evaluation.factory import make_extractor
from fedlight.evaluation.reference import make_reference
from fedlight.evaluation.scores import score
from fedlight.experiment.finished import DEVICE, open_cell
from fedlight.experiment.setup import make_client_model

GRID = [
    *(("ddpm", steps) for steps in (1000, 200, 100, 50, 20, 10)),
    *(("sde-dpm-solver++", steps) for steps in (5, 10, 20, 50, 200, 1000)),
    *(("ddim", steps) for steps in (10, 20, 50, 100)),
    *(("dpm-solver++", steps) for steps in (10, 20, 50)),
]
QUICK = [("ddpm", 1000), ("ddpm", 100), ("sde-dpm-solver++", 10), ("ddim", 50), ("dpm-solver++", 20)]
DEFAULT = ("sde-dpm-solver++", 10)
STD = 0.25


class Gaussian(nn.Module):
    """Predicts the expected noise in x_t for independent normal pixels of deviation STD."""

    def __init__(self, schedule: DDPMScheduler) -> None:
        super().__init__()
        self.alpha_bar = nn.Parameter(schedule.alphas_cumprod.clone())

    def forward(self, x_t: Tensor, t: Tensor) -> SimpleNamespace:
        alpha_bar = self.alpha_bar[t]
        return SimpleNamespace(sample=(1 - alpha_bar).sqrt() * x_t / (alpha_bar * STD**2 + 1 - alpha_bar))


def drawn_std(schedule: DDPMScheduler, sampler: str, steps: int) -> float:
    """The deviation of pixels that are sampled with the exact score function of normal ones."""
    pixels = sample(Gaussian(schedule), schedule, (256, 1, 16, 16), sampler=sampler, steps=steps, seed=0)
    return (pixels / 127.5 - 1).std().item()


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("cell", type=Path, nargs="?")
    arguments.add_argument("--client", type=int)
    arguments.add_argument("--samples", type=int)
    arguments.add_argument("--seeds", type=int, default=1)
    given = arguments.parse_args()
    samples = given.samples or (64 if given.quick else 2000)

    torch.set_num_threads(1)
    if given.cell:
        cell = open_cell(given.cell)
        dataset = load(cell.config.data)
        extractor = make_extractor(cell.config.evaluation, cell.config.data.name, dataset, DEVICE)
        reference = make_reference(dataset.train.pixels, extractor, cell.config.evaluation.cache)
        module, config, name = cell.module, cell.config, cell.folder.name
        module.to(DEVICE).load_state_dict(cell.state(given.client))
    else:
        _, config = composed("logger=none")
        module, name = make_client_model(config, DIGITS).module.to(DEVICE), "the untrained tiny UNet"

    rows = []
    for sampler, steps in QUICK if given.quick else GRID:
        fids, begun = [], time.perf_counter()
        for seed in range(given.seeds):
            images = sample(
                module.denoiser,
                module.schedule,
                (samples, *config.data.shape),
                sampler=sampler,
                steps=steps,
                seed=seed,
            )
            if given.cell:
                fids.append(score(extractor(images), reference)["fid"])
        seconds = (time.perf_counter() - begun) / given.seeds
        std = drawn_std(module.schedule, sampler, steps)
        row = {"sampler": sampler, "steps": steps, "std": std, "images_per_second": samples / seconds}
        if given.cell:
            row |= {"fid": float(np.mean(fids)), "fid_std": float(np.std(fids, ddof=min(1, len(fids) - 1)))}
        rows.append(row)
        print(row, flush=True)

    def against_ddpm(row: dict, key: str) -> float:
        return row[key] / rows[0][key]

    show(
        f"{name}, {samples} images x {given.seeds} seeds, {DEVICE}, one thread",
        ["sampler", "steps", "FID", "against DDPM", f"std for {STD}", "images/s", "speed against DDPM"],
        [
            [
                row["sampler"],
                str(row["steps"]),
                f"{row['fid']:.3f} ± {row['fid_std']:.3f}" if given.cell else "",
                f"{against_ddpm(row, 'fid') - 1:+.1%}" if given.cell else "",
                f"{row['std']:.3f}",
                f"{row['images_per_second']:.0f}",
                f"{against_ddpm(row, 'images_per_second'):.0f}x",
            ]
            for row in rows
        ],
    )
    default = next(row for row in rows if (row["sampler"], row["steps"]) == DEFAULT)
    ratios = {"sampling speed, default over DDPM in 1000 steps": against_ddpm(default, "images_per_second")}
    write(given.out, ratios, {"model": name, "samples": samples, "seeds": given.seeds, "rows": rows})


if __name__ == "__main__":
    main()
