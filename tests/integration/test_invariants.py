"""Bit for bit: what must not change a result does not, and what must does."""

from collections.abc import Callable
from itertools import permutations

import pytest
import torch
from conftest import Cell, Wire, slow

from fedlight.federation import cohort
from fedlight.federation.aggregate import WeightedMean
from fedlight.runtime.errors import BadInput

MakeCell = Callable[..., Cell]


def digest(cell: Cell) -> tuple[object, ...]:
    result = cell.result
    return result["state_sha256"], tuple(result["client_sha256"]), result["train_loss"]


@pytest.mark.parametrize("method", ["USPLIT", *slow("FULL", "UDEC", "ULATDEC", "LOCAL", "CENTRAL")])
def test_the_same_config_gives_the_same_bits(cell: MakeCell, method: str) -> None:
    arguments = (f"method={method}", "clients=3")
    assert digest(cell(*arguments)) == digest(cell(*arguments))


@pytest.mark.parametrize("method", [*slow("USPLIT"), "UDEC"])
def test_the_order_in_which_clients_train_does_not_matter(
    cell: MakeCell, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    arguments = (f"method={method}", "clients=4", "partition=label_skew", "model.ema_decay=0.9")
    forward = cell(*arguments)
    deal = cohort.assign_tasks
    monkeypatch.setattr(cohort, "assign_tasks", lambda *given: deal(*given)[::-1])
    backward = cell(*arguments)
    assert digest(forward) == digest(backward)
    assert forward.rows("ledger.csv") == backward.rows("ledger.csv")


def test_a_client_weighs_as_much_as_it_has_images_though_its_training_was_cut_short(
    cell: MakeCell, wire: Wire
) -> None:
    made = cell("clients=4", "partition=quantity_skew", "rounds=1", "epochs=3", "+trainer.max_steps=1")
    assert len(set(made.sizes)) > 2
    assert [update.num_examples for update in wire.updates] == made.sizes
    for name, merged in made.model.items():
        total = torch.zeros(merged.shape, dtype=torch.float64)
        for update, size in zip(wire.updates, made.sizes, strict=True):
            sent = {n: t for payload in update.payloads.values() for n, t in payload.tensors.items()}
            total += size * sent[f"unet.{name}"].double()
        torch.testing.assert_close(merged.double(), total / sum(made.sizes), rtol=0, atol=1e-7)


def test_usplit_with_one_client_is_full(cell: MakeCell) -> None:
    usplit, full = (cell(f"method={method}", "clients=1") for method in ("USPLIT", "FULL"))
    assert usplit.result["state_sha256"] == full.result["state_sha256"]
    assert usplit.result["exchange"] == full.result["exchange"]


@pytest.mark.slow
def test_full_with_one_client_and_one_round_is_central(cell: MakeCell) -> None:
    full = cell("method=FULL", "clients=1", "rounds=1", "epochs=3")
    central = cell("method=CENTRAL", "clients=1", "rounds=1", "epochs=3")
    assert full.result["state_sha256"] == central.result["state_sha256"]
    assert full.result["train_loss"] == central.result["train_loss"]


@pytest.mark.slow
def test_a_warm_start_is_full(cell: MakeCell) -> None:
    warm = cell("method=USPLIT", "+method.warm_start=2", "clients=3")
    assert warm.result["state_sha256"] == cell("method=FULL", "clients=3").result["state_sha256"]
    assert warm.result["exchange"]["reduction"] == 0


@pytest.mark.slow
def test_central_does_not_depend_on_how_the_data_was_dealt(cell: MakeCell) -> None:
    dealt = [
        cell("method=CENTRAL", f"clients={clients}", f"partition={partition}")
        for clients, partition in ((1, "iid"), (4, "iid"), (3, "label_skew"))
    ]
    assert len({made.result["state_sha256"] for made in dealt}) == 1


@pytest.mark.slow
def test_central_keeps_its_optimizer_and_full_does_not(cell: MakeCell) -> None:
    central, full = (cell(f"method={method}", "clients=1", "rounds=2") for method in ("CENTRAL", "FULL"))
    first = [made.rows("rounds.csv")[0]["train_loss"] for made in (central, full)]
    assert first[0] == first[1]
    assert central.result["state_sha256"] != full.result["state_sha256"]


def test_another_seed_gives_another_result(cell: MakeCell) -> None:
    assert cell("seed=1").result["state_sha256"] != cell("seed=2").result["state_sha256"]


@pytest.mark.slow
def test_the_logger_and_the_output_folder_are_not_part_of_the_cell(cell: MakeCell) -> None:
    here, there = cell("logger=csv"), cell("output=elsewhere/../runs")
    assert here.folder.name == there.folder.name
    assert digest(here) == digest(there)


@pytest.mark.slow
def test_what_changes_the_result_changes_the_cell(cell: MakeCell) -> None:
    changes = ("seed=1", "epochs=2", "optimizer.lr=0.01", "federation.dropout=0.5", "partition.seed=1")
    names = [cell("rounds=0", change).folder.name for change in (*changes, "clients=5")]
    assert len(set(names)) == len(changes) + 1


@pytest.mark.slow
def test_a_number_written_otherwise_is_the_same_cell(cell: MakeCell) -> None:
    assert cell("rounds=0", "fraction=1").folder.name == cell("rounds=0", "fraction=1.0").folder.name


@pytest.mark.parametrize("weights", [(1, 1), (13, 17_952), (7, 11, 59_982), (1,)])
def test_the_mean_of_identical_updates_is_the_update(weights: tuple[int, ...]) -> None:
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(
        -500, 500
    ).div(20)
    update = {"weight": tensor, "half": tensor.clamp(-1, 1).bfloat16(), "counter": torch.tensor(3)}
    mean = WeightedMean()
    for weight in weights:
        mean.add(update, weight)
    found = mean.result()
    for name, value in update.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)


def test_the_mean_is_weighted_by_data_size() -> None:
    mean = WeightedMean()
    mean.add({"a": torch.tensor([1.0, 2.0])}, 1)
    mean.add({"a": torch.tensor([4.0, 8.0]), "b": torch.tensor([7.0])}, 2)
    found = mean.result()
    assert found["a"].tolist() == [3.0, 6.0]
    assert found["b"].tolist() == [7.0]


def test_batchnorm_s_counter_is_the_largest_and_its_statistics_are_means_in_whatever_sequence() -> None:
    def update(batches: int) -> dict[str, torch.Tensor]:
        norm = torch.nn.BatchNorm1d(2, momentum=None)  # a plain mean over the batches
        for _ in range(batches):
            norm(torch.tensor([[0.0, 0.0], [2.0, 2.0]]) + batches)
        return norm.state_dict()

    for sizes in permutations((2, 7, 4)):
        mean = WeightedMean()
        for size in sizes:
            mean.add(update(size), size)
        found = mean.result()
        assert (found["num_batches_tracked"].item(), found["num_batches_tracked"].dtype) == (7, torch.int64)
        expected = sum(size * (1 + size) for size in sizes) / sum(sizes)
        assert found["running_mean"].tolist() == pytest.approx([expected] * 2)


def test_whole_numbers_that_are_no_counter_must_agree() -> None:
    mean, table = WeightedMean(), torch.arange(5)
    for _ in range(2):
        mean.add({"table": table}, 3)
    assert torch.equal(mean.result()["table"], table)
    with pytest.raises(BadInput, match="table has integers that differ between clients"):
        mean.add({"table": table.flip(0)}, 3)
