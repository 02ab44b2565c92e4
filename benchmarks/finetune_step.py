"""Seconds and memory of a training step, all weights against adapters: python benchmarks/finetune_step.py

The UNet is that of Fashion-MNIST in the paper, 28 channels wide, with weights from a seed; one thread.
"""

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import DDPMPipeline, DDPMScheduler

from fedlight.diffusion.unet import ConvNextUNet
from fedlight.experiment.footprint import measure_footprint
from fedlight.experiment.parts import CellParts
from fedlight.experiment.trial import check
from fedlight.single_cell import configure

LORA = ("finetuning=lora", "finetuning.rank=4")
CHOICES = {
    "full": ("finetuning=full",),
    "lora, attention": LORA,
    "lora, attention and convolutions": (*LORA, "finetuning.targets=[attention,convolutions]"),
    "the same, train=b": (*LORA, "finetuning.targets=[attention,convolutions]", "finetuning.train=b"),
}


def step_seconds(parts: CellParts, steps: int) -> float:
    """The fastest of several training steps."""
    module, optimizer = parts.model, parts.model.configure_optimizers()
    images = torch.randn(parts.config.data.batch_size, *parts.config.data.shape)
    times = []
    for _ in range(steps + 1):  # the first one allocates what later ones reuse
        started = time.perf_counter()
        optimizer.zero_grad()
        module.training_step(images, 0).backward()
        optimizer.step()
        times.append(time.perf_counter() - started)
    return min(times[1:])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=64, help="images of a step")
    parser.add_argument("--steps", type=int, default=10, help="steps, of which the fastest counts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        DDPMPipeline(ConvNextUNet(), DDPMScheduler()).save_pretrained(folder)
        print(f"| of batch {options.batch} | trained | frozen | seconds a step | peak of the process, MB |")
        print("|---|---:|---:|---:|---:|")
        for name, arguments in CHOICES.items():
            data = (
                "data=fmnist",
                "data.limit=640",
                f"data.batch_size={options.batch}",
                "evaluation.samples=0",
            )
            place = f"finetuning.pretrained={Path(folder)}"
            parts = check(configure([*data, *arguments, place, "trainer.threads=1"]), elsewhere=False)
            assert parts is not None
            needs = measure_footprint(parts)
            seconds = step_seconds(parts, options.steps)
            memory = "unknown" if needs.megabytes is None else f"{needs.megabytes:,.0f}"
            print(f"| {name} | {needs.trained:,} | {needs.frozen:,} | {seconds:.3f} | {memory} |")
