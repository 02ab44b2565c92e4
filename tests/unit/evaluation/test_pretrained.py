"""DINOv2 and CLIP with random weights: DINOv2 computed by hand, CLIP by torch-fidelity itself."""

import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Cell
from torch import Tensor, nn
from torch_fidelity.feature_extractor_clip import CLIPVisual
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
from torch_fidelity.utils import create_feature_extractor

from fedlight.evaluation import clip
from fedlight.evaluation.extractor import make_pretrained
from fedlight.runtime.errors import BadInput

CPU = torch.device("cpu")
WIDTH, BLOCKS, SIDE = 128, 2, 37  # of the DINOv2; the published files have positions of 37x37 patches
PIXELS = torch.randint(256, (3, 1, 28, 28), generator=torch.Generator().manual_seed(0)).byte()


def random_dinov2() -> dict[str, Tensor]:
    """A small state_dict in the layout of the published files."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int, mean: float = 0.0) -> Tensor:
        return mean + 0.1 * torch.randn(*shape, generator=generator)

    state = {
        "cls_token": draw(1, 1, WIDTH),
        "pos_embed": draw(1, SIDE**2 + 1, WIDTH),
        "mask_token": draw(1, WIDTH),
        "patch_embed.proj.weight": draw(WIDTH, 3, 14, 14),
        "patch_embed.proj.bias": draw(WIDTH),
        "norm.weight": draw(WIDTH, mean=1.0),
        "norm.bias": draw(WIDTH),
    }
    for block in (f"blocks.{number}" for number in range(BLOCKS)):
        for norm in ("norm1", "norm2"):
            state |= {f"{block}.{norm}.weight": draw(WIDTH, mean=1.0), f"{block}.{norm}.bias": draw(WIDTH)}
        for scale in ("ls1", "ls2"):
            state[f"{block}.{scale}.gamma"] = draw(WIDTH, mean=0.5)
        for layer, rows, columns in (
            ("attn.qkv", 3 * WIDTH, WIDTH),
            ("attn.proj", WIDTH, WIDTH),
            ("mlp.fc1", 4 * WIDTH, WIDTH),
            ("mlp.fc2", WIDTH, 4 * WIDTH),
        ):
            state |= {f"{block}.{layer}.weight": draw(rows, columns), f"{block}.{layer}.bias": draw(rows)}
    return state


def features_by_hand(state: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """DINOv2 as its paper has it: pre-norm blocks with layer scales; the class token after the last norm."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    images = interpolate_bilinear_2d_like_tensorflow1x(
        pixels.float().expand(-1, 3, -1, -1), size=(224, 224), align_corners=False
    )
    images = (images / 255 - mean[:, None, None]) / std[:, None, None]
    patches = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=14)
    tokens = torch.cat(
        [state["cls_token"].expand(len(pixels), 1, WIDTH), patches.flatten(2).transpose(1, 2)], 1
    )
    grid = state["pos_embed"][:, 1:].reshape(1, SIDE, SIDE, WIDTH).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, scale_factor=16.1 / SIDE, mode="bicubic")
    x = tokens + torch.cat([state["pos_embed"][:, :1], grid.permute(0, 2, 3, 1).reshape(1, 256, WIDTH)], 1)

    def norm(values: Tensor, name: str) -> Tensor:
        return F.layer_norm(values, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def linear(values: Tensor, name: str) -> Tensor:
        return values @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    for block in (f"blocks.{number}" for number in range(BLOCKS)):
        q, k, v = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").chunk(3, dim=-1)
        heads = []
        for head in range(WIDTH // 64):
            part = slice(64 * head, 64 * (head + 1))
            weights = (q[..., part] @ k[..., part].transpose(1, 2) / 8).softmax(dim=-1)
            heads.append(weights @ v[..., part])
        x = x + state[f"{block}.ls1.gamma"] * linear(torch.cat(heads, -1), f"{block}.attn.proj")
        hidden = F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
        x = x + state[f"{block}.ls2.gamma"] * linear(hidden, f"{block}.mlp.fc2")
    return norm(x, "norm")[:, 0]


@pytest.fixture(scope="module")
def dinov2_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dinov2") / "random.pth"
    torch.save(random_dinov2(), path)
    return path


def test_dinov2_is_the_network_of_its_paper_at_any_size(dinov2_weights: Path) -> None:
    made = make_pretrained("dinov2", dinov2_weights, CPU)
    seen = made(PIXELS)
    assert (made.name, made.dimension, seen.logits) == ("dinov2", WIDTH, None)
    expected = features_by_hand(random_dinov2(), PIXELS)
    assert torch.allclose(seen.values, expected, atol=1e-4)
    assert expected.std(dim=0).mean() > 0.01  # images differ


def with_registers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**state, "register_tokens": torch.zeros(1, 4, WIDTH)}


def gated(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The layers of the giant model."""
    return {name.replace("mlp.fc1", "mlp.w12"): tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    "damage", [with_registers, gated, lambda state: {}, lambda state: {**state, "norm.bias": torch.zeros(3)}]
)
def test_other_weights_than_those_of_dinov2_are_rejected_in_one_line(
    tmp_path: Path, damage: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> None:
    path = tmp_path / "other.pth"
    torch.save(damage(random_dinov2()), path)
    with pytest.raises(BadInput, match=r"^evaluation\.weights: .* does not hold .*dinov2 \([^\n]+$"):
        make_pretrained("dinov2", path, CPU)


@pytest.mark.slow
def test_a_cell_is_scored_by_dinov2_with_weights_given_by_path(
    cell: Callable[..., Cell], dinov2_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of another size than the published one decides how many images are enough."""
    scored = ["rounds=0", "evaluation.extractor=dinov2", f"evaluation.samples={WIDTH + 1}"]
    made = cell(*scored, f"evaluation.weights={dinov2_weights}")
    fid = made.result["fid"]
    assert (fid["extractor"], fid["extractor_accuracy"], fid["inception_score"]) == ("dinov2", None, None)
    assert fid["extractor_sha256"] == hashlib.sha256(dinov2_weights.read_bytes()).hexdigest()
    assert min(fid[name] for name in ("value", "density", "coverage_knn")) >= 0
    monkeypatch.setenv("FEDLIGHT_DINOV2", str(dinov2_weights))
    again = cell(*scored)
    assert (again.result["cell"], again.result["fid"]) == (made.result["cell"], fid)


class Published(nn.Module):
    """A small CLIP as OpenAI publishes it: with parts of the text encoder, of which one size is read."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = CLIPVisual(64, 64, 2, 128, 32).visual
        self.text_projection = nn.Parameter(torch.randn(32, 64))
        self.logit_scale = nn.Parameter(torch.ones([]))

    def forward(self, images: Tensor) -> Tensor:
        return self.visual(images)


@pytest.fixture(scope="module")
def clip_script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("clip") / "random.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that TorchScript is deprecated
        torch.jit.trace(Published().eval(), torch.randn(1, 3, 64, 64)).save(path)
    return path


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_clip_sees_as_torch_fidelity_does_from_a_script_and_from_a_state_dict(
    clip_script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = create_feature_extractor(
        "clip-vit-b-32", ["clip"], cuda=False, feature_extractor_weights_path=clip_script, verbose=False
    )
    with torch.no_grad():
        (expected,) = theirs(PIXELS.repeat(1, 3, 1, 1))
    digest = hashlib.sha256(clip_script.read_bytes()).hexdigest()
    monkeypatch.setattr(clip, "SCRIPTS", clip.SCRIPTS | {digest})  # as if OpenAI had published it
    plain = tmp_path / "plain.pth"
    torch.save(dict(torch.jit.load(clip_script).state_dict()), plain)
    for path in (clip_script, plain):
        made = make_pretrained("clip", path, CPU)
        seen = made(PIXELS)
        assert (made.name, made.dimension, seen.logits) == ("clip", 64, None)
        assert torch.equal(seen.values, expected)
    assert expected.std(dim=0).mean() > 0.01


def test_a_script_that_openai_did_not_publish_is_refused_and_not_run(
    clip_script: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*arguments: Any, **options: Any) -> None:
        pytest.fail("the script is run")

    monkeypatch.setattr(torch.jit, "load", loaded)
    with pytest.raises(BadInput, match=r"^evaluation\.weights: .* does not hold .*clip \([^\n]+$"):
        make_pretrained("clip", clip_script, CPU)
