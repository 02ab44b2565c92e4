"""Extractors: an accurate, reproducible and cached classifier; Inception as in torch-fidelity."""

import hashlib
import io
import json
import multiprocessing
import os
import random
import re
import sys
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from conftest import Cell, classifier_of, invoke
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.utils import create_feature_extractor

from fedlight.data import digits
from fedlight.data.dataset import Dataset, Images
from fedlight.data.fmnist import load as load_fmnist
from fedlight.evaluation import classifier, extractor, reference, weights
from fedlight.evaluation.extractor import Extractor, Network, make_pretrained
from fedlight.evaluation.reference import Moments, Reference, make_reference
from fedlight.evaluation.scores import score
from fedlight.evaluation.weights import Published
from fedlight.runtime import progress
from fedlight.runtime.errors import BadInput

CPU = torch.device("cpu")
FILE = "weights.pth"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Classifiers train for 2 epochs, where it does not matter how good they are."""
    monkeypatch.setattr(classifier, "EPOCHS", 2)


@pytest.fixture(scope="module")
def fmnist_images(fmnist: None) -> Dataset:
    return load_fmnist(None, "")


def errors(seen: Extractor, images: Images) -> int:
    """How many images the classifier labels wrongly."""
    return int((seen(images.pixels).logits.argmax(dim=1).numpy() != images.labels).sum())


# ---- the classifier


def test_the_digits_classifier_is_right_in_97_of_100_test_images(digits_classifier: Extractor) -> None:
    wrong = errors(digits_classifier, digits.load().test)
    assert wrong <= 0.03 * 360
    assert digits_classifier.accuracy == 1 - wrong / 360


@pytest.mark.slow
def test_after_an_eighth_of_its_steps_the_fashion_mnist_classifier_is_right_in_85_of_100_test_images(
    fmnist_images: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To its end it takes minutes; docs/performance.md has the accuracy after other numbers of steps."""
    monkeypatch.setattr(classifier, "MAX_STEPS", classifier.MAX_STEPS // 8)
    made = classifier_of("fmnist", fmnist_images, tmp_path)
    wrong = errors(made, fmnist_images.test)
    assert wrong <= 0.15 * 10_000
    assert made.accuracy == pytest.approx(1 - wrong / 10_000, abs=3e-4)  # batches of other sizes round


@pytest.mark.slow
def test_training_again_gives_the_same_file_whatever_was_drawn_before_and_on_however_many_threads(
    digits_classifier: Extractor, cache: Path, tmp_path: Path
) -> None:
    (first,) = cache.glob("classifier/digits-*.safetensors")
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)  # noqa: NPY002
    before = generators()
    try:
        classifier_of("digits", digits.load(), tmp_path)
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
    assert generators() == before
    (second,) = tmp_path.glob("classifier/digits-*.safetensors")
    assert second.name == first.name
    assert second.read_bytes() == first.read_bytes()


def generators() -> tuple[bytes, object, bytes]:
    """The states of the global random generators."""
    numpy = np.random.get_state()[1].tobytes()  # noqa: NPY002
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), numpy


def test_the_features_of_an_image_do_not_depend_on_its_batch(digits_classifier: Extractor) -> None:
    pixels = digits.load().test.pixels
    alone, together = digits_classifier(pixels[:5]), digits_classifier(pixels)
    assert together.values.shape == (360, 64)
    assert together.logits.shape == (360, 10)
    assert torch.allclose(alone.values, together.values[:5], atol=1e-5)


def test_other_images_or_labels_are_another_classifier(tmp_path: Path, quick: None) -> None:
    whole = digits.load()
    fewer = Dataset(whole.train.first(200), whole.test, whole.classes)
    shuffled = Images(whole.train.pixels, whole.train.labels[::-1].copy())
    made = [
        classifier_of("digits", data, tmp_path).sha256
        for data in (whole, fewer, Dataset(shuffled, whole.test, whole.classes), whole)
    ]
    assert len(set(made)) == 3
    assert made[0] == made[3]
    assert len(list(tmp_path.glob("classifier/*.safetensors"))) == 3


DAMAGE = {"empty": b"", "truncated": None, "something else": b"GIF89a" * 100}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("kind", ["classifier", "reference"])
def test_a_damaged_file_of_the_cache_is_made_anew(
    quick: None, tmp_path: Path, kind: str, damage: str
) -> None:
    def look() -> Reference:
        return make_reference(data.test.pixels, classifier_of("digits", data, tmp_path), str(tmp_path))

    whole = digits.load()
    data = Dataset(whole.train.first(150), whole.test, whole.classes)
    first = look()
    (file,) = tmp_path.glob(f"{kind}/*.safetensors")
    content = file.read_bytes()
    file.unlink()  # what was read from it stays mapped
    file.write_bytes(content[:-1] if DAMAGE[damage] is None else DAMAGE[damage])
    again = look()
    assert file.read_bytes() == content
    assert torch.equal(again.features.values, first.features.values)


@pytest.mark.slow
def test_of_eight_cells_on_an_empty_cache_one_trains_and_one_extracts(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = multiprocessing.get_context("fork")
    start, train, save = context.Barrier(8), classifier.train, reference.save_file

    def logged(work: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: object) -> None:
            with (tmp_path / "made").open("a") as file:
                file.write(f"{work.__name__}\n")
            work(*arguments)

        return call

    def work(seed: int) -> None:
        start.wait(timeout=60)
        few = ["rounds=0", "evaluation.samples=65", "evaluation.steps=1", "evaluation.grid=0"]
        sys.exit(invoke(*few, "logger=none", f"seed={seed}", f"output={tmp_path / 'runs'}"))

    monkeypatch.setattr(classifier, "train", logged(train))
    monkeypatch.setattr(reference, "save_file", logged(save))
    monkeypatch.setenv("FEDLIGHT_CACHE", str(tmp_path / "cache"))
    processes = [context.Process(target=work, args=(seed,)) for seed in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
    assert [process.exitcode for process in processes] == [0] * 8
    assert (tmp_path / "made").read_text().split() == ["train", "save_file"]
    fids = [json.loads(path.read_text())["fid"] for path in tmp_path.glob("runs/default/*/result.json")]
    assert len({fid["value"] for fid in fids}) == 8
    assert len({fid["extractor_sha256"] for fid in fids}) == 1


# ---- Inception


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random weights in torch-fidelity's layout, which keep the size of a signal."""
    folder = tmp_path_factory.mktemp("inception")
    torch.save({}, folder / "nothing.pth")

    class Unloaded(FeatureExtractorInceptionV3):
        def load_state_dict(self, *arguments: object, **options: object) -> None:
            """Keeps what it has."""

    torch.manual_seed(0)
    network = Unloaded("unloaded", ["2048"], feature_extractor_weights_path=folder / "nothing.pth")
    for parameter in network.parameters():
        if parameter.ndim == 4:
            nn.init.kaiming_normal_(parameter)
    torch.save(network.state_dict(), folder / "random.pth")
    return folder / "random.pth"


@pytest.mark.slow
def test_inception_sees_grey_fashion_as_torch_fidelity_does(
    inception_weights: Path, fmnist_images: Dataset
) -> None:
    pixels = fmnist_images.test.pixels[:6]
    seen, theirs = (
        make_pretrained("inception", inception_weights, CPU)(pixels),
        direct(inception_weights, pixels),
    )
    assert torch.equal(seen.values, theirs[0])
    assert torch.equal(seen.logits, theirs[1])
    assert seen.values.std(dim=0).mean() > 0.01  # images differ


@pytest.mark.slow
def test_inception_sees_colour_as_torch_fidelity_does_and_scores_come_out(inception_weights: Path) -> None:
    pixels = torch.randint(256, (24, 3, 64, 64), generator=torch.Generator().manual_seed(0)).byte()
    pixels[12:] //= 2
    made = make_pretrained("inception", inception_weights, CPU)
    bright, dark = made(pixels[:12]), made(pixels[12:])
    assert torch.equal(bright.values, direct(inception_weights, pixels[:12])[0])
    assert (made.name, made.accuracy, bright.values.shape) == ("inception", None, (12, 2048))
    metrics = score(bright, Reference(dark, Moments.of(dark.values)))
    mean, spread = bright.values.mean(dim=0) - dark.values.mean(dim=0), bright.values.std(dim=0)
    assert metrics["fid"] > float(mean.square().sum()) > float(spread.square().sum())
    assert 1 <= metrics["inception_score"] <= 1008
    assert (metrics["precision"], metrics["recall"]) == (0, 0)


def direct(path: Path, pixels: Tensor) -> tuple[Tensor, ...]:
    """Features and logits from torch-fidelity itself, of RGB images."""
    network = create_feature_extractor(
        "inception-v3-compat",
        ["2048", "logits_unbiased"],
        cuda=False,
        feature_extractor_weights_path=path,
        verbose=False,
    )
    with torch.no_grad():
        return network(pixels if pixels.shape[1] == 3 else pixels.repeat(1, 3, 1, 1))


@pytest.mark.slow
def test_a_cell_is_scored_by_inception_with_weights_given_by_path(
    cell: Callable[..., Cell], inception_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FeatureExtractorInceptionV3, "INPUT_IMAGE_SIZE", 75)  # 16 times as fast
    layers = ["64", "logits_unbiased"]
    monkeypatch.setitem(extractor.NETWORKS, "inception", Network("inception-v3-compat", layers))
    monkeypatch.setitem(extractor.DIMENSIONS, "inception", 64)
    overrides = ["rounds=0", "evaluation.extractor=inception", "evaluation.samples=65"]
    moved = tmp_path / "moved.pth"
    moved.write_bytes(inception_weights.read_bytes())
    first, second = (
        cell(*overrides, f"evaluation.weights={path}").result for path in (inception_weights, moved)
    )
    assert first["fid"] == second["fid"]
    assert first["cell"] == second["cell"]
    fid = first["fid"]
    assert (fid["extractor"], fid["extractor_accuracy"], fid["scope"]) == ("inception", None, "global")
    assert fid["extractor_sha256"] == hashlib.sha256(moved.read_bytes()).hexdigest()
    assert fid["value"] > 0


class Trap:
    """Leaves a file behind where a pickle of it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [False, True])
def test_weights_that_would_run_code_are_refused_and_run_none(tmp_path: Path, legacy: bool) -> None:
    file = tmp_path / "weights.pth"
    torch.save({"fc.bias": Trap(tmp_path / "ran")}, file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(BadInput, match=r"^evaluation\.weights: .*weights\.pth does not hold .*[^\n]+$"):
        make_pretrained("inception", file, CPU)
    assert not (tmp_path / "ran").exists()
    torch.load(file, weights_only=False)
    assert (tmp_path / "ran").exists()  # it was a trap


@pytest.mark.parametrize("content", [b"", b"GIF89a" * 100, {"fc.bias": torch.zeros(1008)}, [1, 2]])
def test_weights_of_another_kind_are_rejected_in_one_line(tmp_path: Path, content: object) -> None:
    file = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(
        BadInput, match=r"weights\.pth does not hold the weights of .*inception-v3"
    ) as message:
        make_pretrained("inception", file, CPU)
    assert "\n" not in str(message.value)
    assert "weights_only" not in str(message.value)  # torch's advice to load it in spite of what it holds


def test_weights_are_found_by_path_then_in_the_cache_then_in_torch_hub_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    empty = "weights.pth"
    own, cached, hub = (tmp_path / name for name in ("own.pth", empty, f"torch/hub/checkpoints/{empty}"))
    publish(monkeypatch, Published(empty, "https://nowhere.invalid", hashlib.sha256(b"").hexdigest()))
    hub.parent.mkdir(parents=True)
    for place, given in ((hub, None), (cached, None), (own, str(own))):
        place.touch()
        assert weights.find_weights("inception", given, str(tmp_path)) == place


def test_weights_are_downloaded_to_the_cache_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(b"the weights", tmp_path, monkeypatch, hashlib.sha256(b"the weights").hexdigest())
    for _ in range(2):
        path = weights.find_weights("inception", None, str(tmp_path / "cache"))
        assert path.read_bytes() == b"the weights"
        assert path.parent == tmp_path / "cache"
        (tmp_path / "server").joinpath(FILE).unlink(missing_ok=True)


@pytest.mark.parametrize("where", ["cache", "torch/hub/checkpoints"])
def test_a_truncated_download_is_removed_and_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    whole = b"the weights"
    serve(whole, tmp_path, monkeypatch, hashlib.sha256(whole).hexdigest())
    (tmp_path / where).mkdir(parents=True)
    (tmp_path / where / FILE).write_bytes(whole[:5])
    assert weights.find_weights("inception", None, str(tmp_path / "cache")).read_bytes() == whole
    assert (tmp_path / "cache" / FILE).read_bytes() == whole


def test_a_download_that_breaks_off_is_tried_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, tries = b"the weights", []
    serve(whole[:5], tmp_path, monkeypatch, hashlib.sha256(whole).hexdigest())

    def flaky(request: Any) -> Any:
        tries.append(1)
        if len(tries) == 4:
            (tmp_path / "server" / FILE).write_bytes(whole)
        return urlopen(request)

    monkeypatch.setattr("torch.hub.urlopen", flaky)
    with pytest.raises(BadInput, match=r"could not be downloaded \(invalid hash value [^\n]+$"):
        weights.find_weights("inception", None, str(tmp_path / "cache"))
    assert len(tries) == 2
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".lock"}
    assert weights.find_weights("inception", None, str(tmp_path / "cache")).read_bytes() == whole
    assert len(tries) == 4


@pytest.mark.parametrize("sized", [True, False])
def test_a_download_reports_the_bytes_so_far(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sized: bool
) -> None:
    reported = Event()

    class Watched(io.StringIO):
        def write(self, text: str) -> int:
            if re.search(r"downloading the weights of inception: [1-9][\d,]+ bytes so far", text):
                reported.set()
            return super().write(text)

    class Handler(SimpleHTTPRequestHandler):
        def send_header(self, keyword: str, value: str) -> None:
            if sized or keyword != "Content-Length":  # not every server sends it
                super().send_header(keyword, value)

        def copyfile(self, source: Any, outputfile: Any) -> None:
            outputfile.write(source.read(2**20))
            assert reported.wait(timeout=60)
            super().copyfile(source, outputfile)

    monkeypatch.setattr(progress, "EVERY", 0.01)
    monkeypatch.setattr(sys, "stderr", Watched())
    content = random.Random(0).randbytes(int(1.5 * 2**20))
    serve(content, tmp_path, monkeypatch, hashlib.sha256(content).hexdigest())
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path / "server")) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{FILE}"
        publish(monkeypatch, weights.PUBLISHED["inception"]._replace(url=url))
        assert weights.find_weights("inception", None, str(tmp_path / "cache")).read_bytes() == content
        server.shutdown()
    assert f"fedlight: downloading {url}\n" in sys.stderr.getvalue()
    assert reported.is_set()


def test_the_published_weights_are_those_that_torch_fidelity_downloads() -> None:
    from torch_fidelity import feature_extractor_clip, feature_extractor_inceptionv3

    inception, clip = weights.PUBLISHED["inception"], weights.PUBLISHED["clip"]
    assert inception.url == feature_extractor_inceptionv3.URL_INCEPTION_V3
    assert inception.url.endswith(f"/{inception.file}")
    assert Path(inception.file).stem.endswith(f"-{inception.sha256[:8]}")
    assert clip.url == feature_extractor_clip.MODEL_URLS["clip-vit-b-32"]
    assert clip.sha256 == feature_extractor_clip.MODEL_METADATA["clip-vit-b-32"]["hash"]
    assert clip.file == f"clip-vit-b-32-{clip.sha256}.pt"
    for published in weights.PUBLISHED.values():
        assert re.fullmatch("[0-9a-f]{64}", published.sha256)


def serve(content: bytes, folder: Path, monkeypatch: pytest.MonkeyPatch, sha256: str) -> None:
    """Offers a file for download as Inception's weights, with a published SHA-256."""
    monkeypatch.setenv("TORCH_HOME", str(folder / "torch"))
    (folder / "server").mkdir()
    (folder / "server" / FILE).write_bytes(content)
    publish(monkeypatch, Published(FILE, (folder / "server" / FILE).as_uri(), sha256))


def publish(monkeypatch: pytest.MonkeyPatch, published: Published) -> None:
    monkeypatch.setitem(weights.PUBLISHED, "inception", published)
