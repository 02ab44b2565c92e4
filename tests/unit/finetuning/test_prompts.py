"""Prompts are made of class names, and embedded as by Stable Diffusion's own pipeline."""

import shutil
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from pipelines import TOKENS, WIDTH, save_text_pipeline

from fedlight.diffusion.sampling import no_label
from fedlight.finetuning import prompts
from fedlight.finetuning.prompts import condition_on_prompts, embed_cached, make_prompts
from fedlight.runtime.errors import BadInput

TEXTS = make_prompts(None, ["0", "3"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text_pipeline(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(folder)


def test_the_last_prompt_is_empty() -> None:
    assert TEXTS == ["a photo of a 0", "a photo of a 3", ""]
    assert make_prompts("{label}, {label}; {other}", ["cat"]) == ["cat, cat; {other}", ""]
    assert make_prompts("an X-ray", ["sick", "sound"]) == ["an X-ray", "an X-ray", ""]


def test_embeddings_are_those_of_the_pipeline(
    folder: Path, pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    embeddings = embed_cached(folder, "hash", TEXTS, str(tmp_path))
    expected, negative = pipeline.encode_prompt(TEXTS[:2], torch.device("cpu"), 1, True)
    assert embeddings.shape == (3, TOKENS, WIDTH)
    assert torch.allclose(embeddings[:2], expected, atol=1e-6)
    assert torch.allclose(embeddings[2], negative[0], atol=1e-6)
    assert not torch.allclose(embeddings[0], embeddings[1], atol=1e-3)


def test_embeddings_are_computed_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = embed_cached(folder, "hash", TEXTS, str(tmp_path))
    monkeypatch.setattr(prompts, "embed", None)
    assert torch.equal(embed_cached(folder, "hash", TEXTS, str(tmp_path)), first)
    for changed in (("hash", TEXTS[1:]), ("another", TEXTS)):
        with pytest.raises(TypeError):
            embed_cached(folder, *changed, str(tmp_path))


def test_a_label_stands_for_its_prompt(pipeline: StableDiffusionPipeline) -> None:
    embeddings = torch.randn(3, TOKENS, WIDTH)
    unet = deepcopy(pipeline.unet)
    condition_on_prompts(unet, embeddings)
    x_t, labels = torch.randn(4, 2, 4, 4), torch.tensor([2, 0, 1, 0])
    with torch.no_grad():
        predicted = unet(x_t, 5, class_labels=labels).sample
        expected = pipeline.unet(x_t, 5, embeddings[[2, 0, 1, 0]]).sample
        passed = deepcopy(unet)(x_t, 5, encoder_hidden_states=embeddings[[2, 0, 1, 0]]).sample
    assert torch.equal(predicted, expected)
    assert torch.equal(passed, expected)
    assert not torch.allclose(expected, pipeline.unet(x_t, 5, embeddings[[0, 0, 1, 0]]).sample)
    assert no_label(unet) == 2
    assert unet.state_dict().keys() == pipeline.unet.state_dict().keys()


def test_a_prompt_that_is_too_long_is_an_error_of_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=rf"^finetuning\.prompt: .*has 9 tokens.*takes {TOKENS};[^\n]*$"):
        embed_cached(folder, "hash", ["a photo of a photo of a"], str(tmp_path))


@pytest.mark.parametrize("component", ["tokenizer", "text_encoder"])
def test_a_pipeline_without_tokenizer_or_text_encoder_is_an_error_of_one_line(
    folder: Path, tmp_path: Path, component: str
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    for path in (broken / component).iterdir():
        path.write_bytes(b"{")
    with pytest.raises(BadInput, match=rf"^finetuning\.pretrained: .*{component} cannot be loaded: [^\n]*$"):
        embed_cached(broken, "hash", TEXTS, str(tmp_path))
    if component == "tokenizer":
        (broken / component / "tokenizer.json").unlink()
        with pytest.raises(BadInput, match=r"^finetuning\.pretrained: .*has no vocabulary \(tok[^\n]*$"):
            embed_cached(broken, "hash", TEXTS, str(tmp_path))
    shutil.rmtree(broken / component)
    with pytest.raises(BadInput, match=rf"^finetuning\.pretrained: .* has no {component}[^\n]*$"):
        embed_cached(broken, "hash", TEXTS, str(tmp_path))
