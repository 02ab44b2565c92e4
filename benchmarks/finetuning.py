"""Seconds and peak memory of a training step: of all weights or of adapters, of images or of their latents.

python benchmarks/finetuning.py [--quick] [--out FILE.json]

The same UNet (diffusers' UNet2DModel, 32 and 64 channels) denoises images of 32 x 32, or latents of 8 x 8
that an autoencoder makes of them. Each peak is that of a process of its own, which takes two steps, above
what it had before the first. Times are measured in turns.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import composed, in_turns, parser, show, write
from diffusers import AutoencoderKL, DDIMScheduler, DDPMPipeline, LDMPipeline, UNet2DModel

from fedlight.data.client_data import ClientData
from fedlight.data.dataset import Dataset, Images
from fedlight.experiment.parts import CellParts
from fedlight.experiment.setup import assemble
from fedlight.runtime.peak_memory import PeakMemory

SIZE, BATCH = 32, 8
PEAK = "--peak"
VARIANTS = {
    "images, all weights": ("images", "full"),
    "images, rank 4": ("images", "lora"),
    "latents, all weights": ("latents", "full"),
    "latents, rank 4": ("latents", "lora"),
}


def save_pipelines(root: Path) -> None:
    """Writes both pipelines, with random weights."""
    torch.manual_seed(0)
    for name, channels, size in (("images", 3, SIZE), ("latents", 4, SIZE // 4)):
        unet = UNet2DModel(
            sample_size=size,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=(32, 64),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )
        scheduler = DDIMScheduler(clip_sample=False)
        if name == "images":
            DDPMPipeline(unet, scheduler).save_pretrained(root / name)
            continue
        levels = 3
        vae = AutoencoderKL(
            block_out_channels=(32,) * levels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
        )
        LDMPipeline(vae, unet, scheduler).save_pretrained(root / name)


def make_parts(root: Path, variant: str) -> CellParts:
    pipeline, kind = VARIANTS[variant]
    _, config = composed(
        *(f"finetuning={kind}", f"finetuning.pretrained={root / pipeline}", "trainer.threads=1", "clients=1"),
        *(f"data.image_size={SIZE}", "data.channels=3", f"data.batch_size={BATCH}", "evaluation.samples=0"),
    )
    pixels = torch.randint(0, 256, (BATCH, 3, SIZE, SIZE), dtype=torch.uint8)
    images = Images(pixels, np.zeros(BATCH, np.int64))
    return assemble(config, Dataset(images, images, ("one",)), [np.arange(BATCH)])


class Step:
    """A training step, as the Trainer takes it."""

    def __init__(self, parts: CellParts) -> None:
        pixels, labels = parts.training_data(BATCH)
        data = ClientData(pixels, np.arange(BATCH), BATCH, labels)
        (drawn,) = data.train_dataloader()
        self.batch: Any = data.on_after_batch_transfer(drawn, 0)
        self.model = parts.model
        self.optimizer: Any = parts.model.configure_optimizers()

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        self.model.training_step(self.batch, 0).backward()
        self.optimizer.step()


def print_peak(root: Path, variant: str) -> None:
    """Prints what two steps need above the memory before the first, in MB."""
    torch.set_num_threads(1)
    step = Step(make_parts(root, variant))
    before = PeakMemory().megabytes
    peak = PeakMemory()
    step()
    step()
    assert before is not None
    assert peak.megabytes is not None
    print(json.dumps({"megabytes": peak.megabytes - before}))


def main() -> None:
    if PEAK in sys.argv:
        print_peak(Path(sys.argv[2]), sys.argv[3])
        return
    given = parser(__doc__).parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        save_pipelines(Path(folder))
        parts = {variant: make_parts(Path(folder), variant) for variant in VARIANTS}
        seconds = in_turns({variant: Step(part) for variant, part in parts.items()}, 3 if given.quick else 10)
        megabytes = {}
        for variant in VARIANTS:
            command = [sys.executable, __file__, PEAK, folder, variant]
            done = subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8")
            megabytes[variant] = json.loads(done.stdout.splitlines()[-1])["megabytes"]
    trained = {
        variant: sum(tensor.numel() for tensor in part.model.state_dict().values())
        for variant, part in parts.items()
    }
    first = next(iter(VARIANTS))
    show(
        f"a step of {BATCH} images of {SIZE} x {SIZE}; ratio to the first row in brackets",
        ["", "trained parameters", "ms", "peak MB of a step"],
        [
            [
                variant,
                f"{trained[variant]:,}",
                f"{1e3 * seconds[variant]:.0f} ({seconds[variant] / seconds[first]:.2f})",
                f"{megabytes[variant]:.0f} ({megabytes[variant] / megabytes[first]:.2f})",
            ]
            for variant in VARIANTS
        ],
    )
    ratios = {f"step, {first} over {variant}": seconds[first] / seconds[variant] for variant in VARIANTS}
    ratios |= {f"memory, {first} over {v}": megabytes[first] / megabytes[v] for v in VARIANTS}
    write(given.out, ratios, {"seconds": seconds, "megabytes": megabytes, "trained": trained})


if __name__ == "__main__":
    main()
