"""Which configuration keys change a cell's id."""

from pathlib import Path
from typing import Any

import pytest
from conftest import slow
from hydra import compose, initialize_config_dir
from pretrained import save_pretrained

from fedlight.compose import ROOT, register_resolvers
from fedlight.config import validate
from fedlight.deployment.agreement import read_agreement, write_agreement
from fedlight.runs.identity import PLACES, cell_id, changes_no_result

IDS = {
    "": "FULL-K5-digits-iid-tiny-R4-E8-s2023-fcba4e4b",
    "algorithm=fedadam": "FULL-K5-digits-iid-tiny-R4-E8-s2023-d22e59b9",
    "algorithm=fedavgm": "FULL-K5-digits-iid-tiny-R4-E8-s2023-8680573d",
    "algorithm=fednova": "FULL-K5-digits-iid-tiny-R4-E8-s2023-4ec73ec0",
    "algorithm=fedprox": "FULL-K5-digits-iid-tiny-R4-E8-s2023-862438c0",
    "algorithm=fedyogi": "FULL-K5-digits-iid-tiny-R4-E8-s2023-2f03f46a",
    "algorithm=localadam": "FULL-K5-digits-iid-tiny-R4-E8-s2023-e291a984",
    "algorithm=scaffold": "FULL-K5-digits-iid-tiny-R4-E8-s2023-dec4d145",
    "data=celeba": "FULL-K5-celeba-iid-tiny-R4-E8-s2023-7d1fdb5f",
    "data=cifar10": "FULL-K5-cifar10-iid-tiny-R4-E8-s2023-d78fdb78",
    "data=fmnist": "FULL-K5-fmnist-iid-tiny-R4-E8-s2023-6b75dce2",
    "method=CENTRAL": "CENTRAL-K5-digits-iid-tiny-R4-E8-s2023-4a57c15c",
    "method=LOCAL": "LOCAL-K5-digits-iid-tiny-R4-E8-s2023-5849ddb8",
    "method=UDEC": "UDEC-K5-digits-iid-tiny-R4-E8-s2023-6fdd5703",
    "method=UDEC_WARM": "UDEC_WARM-K5-digits-iid-tiny-R4-E8-s2023-82097d79",
    "method=ULATDEC": "ULATDEC-K5-digits-iid-tiny-R4-E8-s2023-39979195",
    "method=ULATDEC_WARM": "ULATDEC_WARM-K5-digits-iid-tiny-R4-E8-s2023-7b6ef474",
    "method=USPLIT": "USPLIT-K5-digits-iid-tiny-R4-E8-s2023-3feb0115",
    "model=paper": "FULL-K5-digits-iid-paper-R4-E8-s2023-b820a900",
    "model=unet2d": "FULL-K5-digits-iid-unet2d-R4-E8-s2023-c9f8287a",
    "partition=label_skew": "FULL-K5-digits-label_skew-tiny-R4-E8-s2023-2b1b40a9",
    "partition=quantity_skew": "FULL-K5-digits-quantity_skew-tiny-R4-E8-s2023-22bf0842",
    "partition=shards partition.classes=2": "FULL-K5-digits-shards-tiny-R4-E8-s2023-7966e1ed",
    "privacy=client": "FULL-K5-digits-iid-tiny-R4-E8-s2023-ff6132d0",
    "privacy=example": "FULL-K5-digits-iid-tiny-R4-E8-s2023-68d73afa",
    "transform=best": "FULL-K5-digits-iid-tiny-R4-E8-s2023-1f24d62d",
    "transform=int2": "FULL-K5-digits-iid-tiny-R4-E8-s2023-ac0907f3",
    "transform=int4": "FULL-K5-digits-iid-tiny-R4-E8-s2023-3c92a5c9",
    "transform=int4_huffman": "FULL-K5-digits-iid-tiny-R4-E8-s2023-59dd6129",
    "transform=int8": "FULL-K5-digits-iid-tiny-R4-E8-s2023-0080ac60",
    "transform=lowrank": "FULL-K5-digits-iid-tiny-R4-E8-s2023-261b5127",
    "transform=none": "FULL-K5-digits-iid-tiny-R4-E8-s2023-fcba4e4b",
    "transform=sign": "FULL-K5-digits-iid-tiny-R4-E8-s2023-4ed42c86",
    "transform=stc": "FULL-K5-digits-iid-tiny-R4-E8-s2023-6bc58359",
    "transform=topk": "FULL-K5-digits-iid-tiny-R4-E8-s2023-c29d2834",
    "transport=dask": "FULL-K5-digits-iid-tiny-R4-E8-s2023-fcba4e4b",
    "transport=flower": "FULL-K5-digits-iid-tiny-R4-E8-s2023-fcba4e4b",
    "transport=inline": "FULL-K5-digits-iid-tiny-R4-E8-s2023-fcba4e4b",
    "transport=processes": "FULL-K5-digits-iid-tiny-R4-E8-s2023-fcba4e4b",
    "experiment=better": "FULL-K5-digits-iid-tiny-R4-E8-s2023-df1e3f38",
    "experiment=clothes": "FULL-K5-fmnist-iid-paper-R20-E1-s2023-68484ece",
    "experiment=demo": "FULL-K5-digits-iid-tiny-R4-E8-s2023-fcba4e4b",
    "experiment=near_central": "FULL-K5-digits-iid-tiny-R128-E1-s2023-218eac20",
    "experiment=paper": "FULL-K5-fmnist-iid-paper-R15-E5-s2023-8c03f9a6",
    "evaluation.extractor=inception trainer.workers=3": "FULL-K5-digits-iid-tiny-R4-E8-s2023-daa77bad",
    "transport=dask transport.workers=7 logger=csv": "FULL-K5-digits-iid-tiny-R4-E8-s2023-fcba4e4b",
    "optimizer.decay=cosine clients=10 seed=7": "FULL-K10-digits-iid-tiny-R4-E8-s7-481e2311",
    "+trainer.limit_train_batches=0.25": "FULL-K5-digits-iid-tiny-R4-E8-s2023-f6f4880b",
    "privacy=client privacy.target_epsilon=3 rounds=2": "FULL-K5-digits-iid-tiny-R2-E8-s2023-856b1348",
    "model.conditional=true evaluation.guidance=3.0": "FULL-K5-digits-iid-tiny-R4-E8-s2023-15a114f1",
}
"""Overrides of shipped configurations: the id that their cells had before neutral keys were full names."""

MACHINE = ("FEDLIGHT_INCEPTION", "FEDLIGHT_WORKERS", "FEDLIGHT_CELEBA", "FEDLIGHT_CIFAR10")


@pytest.fixture
def no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in MACHINE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FEDLIGHT_FMNIST", "/nowhere")


def plain(*overrides: str) -> dict[str, Any]:
    register_resolvers()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return validate(compose("config", overrides=list(overrides))).plain()


@pytest.mark.parametrize("overrides", [*list(IDS)[::8], *slow(*(o for n, o in enumerate(IDS) if n % 8))])
def test_cells_of_shipped_configurations_keep_their_ids(
    no_settings_of_this_machine: None, overrides: str
) -> None:
    assert cell_id(plain(*overrides.split())) == IDS[overrides]


def test_paths_and_workers_do_not_change_the_id(no_settings_of_this_machine: None, tmp_path: Path) -> None:
    places = ["data.root=/nowhere", f"data.cache={tmp_path}", f"evaluation.cache={tmp_path}"]
    moved = plain("data=cifar10", *places, "evaluation.weights=/nowhere", "trainer.workers=7")
    assert cell_id(moved) == IDS["data=cifar10"]
    assert moved["data"]["source"]["root"] == "/nowhere"
    assert all(
        changes_no_result(key) for key in (*PLACES, "trainer.workers", "transport.workers", "logger.x")
    )


@pytest.mark.parametrize("name", ["weights", "root", "cache", "workers"])
def test_an_argument_with_the_name_of_a_neutral_key_changes_the_id(name: str) -> None:
    config = plain("algorithm=fedprox", "partition=label_skew", "transform=topk")
    before = cell_id(config)
    for node in (
        config["algorithm"],
        config["optimizer"],
        config["model"]["unet"],
        config["partition"]["deal"],
        config["transform"]["up"][0],
        config["data"]["source"].setdefault("options", {}),
    ):
        node[name] = [1, 9]
        one = cell_id(config)
        node[name] = [9, 1]
        assert len({before, one, cell_id(config)}) == 3
        del node[name]
    assert not changes_no_result(f"algorithm.{name}")


def test_an_agreement_replaces_paths_and_no_arguments_of_the_same_name(tmp_path: Path) -> None:
    config = plain("data=cifar10", "data.root=/images", "algorithm=fedprox")
    config["algorithm"]["weights"] = [1, 9]
    path = tmp_path / "cell.yaml"
    write_agreement(path, config)
    assert "/images" not in path.read_text()
    read = read_agreement(path, "/elsewhere")
    assert read["data"]["root"] == read["data"]["source"]["root"] == "/elsewhere"
    assert read["algorithm"]["weights"] == [1, 9]


def test_an_agreement_names_pretrained_weights_by_their_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_pretrained(tmp_path / "of_the_server")
    config = plain("finetuning=full", f"finetuning.pretrained={folder}")
    path = tmp_path / "cell.yaml"
    write_agreement(path, config)
    assert str(folder) not in path.read_text()
    monkeypatch.setenv("FEDLIGHT_PRETRAINED", "/mine")
    read = read_agreement(path, None)
    assert read["finetuning"]["pretrained"] == "/mine"
    assert read["finetuning"]["sha256"] == config["finetuning"]["sha256"]
    assert cell_id(read) == cell_id(config)


def test_an_agreement_cannot_choose_the_folder_of_a_hugging_face_data_set(tmp_path: Path) -> None:
    config = plain("data=huggingface", "data.path=/images/of/the/server")
    assert config["data"]["path"] == "/images/of/the/server"
    path = tmp_path / "cell.yaml"
    write_agreement(path, config)
    assert "/images" not in path.read_text()
    assert read_agreement(path, "/elsewhere")["data"]["path"] == "/elsewhere"
    assert read_agreement(path, None)["data"]["path"] is None
