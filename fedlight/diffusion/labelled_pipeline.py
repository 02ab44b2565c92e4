"""A diffusers pipeline that draws images of given classes; it is exported with a conditional model."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDPMPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor


class LabelledDDPMPipeline(DDPMPipeline):
    """DDPM (arXiv 2006.11239) with class labels and classifier-free guidance (arXiv 2207.12598)."""

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int],
        guidance_scale: float = 3.0,
        generator: Any = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Draws an image for each label.

        Args:
            class_labels: 0 to `unet.config.num_class_embeds - 2`; the last embedding means no label.
            guidance_scale: of classifier-free guidance; 1 for none, larger values follow the labels more
                closely.
            generator: torch.Generator of all random numbers.
            num_inference_steps: number of denoising steps; None for all steps of the schedule.
            output_type: `pil`, or values in [0, 1]: `np`, shape (n, height, width, channels), or `pt`, shape
                (n, channels, height, width).
            return_dict: False for a tuple.

        Raises:
            ValueError: a label is out of range.
        """
        no_label = self.unet.config.num_class_embeds - 1
        if not all(0 <= label < no_label for label in class_labels):
            raise ValueError(f"class_labels must be 0 to {no_label - 1}, got {list(class_labels)}")
        device, config = self._execution_device, self.unet.config
        labels = torch.tensor(list(class_labels), device=device)
        both = torch.cat((labels, torch.full_like(labels, no_label)))
        shape = (len(labels), config.in_channels, config.sample_size, config.sample_size)
        image = randn_tensor(shape, generator=generator, device=device, dtype=self.unet.dtype)
        self.scheduler.set_timesteps(num_inference_steps or self.scheduler.config.num_train_timesteps)
        for t in self.progress_bar(self.scheduler.timesteps):
            conditional, unconditional = self.unet(
                torch.cat((image, image)), t, class_labels=both
            ).sample.chunk(2)
            output = unconditional + guidance_scale * (conditional - unconditional)
            image = self.scheduler.step(output, t, image, generator=generator).prev_sample
        image = (image / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            image = image.cpu().permute(0, 2, 3, 1).numpy()
            if output_type == "pil":
                image = self.numpy_to_pil(image)
        return ImagePipelineOutput(images=image) if return_dict else (image,)
