"""The CLIP extractor: torch-fidelity's, which here runs no code that a file of weights may hold."""

import warnings
from pathlib import Path

import torch
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_clip import MODEL_METADATA, FeatureExtractorCLIP, build_model
from torch_fidelity.registry import register_feature_extractor

from fedlight.runtime.files import file_sha256

NAME = "fedlight-clip"
FEATURES = "clip"
SCRIPTS = frozenset(published["hash"] for published in MODEL_METADATA.values())
"""SHA-256 of the TorchScript files that OpenAI published: programs, of which only these are run."""


class Clip(FeatureExtractorCLIP):
    """torch-fidelity's extractor (arXiv 2103.00020) with the weights of a file; they decide its size.

    Args:
        name: as registered.
        features_list: of "clip" (float32, shape (n, dimension)).
        feature_extractor_weights_path: a file that OpenAI published, or the state_dict of one, which
            `torch.save` wrote.
        kwargs: torch-fidelity's arguments for other extractors, ignored.
    """

    def __init__(
        self, name: str, features_list: list[str], feature_extractor_weights_path: Path, **kwargs: object
    ) -> None:
        FeatureExtractorBase.__init__(self, name, features_list)
        self.feature_extractor_internal_dtype = torch.float32
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that TorchScript is deprecated, or read by torch.load
            if file_sha256(feature_extractor_weights_path) in SCRIPTS:
                state = torch.jit.load(feature_extractor_weights_path, map_location="cpu").state_dict()
            else:
                state = torch.load(feature_extractor_weights_path, map_location="cpu", weights_only=True)
        self.dimension = int(state["text_projection"].shape[1])
        self.model = build_model(dict(state), torch.float32)
        self.resolution = self.model.visual.input_resolution
        self.eval().requires_grad_(False)


register_feature_extractor(NAME, Clip)
