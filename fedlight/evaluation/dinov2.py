"""The DINOv2 extractor: torch-fidelity's, with a network that is made here, not by downloaded code."""

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorDinoV2
from torch_fidelity.registry import register_feature_extractor
from torchvision.models import VisionTransformer

NAME = "fedlight-dinov2"
FEATURES = "dinov2"
PATCH, HEAD = 14, 64  # pixels of a patch's side, features of an attention head
OFFSET = 0.1  # added to the number of patches before position embeddings are scaled, as in the published code


class DinoV2(FeatureExtractorDinoV2):
    """torch-fidelity's extractor with the weights of a file.

    torch-fidelity has torch.hub load the network, which runs the newest code of a repository. The network is
    a vision transformer with layer scales (arXiv 2304.07193): torchvision's, whose projections are multiplied
    by them. Its size follows from the weights.

    Args:
        name: as registered.
        features_list: of "dinov2" (float32, shape (n, dimension)).
        feature_extractor_weights_path: a published state_dict, such as `dinov2_vits14_pretrain.pth`; without
            registers, and not the giant one, whose layers are others.
        kwargs: torch-fidelity's arguments for other extractors, ignored.
    """

    def __init__(
        self, name: str, features_list: list[str], feature_extractor_weights_path: Path, **kwargs: object
    ) -> None:
        FeatureExtractorBase.__init__(self, name, features_list)
        self.feature_extractor_internal_dtype = torch.float32
        published = torch.load(feature_extractor_weights_path, map_location="cpu", weights_only=True)
        self.dimension = int(published["cls_token"].shape[-1])
        state = _torchvision_state({name: tensor.float() for name, tensor in published.items()})
        layers = 1 + max(int(name.split(".")[1]) for name in published if name.startswith("blocks."))
        self.model = VisionTransformer(
            image_size=self.INPUT_IMAGE_SIZE,
            patch_size=PATCH,
            num_layers=layers,
            num_heads=self.dimension // HEAD,
            hidden_dim=self.dimension,
            mlp_dim=4 * self.dimension,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )
        self.model.heads = nn.Identity()
        self.model.load_state_dict(state)
        self.eval().requires_grad_(False)


register_feature_extractor(NAME, DinoV2)

RENAMED = {
    "norm1": "ln_1",
    "norm2": "ln_2",
    "attn.qkv.weight": "self_attention.in_proj_weight",
    "attn.qkv.bias": "self_attention.in_proj_bias",
    "attn.proj": "self_attention.out_proj",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.3",
}
"""Start of a name in a block of DINOv2 -> in a layer of torchvision's transformer."""
EMBEDDINGS = {"cls_token", "patch_embed", "pos_embed", "norm", "mask_token"}
"""First parts of the names outside the blocks; `mask_token` serves training alone."""


def _torchvision_state(published: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published state_dict as that of torchvision's transformer.

    Raises:
        KeyError: a tensor is missing.
    """
    state = {
        "class_token": published["cls_token"],
        "conv_proj.weight": published["patch_embed.proj.weight"],
        "conv_proj.bias": published["patch_embed.proj.bias"],
        "encoder.pos_embedding": _scaled_positions(published["pos_embed"]),
        "encoder.ln.weight": published["norm.weight"],
        "encoder.ln.bias": published["norm.bias"],
    }
    for name, tensor in published.items():
        if not name.startswith("blocks."):
            if name.split(".")[0] not in EMBEDDINGS:
                state[name] = tensor  # load_state_dict names it as unexpected
            continue
        _, number, rest = name.split(".", 2)
        if rest in ("ls1.gamma", "ls2.gamma"):
            continue
        for scale, layer in (("ls1", "attn.proj"), ("ls2", "mlp.fc2")):
            if rest.startswith(layer):
                gamma = published[f"blocks.{number}.{scale}.gamma"]
                tensor = tensor * (gamma[:, None] if tensor.dim() == 2 else gamma)
        for old, new in RENAMED.items():
            if rest.startswith(old):
                rest = new + rest.removeprefix(old)
                break
        state[f"encoder.layers.encoder_layer_{number}.{rest}"] = tensor
    return state


def _scaled_positions(embedding: Tensor) -> Tensor:
    """The position embeddings of 37x37 patches (518 pixels), scaled to the patches of an input image.

    Args:
        embedding: of the class token and the patches, shape (1, 1 + side * side, dimension).
    """
    first, patches = embedding[:, :1], embedding[:, 1:]
    side, wanted = round(patches.shape[1] ** 0.5), FeatureExtractorDinoV2.INPUT_IMAGE_SIZE // PATCH
    if side == wanted:
        return embedding
    grid = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    scaled = F.interpolate(grid, scale_factor=(wanted + OFFSET) / side, mode="bicubic")
    return torch.cat([first, scaled.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
