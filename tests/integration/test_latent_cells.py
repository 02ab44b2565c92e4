"""Federations of latents and by prompts: trained, stopped, scored, exported, drawn by diffusers alone."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL, Cell, Wire, invoke
from diffusers import DDIMScheduler, DiffusionPipeline, LDMPipeline, StableDiffusionPipeline
from killed import run_killed
from numpy.typing import NDArray
from PIL import Image
from pipelines import TOKENS, save_latent_pipeline, save_text_pipeline
from safetensors.torch import load_file

from fedlight.audit import audit
from fedlight.data import digits
from fedlight.experiment.finished import open_cell
from fedlight.export import export
from fedlight.finetuning.latents import LatentSpace

MakeCell = Callable[..., Cell]
SHORT = ["rounds=2", "clients=2", "data.limit=24", "data.batch_size=8", "optimizer.lr=0.01"]
SHORT += ["evaluation.sampler=ddim", "evaluation.steps=4", "transport=inline"]
GUIDANCE = 3.0
TEXT = ["model.conditional=true", f"evaluation.guidance={GUIDANCE}", "finetuning=lora", "finetuning.rank=2"]
ROUNDED = 0.5 + 255e-4  # grey levels between an image in bytes and the same in floats, to 1e-4


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pretrained")
    return {
        "vq": save_latent_pipeline(root / "vq"),
        "kl": save_latent_pipeline(root / "kl", "kl", channels=3),
        "text": save_text_pipeline(root / "text"),
        "velocity": save_text_pipeline(root / "velocity", prediction_type="v_prediction"),
    }


def draw(pipeline: Any, seed: int, **arguments: Any) -> NDArray[np.float32]:
    """Images by diffusers alone, 0 to 255, the mean of their channels, shape (n, 1, height, width)."""
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    pipeline.set_progress_bar_config(disable=True)
    options = {
        "generator": torch.Generator().manual_seed(seed),
        "num_inference_steps": 4,
        "output_type": "np",
    }
    images = pipeline(**options, **arguments).images
    return 255 * images.transpose(0, 3, 1, 2).mean(axis=1, keepdims=True)


def draw_digits(pipeline: StableDiffusionPipeline, labels: list[int], seed: int) -> NDArray[np.float32]:
    prompts = [f"a photo of a {label}" for label in labels]
    return draw(pipeline, seed, prompt=prompts, guidance_scale=GUIDANCE)


@pytest.mark.parametrize("kind", ["vq", "kl"])
def test_a_federation_in_latent_space_is_drawn_alike_by_diffusers(
    kind: str, folders: dict[str, Path], cell: MakeCell
) -> None:
    made = cell(*SHORT, "finetuning=full", f"finetuning.pretrained={folders[kind]}", "evaluation.grid=4")
    images = open_cell(made.folder).sample(images=5, seed=3).numpy()
    pretrained = LDMPipeline.from_pretrained(folders[kind])
    alone = LDMPipeline.from_pretrained(made.folder / "model")
    assert images.shape == (5, 1, 8, 8)
    differences = np.sort(np.abs(draw(alone, 3, batch_size=5) - images).max(axis=(1, 2, 3)))
    alike = 4 if kind == "vq" else 5  # the last bit may decide between two vectors of the codebook
    assert differences[alike - 1] <= ROUNDED, differences
    assert np.abs(draw(pretrained, 3, batch_size=5) - images).max() > 5
    for name, tensor in pretrained.vqvae.state_dict().items():
        assert torch.equal(alone.vqvae.state_dict()[name], tensor)


@pytest.mark.parametrize("kind", ["text", "velocity"])
def test_adapters_of_a_text_model_are_loaded_and_drawn_alike_by_diffusers(
    kind: str, folders: dict[str, Path], cell: MakeCell, tmp_path: Path
) -> None:
    made = cell(*SHORT, *TEXT, f"finetuning.pretrained={folders[kind]}", "finetuning.alpha=6")
    opened = open_cell(made.folder)
    images = opened.sample(images=4, seed=5).numpy()
    pretrained = StableDiffusionPipeline.from_pretrained(folders[kind])
    before = draw_digits(pretrained, [0, 1, 2, 3], 5)
    pretrained.load_lora_weights(made.folder / "adapter")
    assert np.abs(draw_digits(pretrained, [0, 1, 2, 3], 5) - images).max() <= ROUNDED
    assert np.abs(before - images).max() > 2
    assert np.abs(images[0] - opened.sample(images=1, label=3, seed=5).numpy()[0]).max() > 0

    assert export(made.folder, None, tmp_path / "merged", None, False, False) == 0
    merged = DiffusionPipeline.from_pretrained(tmp_path / "merged")
    assert isinstance(merged, StableDiffusionPipeline)
    assert np.abs(draw_digits(merged, [0, 1, 2, 3], 5) - images).max() <= ROUNDED


def test_a_text_model_is_trained_on_the_prompts_of_its_classes(
    folders: dict[str, Path], cell: MakeCell
) -> None:
    options = [*SHORT, *TEXT, "rounds=1", f"finetuning.pretrained={folders['text']}"]
    hashes = [
        cell(*options, *more).result["state_sha256"]
        for more in ([], ["finetuning.prompt='a photo of a {label}'"], ["finetuning.prompt='{label}'"])
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_nothing_frozen_is_sent_or_stored(folders: dict[str, Path], cell: MakeCell, wire: Wire) -> None:
    made = cell(*SHORT, *TEXT, "method=UDEC", f"finetuning.pretrained={folders['text']}")
    components: dict[str, dict[str, torch.Tensor]] = {"unet": {}, "vae": {}, "text_encoder": {}}
    for component in components:
        (weights,) = (folders["text"] / component).glob("*.safetensors")
        components[component] = {
            name: tensor for name, tensor in load_file(weights).items() if len(tensor.unique()) > 8
        }
    stored = [path for path in made.folder.rglob("*") if path.is_file()]
    assert any("clients" in path.parts for path in stored)
    contents = [path.read_bytes() for path in stored]
    sent = [
        tensor
        for message in (*wire.broadcasts, *wire.updates)
        for payload in message.payloads.values()
        for tensor in payload.tensors.values()
    ]
    contents += [tensor.contiguous().numpy().tobytes() for tensor in sent]
    for component, tensors in components.items():
        assert tensors
        for name, tensor in tensors.items():
            assert not any(tensor.numpy().tobytes() in content for content in contents), (component, name)

    sizes = {name: p.numel() for name, p in open_cell(made.folder).module.unet.named_parameters()}
    adapters = {name: size for name, size in sizes.items() if ".lora_" in name}
    decoder = sum(size for name, size in adapters.items() if name.startswith("up_blocks"))
    assert 0 < decoder < sum(adapters.values()) < sum(sizes.values())
    reported = [int(row["bytes"]) for row in made.rows("ledger.csv") if row["direction"] == "up"]
    assert reported == [4 * decoder] * 4


@pytest.mark.parametrize(("kind", "options"), [("kl", ["finetuning=full"]), ("text", TEXT)])
def test_a_cell_that_is_killed_goes_on_to_the_same_bits(
    kind: str, options: list[str], folders: dict[str, Path], cell: MakeCell
) -> None:
    arguments = [*SHORT, *options, "method=UDEC", f"finetuning.pretrained={folders[kind]}"]
    expected = cell(*arguments).result
    run_killed(["name=killed", *arguments], stored=3)  # client 0 of round 2 was the last
    assert invoke(*SMALL, "name=killed", *arguments) == 0
    (folder,) = Path("runs/killed").glob("*")
    for key in ("state_sha256", "client_sha256"):
        assert Cell(folder).result[key] == expected[key]


def test_images_are_encoded_once_and_clients_see_latents(
    folders: dict[str, Path], cell: MakeCell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arguments = [*SHORT, "finetuning=full", f"finetuning.pretrained={folders['kl']}"]
    cache = f"evaluation.cache={tmp_path / 'cache'}"
    first = cell(*arguments, cache)
    (file,) = (tmp_path / "cache" / "latents").glob("*.npy")
    latents = np.load(file)
    assert latents.shape == (24, 2, 4, 4)
    space = open_cell(first.folder).latents
    assert space is not None
    assert np.array_equal(latents, space.encode(digits.load().train.pixels[:24]).numpy())
    monkeypatch.setattr(LatentSpace, "_encode_batch", None)
    assert cell(*arguments, cache).result["state_sha256"] == first.result["state_sha256"]


@pytest.mark.slow  # trains the classifier that scores
def test_models_of_latents_are_scored_and_audited(folders: dict[str, Path], cell: MakeCell) -> None:
    made = cell(*SHORT, *TEXT, f"finetuning.pretrained={folders['text']}", "evaluation.samples=70")
    assert made.result["fid"]["value"] > 0
    assert 0 <= made.result["fid"]["label_accuracy"]["all"] <= 1
    assert audit(made.folder, None, 12, 1, 0, False) == 0
    assert (made.folder / "audit.json").is_file()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("text", ["finetuning=full"], "conditioned on text.*: set model.conditional=true"),
        ("kl", ["finetuning=full", "finetuning.prompt=a"], r"finetuning\.prompt needs a pipeline that is"),
        ("kl", ["finetuning=full", "model.conditional=true"], "is not conditioned on labels"),
        (
            "text",
            [*TEXT, f"finetuning.prompt='{'a ' * TOKENS}'"],
            "has 10 tokens, and the text encoder takes",
        ),
    ],
)
def test_what_does_not_fit_a_latent_pipeline_is_an_error_of_one_line(
    kind: str,
    options: list[str],
    message: str,
    folders: dict[str, Path],
    command: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command(*SMALL, *SHORT, *options, f"finetuning.pretrained={folders[kind]}") == 2
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0, error
    assert re.search(message, error), error


def test_the_recipe_for_stable_diffusion_is_complete(
    folders: dict[str, Path], command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a pipeline of the same classes; its images are smaller."""
    for label in ("0", "1"):
        for number in range(6):
            path = tmp_path / "images" / label / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (10, 10), (40 * number, 99, 7)).save(path)
    arguments = [
        "experiment=sd_lora",
        f"finetuning.pretrained={folders['text']}",
        f"data.root={tmp_path / 'images'}",
        *("data.image_size=8", "clients=2", "trainer.accelerator=cpu", "evaluation.samples=0", "--dry"),
    ]
    assert command(*arguments) == 0
    assert "frozen" in capsys.readouterr().out


def test_adapters_are_stored_as_diffusers_stores_them(folders: dict[str, Path], cell: MakeCell) -> None:
    made = cell(*SHORT, *TEXT, "rounds=1", f"finetuning.pretrained={folders['text']}")
    names = load_file(made.folder / "adapter" / "pytorch_lora_weights.safetensors").keys()
    layers = {name.split(".lora_")[0].rpartition("attentions.0.")[2] for name in names}
    assert {"transformer_blocks.0.attn1.to_q", "transformer_blocks.0.attn2.to_out.0"} <= layers
    assert all(name.startswith("unet.") for name in names)
