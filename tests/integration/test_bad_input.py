"""Bad input: one clear line, status 2, nothing written."""

import gzip
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from forkserver import warm_python
from PIL import Image

from fedlight.data.fmnist import DEBIAN

Command = Callable[..., int]

CASES = {
    "no clients": (["clients=0"], "clients: input should be greater than or equal to 1, got 0"),
    "clients below nothing": (["clients=-3"], "clients: .* greater than or equal to 1, got -3"),
    "no evaluated client": (
        ["evaluation.clients=none"],
        "evaluation.clients must be 'all' or an integer of at least 1; got 'none'$",
    ),
    "half a client": (["clients=2.5"], "clients: .* valid integer, got 2.5"),
    "clients in words": (["clients=many"], "clients: .* valid integer, got 'many'"),
    "more clients than images": (["clients=1438"], "clients must be at most 1437"),
    "misspelled key": (["trainer.thread=2"], "trainer.thread is not a key .* did you mean trainer.threads"),
    "misspelled key of a group": (["methd=FULL"], "methd is not a key .* did you mean method"),
    "key left out of the configuration": (
        ["method.keep_optimizer=true"],
        r"method.keep_optimizer has no value .* \+\+method.keep_optimizer=\.\.\. sets it",
    ),
    "unknown key of a section": (
        ["evaluation.foo=1"],
        "evaluation.foo is not a key of the configuration; evaluation has background, bootstrap, cache,",
    ),
    "key of a group that is not chosen": (
        ["early_stopping.patience=3"],
        "early_stopping is not chosen, .* early_stopping=NAME chooses it",
    ),
    "resampling of no images": (["evaluation.bootstrap=200", "evaluation.samples=0"], "=0 scores none"),
    "logger that is a number": (
        ["logger=none", "logger._target_=3"],
        "logger: the _target_ of logger must be the name of a class or function, got ",
    ),
    "search without -m": (["hydra/sweeper=optuna"], "is a search of several cells: add -m"),
    "key of a search in a grid": (
        ["-m", "hydra.sweeper.n_trials=3", "epochs=1,2"],
        "n_trials is not a key .*; hydra/sweeper=optuna, a search, ",
    ),
    "processes in words": (
        ["-m", "epochs=1,2", "hydra/launcher=local", "hydra.launcher.n_jobs=x"],
        "hydra.launcher.n_jobs must be null or a number of processes, got 'x'",
    ),
    "misspelled new key": (["+dta.limit=1"], "dta is not a key .* did you mean data"),
    "grid without -m": (["sweeps=demo"], "sweeps=demo is a grid .* add -m .* method=... clients=..."),
    "part of a grid without -m": (["sweeps=demo", "method=FULL"], "or choose one by clients=..."),
    "folder of a sweep": (
        ["-m", "hydra.sweep.dir=x", "clients=2"],
        "hydra.sweep.dir cannot .* set output or",
    ),
    "no epoch": (["epochs=0"], "epochs: .* greater than or equal to 1"),
    "rounds below nothing": (["rounds=-1"], "rounds: .* greater than or equal to 0"),
    "nobody takes part": (["fraction=0"], "fraction: .* greater than 0"),
    "more than all take part": (["fraction=1.5"], "fraction: .* less than or equal to 1, got 1.5"),
    "unknown method": (
        ["method=FULLL"],
        "method/FULLL.*CENTRAL FULL LOCAL UDEC UDEC_WARM ULATDEC ULATDEC_WARM USPLIT",
    ),
    "unknown data": (["data=mnist"], "data/mnist.*digits"),
    "unknown partition": (["partition=zipf"], "partition/zipf.*label_skew"),
    "unknown slice": (
        ["method.uplink=[head]"],
        "unknown slice head; the model has encoder, bottleneck, decoder",
    ),
    "slice named twice": (
        ["method.uplink=[decoder,decoder]"],
        "uplink names a slice twice: decoder, decoder",
    ),
    "backbone of other channels": (
        ["model=unet2d", "model.unet.out_channels=3"],
        r"predicts \(3, 8, 8\) of torch.float32 for images of \(1, 8, 8\)",
    ),
    "backbone that cannot be saved": (
        ["model.unet._target_=torch.nn.Identity"],
        "must be a diffusers model .ModelMixin., got Identity",
    ),
    "accelerator that is not there": (["trainer.accelerator=tpu"], "torch_xla|TPU"),
    **{
        f"trainer argument of the federation: {argument}": (
            [f"+trainer.{argument}"],
            rf"trainer\.{argument.partition('=')[0]} cannot be set: .* limit_train_batches, max_steps$",
        )
        for argument in (
            "devices=2",
            "num_nodes=2",
            "strategy=ddp",
            "max_epochs=9",
            "max_time=00:00:01",
            "fast_dev_run=true",
            "callbacks=[]",
            "logger=true",
            "profiler=simple",
            "default_root_dir=x",
        )
    },
    "no step at all": (["+trainer.max_steps=0"], "trainer.max_steps must be .* at least 1, got 0"),
    "gradients of no batch": (
        ["+trainer.accumulate_grad_batches=0"],
        "trainer.accumulate_grad_batches must be .* at least 1, got 0",
    ),
    "no batches": (
        ["+trainer.limit_train_batches=0"],
        "limit_train_batches must be a share above 0 .* got 0",
    ),
    "less than a batch": (
        ["+trainer.limit_train_batches=0.1", "data.limit=300"],  # 60 images a client, 4 batches of 16
        "limit_train_batches=0.1 leaves no batch to a client that has 4 an epoch: it must be at least 0.25$",
    ),
    "correcting scaled gradients": (
        ["trainer.precision=16-mixed", "algorithm=scaffold"],
        "algorithm in 16-mixed precision .* add optimizer.fused=false",
    ),
    "clipping a fused optimizer": (
        ["trainer.precision=bf16-mixed", "trainer.gradient_clip_val=1.0"],
        "add optimizer.fused=false",
    ),
    "beta of null": (
        ["partition=label_skew", "partition.beta=null"],
        "partition.beta must be a number above 0, got null",
    ),
    "quantities of a beta of null": (
        ["partition=quantity_skew", "partition.beta=null"],
        "partition.beta must be a number above 0, got null",
    ),
    "shards of null": (
        ["partition=shards", "partition.classes=null"],
        "partition.classes must be a whole number, got null",
    ),
    "infinite learning rate": (["optimizer.lr=inf"], "optimizer.lr: .* finite"),
    "other prediction": (
        ["+model.schedule.prediction_type=sample"],
        "prediction_type epsilon or v_prediction",
    ),
    "weights of no signal": (["model.snr_gamma=0"], "model.snr_gamma: .* greater than 0, got 0"),
    "warm-up below nothing": (
        ["optimizer.warmup=-1"],
        "optimizer.warmup: .* greater than or equal to 0, got -1",
    ),
    "unknown decay": (["optimizer.decay=line"], "optimizer.decay: input should be 'cosine', got 'line'"),
    "labels without a chance": (
        ["model.conditional=true", "model.label_dropout=1"],
        "model.label_dropout: .* less than 1, got 1",
    ),
    "labels of no slice": (
        ["model.conditional=true", "model.label_slice=head"],
        "model.label_slice must be one of encoder, bottleneck, decoder, got head",
    ),
    "guidance below nothing": (
        ["evaluation.guidance=-1"],
        "evaluation.guidance: .* greater than or equal to 0, got -1",
    ),
    "a bootstrap of one draw": (
        ["evaluation.bootstrap=1"],
        "evaluation.bootstrap: .* greater than or equal to 2, got 1",
    ),
    "guidance without labels": (
        ["evaluation.guidance=2"],
        "evaluation.guidance=2.0 needs model.conditional=true",
    ),
    "decay of one": (["model.ema_decay=1.0"], "model.ema_decay: .* less than 1, got 1.0"),
    "exchange of no average": (
        ["model.exchange_ema=true"],
        "model.exchange_ema=true exchanges a moving average, and there is none: set model.ema_decay",
    ),
    "no block": (["model.unet.blocks=0"], "must be at least 1, got 0"),
    "name that is a parent": (["name=.."], "name: .* match pattern"),
    "no partition": (["~partition"], "^fedlight: error: partition: field required$"),
    "unknown judge": (["method.evaluate=nobody"], "method.evaluate: input should be 'global' or 'clients'"),
    "method without a name": (["~method.name"], "method.name: field required"),
    "slice map misses a parameter": (["model.slices.decoder=[ups]"], "parameter unet.head.* in no slice"),
    "slice map doubles a parameter": (
        ["model.slices.decoder=[ups,head,mid]"],
        "parameter unet.mid.* in slices bottleneck and decoder",
    ),
    "empty slice": (["+model.slices.extra=[tail]"], "slice extra has no parameter"),
    "data root that does not exist": (
        ["data=fmnist", "data.root=/no/such/folder"],
        "no file .* in /no/such/folder",
    ),
    "partition too skewed": (
        ["partition=quantity_skew", "clients=120"],
        "none of 1000 draws .* fewer clients or a partition.beta above 0.5",
    ),
    "partition without its minimum": (
        ["partition=quantity_skew", "clients=144"],
        "clients must be at most 143",
    ),
    "beta of nothing": (["partition=label_skew", "partition.beta=0"], "partition.beta: .* greater than 0"),
    "too few classes a client": (
        ["partition=shards", "partition.classes=1"],
        "partition.classes must be .* 2 to 10",
    ),
    "image that cannot be halved": (["model.unet.dim_mults=[1,2,4,8,16]"], "must be a multiple of 16, got 8"),
    "image size of another data set": (["data.image_size=16"], "digits holds images of"),
    "odd width": (["model.unet.dim=7"], "even number of at least 4, got 7"),
    "batch of nothing": (["data.batch_size=0"], "data.batch_size: .* greater than or equal to 1"),
    "limit of nothing": (["data.limit=0"], "data.limit: .* greater than or equal to 1"),
    "unknown loss": (["model.loss=l7"], "model.loss must be one of huber, mse, got l7"),
    "learning rate below nothing": (["optimizer.lr=-1"], "optimizer.lr: .* greater than 0"),
    "unknown optimizer argument": (["+optimizer.warp=9"], "Adam.* unexpected keyword argument 'warp'"),
    "unknown trainer argument": (["+trainer.warp=9"], "trainer.warp cannot be set: .* limit_train_batches"),
    "unknown precision": (["trainer.precision=7"], "trainer.precision: .* '32-true', 'bf16-mixed' .* got 7"),
    "unknown accelerator": (["trainer.accelerator=abacus"], "invalid accelerator name.*abacus"),
    "unknown sampler": (["evaluation.sampler=dice"], "must be one of ddpm, ddim, dpm-solver"),
    "more steps than the schedule": (["evaluation.steps=1001"], "must be at most 1000"),
    "unknown extractor": (
        ["evaluation.extractor=vgg16"],
        "evaluation.extractor: .* 'classifier', 'inception', 'dinov2' or 'clip', got 'vgg16'",
    ),
    "unknown reference": (["evaluation.reference=all"], "evaluation.reference: .* 'test' or 'train'"),
    "no client judged": (["evaluation.clients=0"], "evaluation.clients must be 'all' or an integer .* got 0"),
    "scores every no round": (["evaluation.every=0"], "evaluation.every: .* greater than or equal to 1"),
    "fewer images than features": (
        ["evaluation.samples=64"],
        "evaluation.samples must be more than 64, the number of features of the classifier .* got 64",
    ),
    "fewer images than features of inception": (
        ["evaluation.extractor=inception"],
        "evaluation.samples must be more than 2048, the number of features of the inception .* got 500",
    ),
    "fewer images than features of dinov2": (
        ["evaluation.extractor=dinov2"],
        "evaluation.samples must be more than 1024, the number of features of the dinov2 .* got 500",
    ),
    "fewer images than features of clip": (
        ["evaluation.extractor=clip"],
        "evaluation.samples must be more than 512, the number of features of the clip .* got 500",
    ),
    "downstream accuracy without labels": (
        ["evaluation.downstream=true"],
        "evaluation.downstream=true .* needs model.conditional=true",
    ),
    "downstream accuracy without images": (
        ["evaluation.downstream=true", "model.conditional=true", "evaluation.samples=0"],
        "evaluation.downstream=true .* evaluation.samples=0 scores none: set evaluation.samples",
    ),
    "downstream accuracy as a word": (
        ["evaluation.downstream=often"],
        "evaluation.downstream: .* boolean.*got 'often'",
    ),
    "evaluation in a corner": (["evaluation.background=2"], "evaluation.background: .* boolean.*got 2"),
    "fewer real images than features": (
        ["data.limit=64", "evaluation.reference=train"],
        "evaluation.reference=train: 64 images are too few, it takes more than 64",
    ),
    "fewer real images than features of inception": (
        ["evaluation.extractor=inception", "evaluation.samples=2049"],
        "evaluation.reference=test: 360 images are too few, it takes more than 2048",
    ),
    "dropout above one": (["federation.dropout=1.1"], "federation.dropout: .* less than or equal to 1"),
    "seed below nothing": (["seed=-1"], "seed: .* greater than or equal to 0"),
    "name that is a path": (["name=../up"], "name: .* match pattern"),
    "typo in a key": (["client=5"], "client is not a key .*; did you mean clients"),
    "typo in a nested key": (["optimizer.rate=5"], "optimizer.rate is not a key of the configuration"),
    "unknown key added": (["+colour=red"], "colour is not a key of the configuration"),
    "values of a grid without -m": (["clients=2,5"], "add --multirun"),
    "no syntax at all": (["clients=[2"], "input .\\[2"),
}


def assert_refused(status: int, stderr: str, folder: Path, message: str) -> None:
    lines = stderr.strip().splitlines()
    assert status == 2, stderr
    assert len(lines) == 1, stderr
    assert re.search(message, lines[0]), lines[0]
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(("arguments", "message"), CASES.values(), ids=CASES)
def test_bad_input_is_refused_in_one_line(
    command: Command, tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    status = command(*arguments)
    assert_refused(status, capfd.readouterr().err, tmp_path, message)


def test_bad_input_is_refused_as_a_user_types_it(tmp_path: Path) -> None:
    typed = [warm_python(), "-m", "fedlight.run", "clients=0"]
    done = subprocess.run(typed, cwd=tmp_path, capture_output=True, text=True)
    assert_refused(done.returncode, done.stderr, tmp_path, "clients: .* got 0")


@pytest.mark.parametrize(
    ("model", "size", "message"),
    [
        ("paper", 27, "error: data.image_size: .* multiple of 4, got 27: choose 24 or 28$"),
        ("paper", 3, "error: data.image_size: .* multiple of 4, got 3: choose 4$"),
        ("unet2d", 27, "model.unet diffusers.UNet2DModel, .* another data.image_size than 27$"),
    ],
)
def test_an_image_size_that_does_not_fit_the_backbone_is_named_by_its_key(
    command: Command, tmp_path: Path, capfd: pytest.CaptureFixture[str], model: str, size: int, message: str
) -> None:
    for number in range(8):
        path = tmp_path / "images" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((size, size), 30 * number, np.uint8)).save(path)
    data = ["data=image_folder", "data.root=images", "data.channels=1", f"data.image_size={size}"]
    assert command(*data, f"model={model}", "clients=1", "evaluation.samples=0") == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert re.search(message, line), line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("content", "refused"),
    [
        ("rounds: 1\n", True),
        ("\ufeff# @package _global_\nrounds: 1\n", True),
        ("# @package _global_\nrounds: 0\n", False),
    ],
    ids=["no package", "byte-order mark", "as it should be"],
)
def test_an_experiment_of_ones_own_without_its_first_line_is_refused_with_that_line(
    command: Command, tmp_path: Path, capfd: pytest.CaptureFixture[str], content: str, refused: bool
) -> None:
    (tmp_path / "my" / "experiment").mkdir(parents=True)
    (tmp_path / "my" / "experiment" / "mine.yaml").write_text(content, encoding="utf-8")
    few = ["evaluation.samples=0", "evaluation.grid=0", "logger=none", "data.limit=40", "clients=2"]
    assert command("--config-dir", "my", "experiment=mine", *few) == (2 if refused else 0)
    error = capfd.readouterr().err
    assert ("experiment: the file of experiment=NAME" in error) == refused
    assert ("`# @package _global_`, without a byte-order mark" in error) == refused


def test_an_output_folder_that_cannot_be_written_is_refused(
    command: Command, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").write_text("a file, no folder")
    assert command("output=taken", "evaluation.samples=0") == 2
    assert re.fullmatch(r"fedlight: error: output: cannot write to taken.*\n", capfd.readouterr().err)
    assert (tmp_path / "taken").read_text() == "a file, no folder"


INCEPTION = ["data=fmnist", "evaluation.extractor=inception", "evaluation.samples=2049"]


def test_missing_weights_are_told_with_how_to_get_them(
    fmnist: None,
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # where nobody answers: no internet
    status = command(*INCEPTION)
    start, _, error = capfd.readouterr().err.partition("\n")
    assert start.startswith("fedlight: downloading https://")
    assert_refused(
        status,
        error,
        tmp_path,
        "could not be downloaded .* fedlight.prepare evaluation.extractor=inception .* or fetch https://.* "
        "and set evaluation.weights=FILE",
    )
    status = command(*INCEPTION, "evaluation.weights=/no/such.pth")
    assert_refused(status, capfd.readouterr().err, tmp_path, "evaluation.weights: no file /no/such.pth")


def write_images(folder: Path, count: int, side: int) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        Image.new("L", (side, side), number % 256).save(folder / f"{number}.png")


@pytest.mark.parametrize(
    ("classes", "side", "message"),
    [
        (["all"], 8, "needs labels, and all images of the data set are of one class"),
        (["a", "b"], 4, "needs images of at least 8x8, got 4x4"),
    ],
)
def test_images_that_the_classifier_cannot_learn_from_are_refused(
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    classes: list[str],
    side: int,
    message: str,
) -> None:
    for name in classes:
        write_images(tmp_path / "images" / name, 400 // len(classes), side)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    shape = ["data.channels=1", f"data.image_size={side}"]
    status = command("data=image_folder", "data.root=../images", *shape)
    assert_refused(status, capfd.readouterr().err, tmp_path / "work", message)


@pytest.mark.parametrize("damage", ["truncated", "not an IDX file", "missing"])
def test_a_damaged_data_file_is_named(
    fmnist: None, command: Command, tmp_path: Path, capfd: pytest.CaptureFixture[str], damage: str
) -> None:
    root = tmp_path / "root"
    shutil.copytree(DEBIAN, root)
    file = root / "train-labels-idx1-ubyte.gz"
    content = file.read_bytes()
    file.unlink()
    if damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "not an IDX file":
        file.write_bytes(gzip.compress(b"GIF89a" * 100))
    assert command("data=fmnist", f"data.root={root}", "model=paper") == 2
    error = capfd.readouterr().err
    assert re.fullmatch(r"fedlight: error: data.root: .*train-labels-idx1-ubyte.*\n", error), error
    assert [path.name for path in tmp_path.iterdir()] == ["root"]


def test_a_sweep_is_refused_as_a_whole_with_every_bad_cell_named(
    command: Command, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    asked = ["-m", "clients=2,0,1438", "method=FULL,FULLL", "rounds=0", "logger=none", "evaluation.samples=0"]
    assert command(*asked) == 2
    found = re.findall(r"\[([^]]*)\] ([^;]*)", capfd.readouterr().err)
    messages = dict(found)
    assert messages.keys() == {
        *(f"clients={clients} method=FULL" for clients in (0, 1438)),
        *(f"clients={clients} method=FULLL" for clients in (2, 0, 1438)),
    }
    assert "got 0" in messages["clients=0 method=FULL"]
    assert "at most 1437" in messages["clients=1438 method=FULL"]
    assert "method/FULLL" in messages["clients=2 method=FULLL"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", ["clients=0,-1", "method=FULL,FULLL"])
def test_a_sweep_of_nothing_but_bad_cells_leaves_no_folder(
    command: Command, tmp_path: Path, bad: str
) -> None:
    assert command("-m", bad, "epochs=0") == 2
    assert list(tmp_path.iterdir()) == []
