"""Slice maps: each tensor of a model in exactly one slice, for every model that is configured."""

from pathlib import Path

import pytest
import torch
from conftest import configured
from diffusers import UNet2DModel

from fedlight.federation.slices import SliceMap
from fedlight.runtime.errors import BadInput

FILES = sorted((Path(__file__).parents[3] / "configs" / "model").glob("*.yaml"))
MODELS = [path for path in FILES if path.stem != "pretrained"]  # which has no UNet of its own
SIZES = {path.stem: 28 if path.stem == "paper" else 8 for path in MODELS}
STATE = [
    "stem.weight",
    "downs.0.weight",
    "downs.1.weight",
    "downsample.weight",
    "mid.weight",
    "ema.mid.weight",
]


def test_names_are_sorted_by_prefix_in_the_order_of_the_model() -> None:
    slices = SliceMap.build(
        {"tail": ["mid"], "front": ["downsample", "downs", "stem"]}, STATE[:5], private=()
    )
    assert slices.names == {
        "tail": ("mid.weight",),
        "front": ("stem.weight", "downs.0.weight", "downs.1.weight", "downsample.weight"),
    }
    assert list(slices.names) == ["tail", "front"]
    assert slices.private == ()


def test_a_prefix_ends_at_a_dot() -> None:
    slices = SliceMap.build({"a": ["downs.1"], "b": ["downs.10"]}, ["downs.1.weight", "downs.10.weight"])
    assert slices.names == {"a": ("downs.1.weight",), "b": ("downs.10.weight",)}
    with pytest.raises(BadInput, match=r"downsample\.weight is in no slice"):
        SliceMap.build({"all": ["downs"]}, ["downs.0.weight", "downsample.weight"])


def test_a_prefix_may_be_a_whole_name() -> None:
    slices = SliceMap.build({"a": ["x.weight"], "b": ["x.bias"]}, ["x.weight", "x.bias"])
    assert slices.names == {"a": ("x.weight",), "b": ("x.bias",)}


def test_a_name_in_no_slice_is_named() -> None:
    with pytest.raises(
        BadInput, match=r"parameter mid\.weight is in no slice; .* exactly one of front, tail"
    ):
        SliceMap.build({"front": ["stem", "downs", "downsample"], "tail": ["up"]}, STATE[:5])


def test_a_name_in_two_slices_is_named_with_both() -> None:
    with pytest.raises(BadInput, match=r"parameter downs\.1\.weight is in slices front and tail"):
        SliceMap.build({"front": ["stem", "downs", "downsample"], "tail": ["downs.1", "mid"]}, STATE[:5])


def test_a_slice_may_reach_a_name_by_two_of_its_own_prefixes() -> None:
    slices = SliceMap.build({"all": ["downs", "downs.0"]}, ["downs.0.weight"])
    assert slices.names == {"all": ("downs.0.weight",)}


def test_an_empty_slice_is_named() -> None:
    with pytest.raises(BadInput, match="slice tail has no parameter"):
        SliceMap.build({"front": ["stem", "downs", "downsample", "mid"], "tail": ["up"]}, STATE[:5])


def test_private_names_belong_to_no_slice() -> None:
    slices = SliceMap.build(
        {"front": ["stem", "downs", "downsample"], "tail": ["mid"]}, STATE, private=["ema"]
    )
    assert slices.private == ("ema.mid.weight",)
    assert sorted(sum(slices.names.values(), ())) == sorted(STATE[:5])


def test_private_prefixes_end_at_a_dot_too() -> None:
    slices = SliceMap.build({"a": ["email"]}, ["email.weight", "ema.weight"], private=["ema"])
    assert slices.names == {"a": ("email.weight",)}
    assert slices.private == ("ema.weight",)


def test_a_slice_without_any_public_name_is_empty() -> None:
    with pytest.raises(BadInput, match="slice average has no parameter"):
        SliceMap.build({"all": ["mid"], "average": ["ema"]}, ["mid.weight", "ema.weight"], private=["ema"])


def test_selecting_slices_gives_their_tensors_and_no_others() -> None:
    state = {name: torch.full((2,), float(i)) for i, name in enumerate(STATE)}
    slices = SliceMap.build(
        {"front": ["stem"], "middle": ["downs", "downsample"], "tail": ["mid"]}, STATE, ["ema"]
    )
    selected = slices.select(["tail", "front"], state)
    assert set(selected) == {"stem.weight", "mid.weight"}
    assert all(selected[name] is state[name] for name in selected)
    assert slices.select([], state) == {}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_the_slices_of_every_configured_model_are_disjoint_and_complete(path: Path, channels: int) -> None:
    model, slices = configured(path, SIZES[path.stem], channels)
    assert list(slices.names) == ["encoder", "bottleneck", "decoder"]
    sliced = [name for names in slices.names.values() for name in names]
    assert len(sliced) == len(set(sliced))
    assert set(sliced) == {f"unet.{name}" for name in model.unet.state_dict()}

    state = model.state_dict()
    assert all(tensor.is_floating_point() for tensor in state.values())  # so that all of it has a mean
    counts = [
        sum(tensor.numel() for tensor in slices.select([name], state).values()) for name in slices.names
    ]
    assert min(counts) > 0
    assert sum(counts) == sum(parameter.numel() for parameter in model.unet.parameters())


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_every_configured_slice_prefix_names_a_part_of_its_model(path: Path) -> None:
    model, slices = configured(path, SIZES[path.stem])
    for name, prefixes in model.slices.items():
        for prefix in prefixes:
            assert any(member.startswith(f"{prefix}.") for member in slices.names[name]), prefix


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_every_configured_model_predicts_noise_in_the_shape_of_its_images(path: Path) -> None:
    model, _ = configured(path, SIZES[path.stem])
    x_t, t = torch.randn(2, 1, SIZES[path.stem], SIZES[path.stem]), torch.tensor([0, 999])
    assert model.unet(x_t, t).sample.shape == x_t.shape
    assert model.training_step(x_t, 0).isfinite()


def test_the_slices_of_unet2d_fit_the_model_of_diffusers() -> None:
    (path,) = (path for path in MODELS if path.stem == "unet2d")
    model, slices = configured(path, SIZES[path.stem])
    assert isinstance(model.unet, UNet2DModel)
    parts = {name: {member.split(".")[1] for member in members} for name, members in slices.names.items()}
    assert parts == {
        "encoder": {"conv_in", "time_embedding", "down_blocks"},
        "bottleneck": {"mid_block"},
        "decoder": {"up_blocks", "conv_norm_out", "conv_out"},
    }
