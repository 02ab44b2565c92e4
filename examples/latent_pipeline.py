"""Makes a pipeline for a federation in latent space: a small VAE of Fashion-MNIST, and an untrained UNet.

python examples/latent_pipeline.py --out FOLDER [--steps N]

The VAE (AutoencoderKL) is trained on the last 50,000 training images, so that no client of a cell with
data.limit=10000 or less has one of them. It takes images of 28 x 28 to latents of 4 x 7 x 7. The UNet of the
pipeline has random weights: `finetuning=full finetuning.pretrained=FOLDER` trains it in latent space.
About 15 minutes on an idle core.
"""

import argparse
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, LDMPipeline, UNet2DModel
from torch import Tensor
from tqdm import tqdm

from fedlight.data.fmnist import load
from fedlight.runtime.pixels import to_floats

FIRST = 10_000  # training images that are left to the clients
KL_WEIGHT = 1e-3  # of the mean divergence of a latent value beside the mean absolute error of a pixel


def train_vae(pixels: Tensor, steps: int, batch_size: int = 64) -> AutoencoderKL:
    """Trains the VAE on images, uint8, shape (n, 1, 28, 28); the values of its latents have variance 1."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        latent_channels=4,
        sample_size=28,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )
    optimizer = torch.optim.Adam(vae.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    bar = tqdm(range(steps), desc="VAE", mininterval=5)
    for _ in bar:
        images = to_floats(pixels[torch.randint(len(pixels), (batch_size,))])
        posterior = vae.encode(images).latent_dist
        error = F.l1_loss(vae.decode(posterior.sample()).sample, images)
        divergence = posterior.kl().sum() / posterior.mean.numel()
        optimizer.zero_grad()
        (error + KL_WEIGHT * divergence).backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(error=f"{error.item():.4f}", divergence=f"{divergence.item():.2f}", refresh=False)
    with torch.no_grad():
        latents = vae.eval().encode(to_floats(pixels[:1000])).latent_dist.mean
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    return vae


def make_unet() -> UNet2DModel:
    """A UNet for latents of 4 x 7 x 7, with random weights."""
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=7,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64,),
        layers_per_block=2,
        norm_num_groups=8,
        attention_head_dim=16,
        down_block_types=("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--steps", type=int, default=3000, help="training steps (default: %(default)s)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    dataset = load(os.environ.get("FEDLIGHT_FMNIST"), os.environ.get("FEDLIGHT_CACHE", "~/.cache/fedlight"))
    begun = time.perf_counter()
    vae = train_vae(dataset.train.pixels[FIRST:], given.steps)
    images = to_floats(dataset.test.pixels[:1000])
    with torch.no_grad():
        decoded = vae.decode(vae.encode(images).latent_dist.mean).sample
    print(
        f"{time.perf_counter() - begun:.0f} s; mean absolute error of a pixel of 1000 test images: "
        f"{(decoded - images).abs().mean() * 127.5:.2f} of 255"
    )
    scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=True, clip_sample_range=4.0)
    LDMPipeline(vae, make_unet(), scheduler).save_pretrained(given.out)


if __name__ == "__main__":
    main()
