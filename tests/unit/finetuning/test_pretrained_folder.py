"""A pretrained folder: what is loaded, under which hash, and what is refused in one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import PNDMScheduler
from pretrained import save_pretrained, tiny_unet
from safetensors.torch import load_file, save_file

from fedlight.finetuning.finetuning_config import FinetuningConfig
from fedlight.finetuning.pretrained import PretrainedPipeline, open_pretrained
from fedlight.finetuning.pretrained_files import find_pretrained, hash_pretrained, pretrained_sha256
from fedlight.runtime.errors import BadInput


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_pretrained(tmp_path / "model")


@pytest.fixture
def opened(tmp_path: Path, folder: Path) -> PretrainedPipeline:
    return open_folder(folder)


def open_folder(folder: Path, sha256: str | None = None) -> PretrainedPipeline:
    config = FinetuningConfig(name="full", pretrained=str(folder), sha256=sha256)
    return open_pretrained(config, str(folder.parent / "cache"))


@pytest.mark.parametrize("kind", ["ConvNextUNet", "UNet2DModel"])
def test_a_saved_pipeline_is_loaded_with_its_weights_and_its_schedule(tmp_path: Path, kind: str) -> None:
    opened = open_folder(save_pretrained(tmp_path / "model", kind))
    unet, expected = opened.load_model("unet"), tiny_unet(kind)
    assert type(unet) is type(expected)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(unet.state_dict()[name], tensor), name
    schedule = opened.load_schedule()
    assert schedule.config.prediction_type == "v_prediction"
    assert schedule.config.num_train_timesteps == 20


def test_the_schedule_of_training_is_taken_from_any_sampler(folder: Path, opened: PretrainedPipeline) -> None:
    sampler = PNDMScheduler(
        num_train_timesteps=50, beta_start=0.001, beta_end=0.012, beta_schedule="scaled_linear"
    )
    sampler.save_pretrained(folder / "scheduler")
    schedule = opened.load_schedule()
    assert schedule.config.prediction_type == "epsilon"
    torch.testing.assert_close(schedule.alphas_cumprod, sampler.alphas_cumprod)


def test_the_hash_is_that_of_the_files_that_are_read(tmp_path: Path, folder: Path) -> None:
    cache = str(tmp_path / "cache")
    first = hash_pretrained(folder, cache)
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    (moved / "README.md").write_text("not read")
    (moved / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_text("not read")
    assert hash_pretrained(moved, cache) == first
    weights = moved / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert hash_pretrained(moved, cache) != first
    open_folder(folder, first)
    with pytest.raises(BadInput, match=rf"has the SHA-256 \w+, and the configuration names {first}"):
        open_folder(moved, first)


def refusal(folder: Path, part: str = "unet") -> str:
    find_pretrained.cache_clear()

    def load() -> object:
        opened = open_folder(folder)
        return opened.load_schedule() if part == "scheduler" else opened.load_model(part)

    with pytest.raises(BadInput) as refused:
        load()
    message = str(refused.value)
    assert "\n" not in message
    return message


def test_what_is_no_pipeline_is_refused_in_one_line(tmp_path: Path, folder: Path) -> None:
    assert "there is no folder" in refusal(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "is no pipeline of diffusers: it has no model_index.json" in refusal(tmp_path / "empty")
    assert pretrained_sha256(str(tmp_path / "empty"), str(tmp_path)) is None
    assert "has no vae; it has unet, scheduler" in refusal(folder, "vae").replace(
        "scheduler, unet", "unet, scheduler"
    )
    (folder / "model_index.json").write_text("[" * 40)
    assert "model_index.json cannot be read: " in refusal(folder)


def test_code_of_others_is_not_run(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    index["unet"] = ["os", "system"]
    (folder / "model_index.json").write_text(json.dumps(index))
    assert "unet of" in refusal(folder)
    assert "is system; can be ConvNextUNet, UNet2DModel" in refusal(folder)


def test_weights_are_safetensors_that_fit(folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    kept = weights.read_bytes()
    config = folder / "unet" / "config.json"
    described = json.loads(config.read_text())

    config.write_text(json.dumps({**described, "dim": 16}))
    assert "cannot be loaded as ConvNextUNet from safetensors" in refusal(folder)
    config.write_text(json.dumps(described))

    tensors = load_file(weights)
    removed = tensors.pop("mid.attention.qkv.weight")
    save_file(tensors, weights, metadata={"format": "pt"})
    assert "do not fit ConvNextUNet: missing keys mid.attention.qkv.weight" in refusal(folder)
    save_file(
        {**tensors, "mid.attention.qkv.weight": removed, "more": removed.clone()}, weights, {"format": "pt"}
    )
    assert "do not fit ConvNextUNet: unexpected keys more" in refusal(folder)

    torch.save(tiny_unet().state_dict(), folder / "unet" / "diffusion_pytorch_model.bin")
    weights.unlink()
    assert "unet has no weights in safetensors, and others are not read" in refusal(folder)

    weights.write_bytes(kept[: len(kept) // 2])
    assert "cannot be loaded as ConvNextUNet from safetensors" in refusal(folder)

    config.unlink()
    assert f"{folder} has no unet/config.json" in refusal(folder)

    (folder / "scheduler" / "scheduler_config.json").write_text('{"beta_schedule": "unknown"}')
    assert "is no noise schedule" in refusal(folder, "scheduler")


def test_an_id_of_the_hub_needs_internet_or_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    find_pretrained.cache_clear()
    with pytest.raises(BadInput, match="cannot be fetched from the Hugging Face Hub") as refused:
        find_pretrained("somebody/no-such-pipeline")
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500
    with pytest.raises(BadInput, match="must be set"):
        find_pretrained(None)
