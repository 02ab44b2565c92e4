"""The latent space of a pretrained pipeline: images are encoded once, samples are decoded."""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import ModelMixin
from torch import Tensor

from fedlight.finetuning.pretrained import PretrainedPipeline
from fedlight.runtime.cache import load_or_make
from fedlight.runtime.errors import BadInput
from fedlight.runtime.hashing import state_sha256, tensors_sha256
from fedlight.runtime.pixels import to_floats
from fedlight.runtime.progress import track

AUTOENCODERS = ("vae", "vqvae")  # names of a pipeline's component
BATCH = 32  # images that are encoded or decoded at once
VERSION = 1  # of the encoding, part of the cached file's name


@dataclass(frozen=True)
class LatentSpace:
    """The frozen autoencoder of a latent diffusion model (arXiv 2112.10752), between images and latents.

    An image is encoded to the mean of its posterior (AutoencoderKL), or to the vectors before quantisation
    (VQModel), times the autoencoder's `scaling_factor`. Grey images that the autoencoder takes in colour have
    their channel repeated, and the channels of a decoded image are averaged.

    Args:
        autoencoder: an AutoencoderKL or a VQModel with its weights, which are never trained and belong to no
            state_dict of the cell.
        image_shape: channels, height and width of the images of the data set.

    Raises:
        BadInput: the autoencoder cannot take such images.
    """

    autoencoder: ModelMixin
    image_shape: tuple[int, int, int]

    def __post_init__(self) -> None:
        channels, height, _ = self.image_shape
        config, factor = self.autoencoder.config, self.factor
        name = type(self.autoencoder).__name__
        if height % factor:
            above = -(-height // factor) * factor
            sizes = [size for size in (above - factor, above) if size > 0]
            raise BadInput(
                f"data.image_size={height}: the {name} of finetuning.pretrained makes one latent of {factor} "
                f"x {factor} pixels, so that the image size must be a multiple of {factor}: choose "
                f"{' or '.join(map(str, sizes))}"
            )
        if channels not in (1, config.in_channels) or config.in_channels != config.out_channels:
            raise BadInput(
                f"data.channels={channels}: the {name} of finetuning.pretrained takes {config.in_channels} "
                f"channels and returns {config.out_channels}; choose data of {config.in_channels} channels, "
                "or grey ones (data.channels=1)"
            )
        scaling = config.scaling_factor
        if type(scaling) not in (int, float) or not 0 < scaling < math.inf:
            raise BadInput(
                f"finetuning.pretrained: scaling_factor of the {name} must be a number above 0, got "
                f"{scaling!r}"
            )
        self.autoencoder.requires_grad_(False).eval()

    @property
    def factor(self) -> int:
        """Height and width of the pixels that become one latent vector."""
        return int(2 ** (len(self.autoencoder.config.block_out_channels) - 1))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the latents of an image."""
        _, height, width = self.image_shape
        return self.autoencoder.config.latent_channels, height // self.factor, width // self.factor

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """The latents of images.

        Args:
            pixels: uint8 in 0..255, shape (n, *image_shape).

        Returns:
            Float32, shape (n, *shape), on the same device.
        """
        self.autoencoder.to(pixels.device)
        return torch.cat([self._encode_batch(batch) for batch in pixels.split(BATCH)])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """The images of latents.

        Args:
            latents: float32, shape (n, *shape).

        Returns:
            Float32, about -1 to 1, shape (n, *image_shape), on the same device; the mean of a grey image's
            channels is taken of values that are clipped to [-1, 1].
        """
        self.autoencoder.to(latents.device)
        scaled = latents / self.autoencoder.config.scaling_factor
        images = torch.cat([self.autoencoder.decode(batch).sample for batch in scaled.split(BATCH)])
        if self.image_shape[0] < images.shape[1]:
            images = images.clamp(-1, 1).mean(dim=1, keepdim=True)
        return images

    def encode_cached(self, pixels: Tensor, cache: str, device: torch.device) -> Tensor:
        """The latents of a data set, encoded once and kept in the cache, memory-mapped.

        The file is named by a hash of the images, of the autoencoder's weights and of what decides the order
        of sums. It is as private as the images.

        Args:
            pixels: uint8, shape (n, *image_shape).
            cache: fedlight's cache folder.
            device: that encodes.

        Returns:
            Float32, shape (n, *shape), on the CPU.

        Raises:
            BadInput: the cache cannot be used.
        """
        shape = (len(pixels), *self.shape)
        scaling = self.autoencoder.config.scaling_factor
        weights = state_sha256(self.autoencoder.state_dict())
        sums = (VERSION, BATCH, torch.get_num_threads(), device.type, scaling, self.image_shape)
        name = hashlib.sha256(f"{weights} {tensors_sha256([pixels])} {sums}".encode()).hexdigest()

        def read(path: Path) -> Tensor:
            stored = np.load(path, mmap_mode="c")
            if stored.shape != shape or stored.dtype != np.float32:
                raise ValueError(f"{path} holds other latents")
            return torch.from_numpy(stored)

        def make(path: Path) -> None:
            self.autoencoder.to(device)
            with path.open("wb") as file:
                np.lib.format.write_array_header_1_0(
                    file, {"descr": "<f4", "fortran_order": False, "shape": shape}
                )
                for batch in _batches(pixels):
                    file.write(self._encode_batch(batch.to(device)).cpu().numpy().tobytes())

        return load_or_make(Path(cache).expanduser() / "latents" / f"{name[:32]}.npy", read, make)

    @torch.no_grad()
    def _encode_batch(self, pixels: Tensor) -> Tensor:
        images = to_floats(pixels).expand(-1, self.autoencoder.config.in_channels, -1, -1)
        encoded = self.autoencoder.encode(images)
        vectors = type(self.autoencoder).__name__ == "VQModel"
        latents = encoded.latents if vectors else encoded.latent_dist.mode()
        return latents * self.autoencoder.config.scaling_factor


def load_latent_space(pipeline: PretrainedPipeline, image_shape: tuple[int, int, int]) -> LatentSpace | None:
    """The latent space of a pipeline, for images of this shape; None where its UNet denoises images.

    Raises:
        BadInput: the autoencoder cannot be loaded, or cannot take such images.
    """
    for component in AUTOENCODERS:
        if component in pipeline.classes:
            return LatentSpace(pipeline.load_model(component), image_shape)
    return None


def _batches(pixels: Tensor) -> Iterable[Tensor]:
    """The images by batches, with a bar."""
    return track(pixels.split(BATCH), "encoding images", math.ceil(len(pixels) / BATCH))
