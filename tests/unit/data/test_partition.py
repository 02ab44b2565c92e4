"""Partitions: the counts of published runs, and the invariants of every partition."""

from collections.abc import Callable

import numpy as np
import pytest
from conftest import Cell

from fedlight.data import partition

PUBLISHED = {
    "iid": """
        1141 1219 1258 1135 1195 1193 1236 1261 1148 1214
        1228 1182 1183 1199 1213 1261 1177 1190 1225 1142
        1198 1182 1220 1180 1213 1160 1232 1204 1219 1192
        1234 1208 1168 1230 1174 1190 1165 1187 1200 1244
        1199 1209 1171 1256 1205 1196 1190 1158 1208 1208""",
    "label_skew": """
        4888 1316 378 936 146 1177 96 2944 1565 0
        1 259 225 244 2378 72 44 919 728 3043
        243 121 2622 4584 1010 2481 3 1293 0 0
        2 3979 1959 149 0 2265 5484 0 0 0
        866 325 816 87 2466 5 373 844 3707 2957""",
    "quantity_skew": """
        52 58 59 41 45 54 50 59 51 60
        0 1 1 2 1 3 0 1 3 1
        4605 4598 4624 4558 4612 4610 4644 4648 4600 4588
        1191 1177 1169 1244 1206 1182 1165 1163 1216 1185
        152 166 147 155 136 151 141 129 130 166""",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_partitions_of_fashion_mnist_come_out(
    fmnist: None, command: Callable[..., int], tmp_path, name: str
) -> None:
    arguments = ("data=fmnist", "rounds=0", "clients=5", "logger=none")
    arguments += ("evaluation.grid=0", "evaluation.samples=0")
    assert command(f"partition={name}", *arguments) == 0
    (path,) = tmp_path.glob("runs/default/*/result.json")
    counts = [int(row["count"]) for row in Cell(path.parent).rows("partition.csv")]
    assert counts == [int(count) for count in PUBLISHED[name].split()]
    assert (path.parent / "partition.png").stat().st_size > 5000


@pytest.fixture
def labels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 10, 5000)


PARTITIONS = {
    "iid": lambda labels, clients: partition.iid(labels, clients, 1),
    "quantity_skew": lambda labels, clients: partition.quantity_skew(labels, clients, 1, beta=0.5),
    "label_skew": lambda labels, clients: partition.label_skew(labels, clients, 1, beta=0.5),
    "shards": lambda labels, clients: partition.shards(labels, clients, 1, classes=5),
}


@pytest.mark.parametrize("clients", [2, 7, 10])
@pytest.mark.parametrize("assign", PARTITIONS.values(), ids=PARTITIONS)
def test_every_image_has_exactly_one_owner(labels: np.ndarray, assign: Callable, clients: int) -> None:
    parts = assign(labels, clients)
    assert len(parts) == clients
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(5000))


@pytest.mark.parametrize("name", ["quantity_skew", "label_skew"])
def test_every_client_of_a_skewed_partition_holds_its_minimum(labels: np.ndarray, name: str) -> None:
    for clients in (5, 10, 20):
        assert min(map(len, PARTITIONS[name](labels, clients))) >= 10


@pytest.mark.parametrize(("clients", "classes"), [(5, 2), (10, 3), (100, 1), (7, 4)])
def test_every_client_of_shards_holds_the_same_number_of_classes(
    labels: np.ndarray, clients: int, classes: int
) -> None:
    parts = partition.shards(labels, clients, 1, classes)
    assert {len(np.unique(labels[part])) for part in parts} == {classes}


def test_a_smaller_beta_skews_more(labels: np.ndarray) -> None:
    def largest_share(beta: float) -> float:
        parts = partition.label_skew(labels, 5, 1, beta)
        counts = np.stack([np.bincount(labels[part], minlength=10) for part in parts])
        return float((counts.max(axis=0) / counts.sum(axis=0)).mean())

    assert largest_share(0.1) > largest_share(1.0) > largest_share(100.0)
