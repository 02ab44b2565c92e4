"""What is exchanged: the ledger against FedDiffuse's arithmetic, from real runs."""

from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import combinations, product
from pathlib import Path

import pytest
import torch
from conftest import SLICE_PREFIXES, SMALL, Cell, invoke
from PIL import Image

from fedlight.federation.cohort import assign_tasks, cohort_size, draw_cohort
from fedlight.federation.method import Method, Split

MakeCell = Callable[..., Cell]
SLICES = ("encoder", "bottleneck", "decoder")
N, ENCODER, BOTTLENECK, DECODER = 2_996_315, 1_280_642, 999_376, 716_297


def crossed(cell: Cell, direction: str) -> dict[tuple[int, int], dict[str, int]]:
    """(round, client) -> slice -> parameters, from the ledger."""
    table: dict[tuple[int, int], dict[str, int]] = defaultdict(dict)
    for row in cell.rows("ledger.csv"):
        if row["direction"] == direction:
            table[int(row["round"]), int(row["client"])][row["slice"]] = int(row["params"])
    return dict(table)


def exchanged(method: str, rounds: int, clients: int, sizes: dict[str, int]) -> int:
    """Parameters that a method sends both ways, for an even number of clients that all take part, by hand."""
    model = sum(sizes.values())
    federated = {"UDEC": ("decoder",), "ULATDEC": ("bottleneck", "decoder")}
    if method in federated:  # the whole model down once, then and up the federated slices
        visit = sum(sizes[name] for name in federated[method])
        return clients * (model + (2 * rounds - 1) * visit)
    up = {"FULL": clients * model, "USPLIT": clients // 2 * model}  # a pair sends one model
    return rounds * (clients * model + up[method])


PAPER = {"encoder": ENCODER, "bottleneck": BOTTLENECK, "decoder": DECODER}
ROUNDS, CLIENTS = 3, 4  # of the cells that train the paper's UNet


@pytest.mark.parametrize(
    ("method", "total", "reduction"),
    [
        ("FULL", 898_894_500, 0.0),
        ("USPLIT", 674_170_875, 0.250),
        ("UDEC", 237_689_280, 0.736),
        ("ULATDEC", 527_508_320, 0.413),
    ],
)
def test_the_arithmetic_gives_the_paper_s_totals(method: str, total: int, reduction: float) -> None:
    assert exchanged(method, 15, 10, PAPER) == total
    assert 1 - total / exchanged("FULL", 15, 10, PAPER) == pytest.approx(reduction, abs=5e-4)


@pytest.fixture(scope="module")
def paper_cells(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Cell]:
    """Few rounds and clients with the paper's UNet, by method; digits, one a client, since they are small."""
    folder = tmp_path_factory.mktemp("paper")
    arguments = [
        "-m",
        "experiment=paper",
        "data=digits",
        "model.unet.dim=28",
        "method=FULL,USPLIT,UDEC,ULATDEC",
        f"rounds={ROUNDS}",
        f"clients={CLIENTS}",
        "epochs=1",
        f"data.limit={CLIENTS}",
        "trainer.threads=1",
        "evaluation.grid=0",
        "evaluation.samples=0",
        "logger=none",
        f"output={folder}",
    ]
    assert invoke(*arguments) == 0
    cells = [Cell(path.parent) for path in folder.glob("paper/*/result.json")]
    return {cell.result["method"]: cell for cell in cells}


def assert_counts(cell: Cell, total: int, full: int) -> None:
    """A cell's result, ledger and rounds all come to the same totals."""
    exchange = cell.result["exchange"]
    assert exchange["params_total"] == total
    assert exchange["params_down"] + exchange["params_up"] == total
    assert exchange["bytes_total"] == 4 * total
    assert exchange["params_full"] == full
    assert exchange["reduction"] == pytest.approx(1 - total / full)
    assert sum(int(row["params"]) for row in cell.rows("ledger.csv")) == total
    rounds = cell.rows("rounds.csv")
    assert len(rounds) == cell.result["rounds"]
    assert int(rounds[-1]["params_cumulative"]) == total
    assert sum(int(row["params_down"]) + int(row["params_up"]) for row in rounds) == total


@pytest.mark.slow
@pytest.mark.parametrize("method", ["FULL", "USPLIT", "UDEC", "ULATDEC"])
def test_the_paper_s_unet_exchanges_what_the_arithmetic_says(
    paper_cells: dict[str, Cell], method: str
) -> None:
    full = exchanged("FULL", ROUNDS, CLIENTS, PAPER)
    assert_counts(paper_cells[method], exchanged(method, ROUNDS, CLIENTS, PAPER), full)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "models"), [("LOCAL", 3), ("CENTRAL", 0)])
def test_local_exchanges_the_first_model_and_central_nothing(
    cell: MakeCell, method: str, models: int
) -> None:
    result = cell(f"method={method}", "clients=3").result
    full = 2 * 2 * 3 * result["model_params"]
    exchange = result["exchange"]
    assert exchange["params_total"] == exchange["params_down"] == models * result["model_params"]
    assert (exchange["params_up"], exchange["params_full"]) == (0, full)
    assert exchange["reduction"] == pytest.approx(1 - exchange["params_total"] / full)


@pytest.mark.slow
def test_the_paper_s_unet_has_the_paper_s_parameters(paper_cells: dict[str, Cell]) -> None:
    result = paper_cells["FULL"].result
    assert result["model_params"] == N
    assert result["slices"] == PAPER


@pytest.mark.slow
def test_the_paper_s_unet_at_64_pixels_in_colour_has_the_paper_s_parameters(
    cell: MakeCell, tmp_path: Path
) -> None:
    faces = tmp_path / "faces"
    faces.mkdir()
    for number in range(10):
        Image.effect_noise((64, 64), 50 + number).convert("RGB").save(faces / f"{number}.png")
    data = ("data=image_folder", f"data.root={faces}", f"data.cache={tmp_path}", "data.image_size=64")
    result = cell(*data, "model=paper", "rounds=0", "evaluation.grid=0", "clients=2").result
    assert result["model_params"] == 14_892_477
    assert result["slices"] == {"encoder": 6_339_770, "bottleneck": 5_012_224, "decoder": 3_540_483}


@pytest.mark.slow
def test_only_the_decoder_comes_down_after_first_contact_in_udec(cell: MakeCell) -> None:
    """The paper's 10 clients, with a small network; from the second round on all rounds are alike."""
    made = cell("method=UDEC", "rounds=5", "clients=10", "data.limit=10")
    sizes = made.result["slices"]
    full = exchanged("FULL", 5, 10, sizes)
    assert_counts(made, exchanged("UDEC", 5, 10, sizes), full)
    decoder = {"decoder": sizes["decoder"]}
    visits = [(round_, client) for round_ in range(1, 6) for client in range(10)]
    down, up = (crossed(made, direction) for direction in ("down", "up"))
    assert down == {(round_, client): sizes if round_ == 1 else decoder for round_, client in visits}
    assert up == dict.fromkeys(visits, decoder)


def test_first_contact_is_once_a_client_whenever_it_comes(cell: MakeCell) -> None:
    made = cell("method=UDEC", "clients=8", "fraction=0.25", "rounds=6")
    met = set()
    for (_, client), slices in sorted(crossed(made, "down").items()):
        assert set(slices) == ({"decoder"} if client in met else set(SLICES))
        met.add(client)
    assert 2 < len(met) < 12  # of twelve visits: some come first in a later round, some come again


def test_a_warm_start_exchanges_everything_and_once_more_with_a_client_that_missed_its_end(
    cell: MakeCell,
) -> None:
    made = cell("method=UDEC", "+method.warm_start=2", "clients=6", "fraction=0.34", "rounds=7")
    last: dict[int, int] = {}
    kinds = set()
    for (round_, client), slices in sorted(crossed(made, "down").items()):
        whole = last.get(client, 0) <= 2
        assert set(slices) == (set(SLICES) if whole else {"decoder"})
        kinds.add((whole, round_ > 3, client in last))
        last[client] = round_
    assert {(True, True, True), (False, True, True)} <= kinds  # met in the warm start only; met after it
    for (round_, _), slices in crossed(made, "up").items():
        assert set(slices) == (set(SLICES) if round_ <= 2 else {"decoder"})


@pytest.mark.parametrize(
    "clients", [2, pytest.param(5, marks=pytest.mark.slow), pytest.param(6, marks=pytest.mark.slow)]
)
def test_usplit_deals_one_encoder_and_one_decoder_to_each_pair(cell: MakeCell, clients: int) -> None:
    made = cell("method=USPLIT", f"clients={clients}", "rounds=4")
    reports = crossed(made, "up")
    for round_ in range(1, 5):
        of_round = [set(reports[round_, client]) for client in range(clients)]
        counts = Counter(slice_ for slices in of_round for slice_ in slices)
        pairs = clients // 2
        assert counts["bottleneck"] == pairs + clients % 2
        assert counts["encoder"] + counts["decoder"] == clients
        assert min(counts["encoder"], counts["decoder"]) == pairs
        assert all(len(slices & {"encoder", "decoder"}) == 1 for slices in of_round)
    assert [set(slices) for slices in crossed(made, "down").values()] == [set(SLICES)] * 4 * clients


def test_a_single_participant_reports_everything(cell: MakeCell) -> None:
    made = cell("method=USPLIT", "clients=5", "fraction=0.2")
    assert [set(slices) for slices in crossed(made, "up").values()] == [set(SLICES)] * 2


def test_usplit_is_dealt_fairly() -> None:
    split = Split(either=("encoder", "decoder"), coin="bottleneck")
    usplit = Method(name="USPLIT", downlink="all", uplink="all", split=split, evaluate="global").resolve(
        SLICES
    )
    dealt = Counter(
        tuple(task.uplink for task in assign_tasks(usplit, 7, round_, [4, 5, 6], dropout=0.0))
        for round_ in range(2400)
    )
    expected: Counter[tuple[tuple[str, ...], ...]] = Counter()
    for alone, of_alone, of_first, coin in product(range(3), split.either, split.either, range(2)):
        of_second = "decoder" if of_first == "encoder" else "encoder"
        pair = [(of_first, "bottleneck"), (of_second,)] if coin else [(of_first,), (of_second, "bottleneck")]
        pair.insert(alone, (of_alone, "bottleneck"))
        expected[tuple(pair)] += 100
    assert dealt == pytest.approx(expected, abs=4 * 100**0.5)


def test_participants_are_drawn_uniformly_without_replacement() -> None:
    drawn = Counter(tuple(draw_cohort(3, round_, clients=5, fraction=0.4)) for round_ in range(2000))
    expected = dict.fromkeys(combinations(range(5), 2), 200)  # sorted, each pair as often as any other
    assert drawn == pytest.approx(expected, abs=4 * 200**0.5)
    assert draw_cohort(3, 1, clients=5, fraction=1.0) == [0, 1, 2, 3, 4]
    for fraction, size in ((0.01, 1), (0.24, 2), (0.26, 3), (0.99, 10)):
        assert len(draw_cohort(3, 1, clients=10, fraction=fraction)) == cohort_size(10, fraction) == size


@pytest.mark.slow
def test_participants_are_the_same_whatever_the_method(cell: MakeCell) -> None:
    drawn = [
        set(crossed(cell(f"method={method}", "clients=6", "fraction=0.5"), "down"))
        for method in ("FULL", "USPLIT", "UDEC")
    ]
    assert drawn[0] == drawn[1] == drawn[2]
    assert len(drawn[0]) == 2 * 3


def test_a_participant_that_drops_out_is_served_but_never_reports(cell: MakeCell) -> None:
    made = cell("method=UDEC", "clients=6", "rounds=5", "federation.dropout=0.5")
    down, up = crossed(made, "down"), crossed(made, "up")
    assert len(down) == 30
    assert 0 < len(up) < 30
    assert set(up) < set(down)
    assert all(set(slices) == {"decoder"} for (round_, _), slices in down.items() if round_ > 1)
    whole = sum(down[1, 0].values())
    assert made.result["exchange"]["params_full"] == whole * (len(down) + len(up))
    for row in made.rows("rounds.csv"):
        assert int(row["reports"]) == sum(round_ == int(row["round"]) for round_, _ in up)


@pytest.mark.slow
def test_a_round_in_which_nobody_reports_changes_nothing(cell: MakeCell) -> None:
    untrained, lost = cell("rounds=0"), cell("federation.dropout=1.0")
    assert lost.result["state_sha256"] == untrained.result["state_sha256"]
    assert lost.result["exchange"]["params_up"] == 0
    assert [row["train_loss"] for row in lost.rows("rounds.csv")] == ["", ""]


def test_a_slice_that_nobody_reported_keeps_its_value_while_others_move(cell: MakeCell) -> None:
    for seed in range(20):
        made = cell("method=USPLIT", "clients=2", "rounds=1", "federation.dropout=0.5", f"seed={seed}")
        reported = {slice_ for slices in crossed(made, "up").values() for slice_ in slices}
        if 0 < len(reported) < 3:
            break
    untrained, trained = cell("rounds=0", f"seed={seed}").model, made.model
    assert 0 < len(reported) < 3
    for slice_, owned in SLICE_PREFIXES.items():
        names = [name for name in untrained if name.split(".")[0] in owned]
        moved = [name for name in names if not torch.equal(untrained[name], trained[name])]
        assert bool(moved) == (slice_ in reported)


def test_zero_rounds_count_nothing_and_write_everything(cell: MakeCell) -> None:
    made = cell("rounds=0", "evaluation.grid=4")
    assert made.result["status"] == "completed"
    assert made.result["exchange"]["params_total"] == 0
    assert made.rows("rounds.csv") == made.rows("ledger.csv") == []
    assert (made.folder / "samples" / "round_000.png").stat().st_size > 1000


@pytest.mark.slow
def test_an_average_that_stays_home_is_not_counted_and_one_that_travels_is(cell: MakeCell) -> None:
    plain, home, travels = (
        cell("method=ULATDEC", "clients=2", *extra).result
        for extra in ([], ["model.ema_decay=0.9"], ["model.ema_decay=0.9", "model.exchange_ema=true"])
    )
    assert home["exchange"] == plain["exchange"]
    assert home["state_sha256"] == plain["state_sha256"]
    assert travels["model_params"] == 2 * plain["model_params"] + 1
    assert travels["slices"]["decoder"] == 2 * plain["slices"]["decoder"]


@pytest.mark.slow
def test_methods_do_not_depend_on_the_backbone(cell: MakeCell) -> None:
    made = cell("model=unet2d", "method=ULATDEC", "clients=2")
    n = made.result["slices"]
    federated = n["bottleneck"] + n["decoder"]
    assert made.result["exchange"]["params_total"] == 2 * (sum(n.values()) + 3 * federated)


def test_a_method_is_five_lines_of_yaml(command: Callable[..., int], tmp_path: Path) -> None:
    folder = tmp_path / "mine" / "method"
    folder.mkdir(parents=True)
    (folder / "UENC.yaml").write_text(
        "name: UENC\ndownlink: [encoder]\nuplink: [encoder]\nsplit: null\nevaluate: clients\n"
    )
    assert command("--config-dir", "mine", *SMALL, "method=UENC", "clients=2") == 0
    (path,) = tmp_path.glob("runs/default/UENC-*/result.json")
    assert {slice_ for slices in crossed(Cell(path.parent), "up").values() for slice_ in slices} == {
        "encoder"
    }
