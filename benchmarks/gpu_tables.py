"""The tables and figures of `gpu.py`, from the JSON files of its units and the folders of its cells."""

import csv
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from common import ROOT
from gpu import FUSED, METHODS, SAMPLING, STEPS, result_path

from fedlight.reporting import numbers
from fedlight.reporting.comparison import make_comparisons
from fedlight.reporting.figures import quality_exchange
from fedlight.runs.identity import read_result
from fedlight.runs.status import DONE, FAILED, SweepCell, read_sweep
from fedlight.runtime.files import atomic

SWEEPS = ("paper_iid", "paper_skew")  # folders of the grid's cells
PARTITIONS = ("iid", "label_skew", "quantity_skew")
NOT_YET = "not measured yet"
Row = dict[str, Any]


def read(folder: Path, name: str) -> dict[str, Any]:
    """The result of a unit; empty where it is not done."""
    path = result_path(folder, name)
    return (
        json.loads(path.read_text(encoding="utf-8"))
        if path.exists()
        else {"rows": [{"not available": NOT_YET}]}
    )


def rows(folder: Path, name: str, key: str) -> list[Row]:
    """The rows of a unit that have this column."""
    return [row for row in read(folder, name)["rows"] if key in row]


def cells_of(folder: Path) -> list[SweepCell]:
    """The cells of the grid, the most informative ones first."""
    found = [cell for sweep in SWEEPS if (folder / sweep).is_dir() for cell in read_sweep(folder / sweep)]

    def place(cell: SweepCell) -> tuple[int, bool, int, int]:
        config = cell.files.config
        clients = config["clients"]
        partition, method = (
            PARTITIONS.index(config["partition.name"]),
            METHODS.split(",").index(config["method.name"]),
        )
        return partition, clients != 5, clients, method

    return sorted(found, key=place)


def done_cells(folder: Path) -> list[Path]:
    """The folders of the cells that are done."""
    return [cell.files.folder for cell in cells_of(folder) if cell.state == DONE]


def table(title: str, note: str, columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    head = [
        f"## {title}",
        "",
        note,
        "",
        f"| {' | '.join(columns)} |",
        "|---" + "|---:" * (len(columns) - 1) + "|",
    ]
    return "\n".join([*head, *(f"| {' | '.join(line)} |" for line in lines), ""])


def lines(
    folder: Path, names: Sequence[str], columns: int, text: Callable[[str, Row], list[str]]
) -> list[list[str]]:
    """The lines of some units; a unit without a result gives the reason."""
    made = []
    for name in names:
        for row in read(folder, name)["rows"]:
            reason = row.get("not available")
            made.append(text(name, row) if reason is None else [name, reason, *[""] * (columns - 2)])
    return made


def limit(folder: Path, kind: str, what: str) -> float | None:
    """Minimum seconds per image of a step, or of a forward pass, by the larger limit."""
    found = read(folder, "limits")
    if "speeds" not in found:
        return None
    speeds = found["speeds"]
    operations, traffic = found["costs"][kind][what]
    speed = speeds.get("TF32", speeds["fp32"]) if kind == "fp32" else speeds[kind]
    return max(operations / speed, traffic / found["copy"]) / found["batch"]


def share(folder: Path, name: str, what: str, images_per_second: float, passes: int = 1) -> str:
    """The share of the larger limit that was reached."""
    least = limit(folder, name.rpartition(" ")[2], what)
    return "" if least is None else f"{least * passes * images_per_second:.0%}"


def tests_table(folder: Path) -> str:
    made = lines(folder, ["tests"], 3, lambda _, row: [row["test"], row["result"], f"{row['seconds']:.1f}"])
    return table("Tests", "`pytest -m gpu`", ["test", "result", "seconds"], made)


def limits_table(folder: Path) -> str:
    def text(_: str, row: Row) -> list[str]:
        unit = "TFLOP/s" if "TFLOP/s" in row else "GB/s"
        return [row["limit"], f"{row[unit]:.3g} {unit}"]

    note = "Large square matrices; a copy of a large tensor, read and written."
    return table("Limits", note, ["", "measured"], lines(folder, ["limits"], 2, text))


def steps_table(folder: Path) -> str:
    plain = next((row["seconds"] for row in rows(folder, "step plain fp32", "step")), None)

    def text(_: str, row: Row) -> list[str]:
        name, seconds = row["step"], row["seconds"]
        return [
            name,
            f"{1e3 * seconds:.2f}",
            f"{plain / seconds:.2f}x" if plain else "",
            f"{row['images/s']:,.0f}",
            share(folder, name, "step", row["images/s"]),
            f"{row['loss']:.5f}",
            f"{row['first']:.1f}",
        ]

    columns = ["", "ms", "against plain", "images/s", "of the larger limit", "loss of the first step"]
    columns.append("s to it, compilation included")
    note = (
        "Forward, backward and Adam. The limits are the step's floating-point operations over the speed of "
        "the matrix product (fp32: TF32 on a GPU, in which its convolutions multiply), and what its "
        "operations read and write, each by itself, over that of the copy; a compiled step may beat the "
        "latter, since it joins operations."
    )
    return table("Training step", note, columns, lines(folder, [f"step {name}" for name in STEPS], 7, text))


def at_once_table(folder: Path, names: Sequence[str]) -> str:
    alone = next((row["images/s"] for row in rows(folder, "at once 1", "processes")), None)

    def text(_: str, row: Row) -> list[str]:
        return [
            f"{row['processes']}, {'with' if row['MPS'] else 'without'} MPS",
            f"{row['images/s']:,.0f}",
            f"{row['images/s'] / alone:.2f}x" if alone else "",
            share(folder, "bf16", "step", row["images/s"]),
        ]

    units = [name for name in names if name.startswith("at once")]
    columns = ["processes", "images/s of all", "against one", "of the larger limit"]
    note = "Eager steps in bf16, a model in each process, all on one device."
    return table("Several clients at once", note, columns, lines(folder, units, 4, text))


def fused_table(folder: Path, names: Sequence[str]) -> str:
    alone = next((row["clients/s"] for row in rows(folder, "fused clients 1", "fused")), None)

    def text(_: str, row: Row) -> list[str]:
        return [
            f"{row['fused']}: {row['clients']} of {row['images']} images",
            f"{1e3 * row['seconds']:.2f}",
            f"{row['clients/s']:,.0f}",
            f"{row['clients/s'] / alone:.2f}x" if alone else "",
            f"{row['loss']:.5f}",
        ]

    units = [name for name in names if name.rpartition(" ")[0] in FUSED]
    note = (
        "Forward, backward and Adam of small clients in one computation (`trainer.fuse`), in fp32; the "
        "random numbers are drawn outside of the graph."
    )
    columns = ["", "ms", "steps of a client per second", "against one eager client", "mean loss"]
    return table("Many small clients at once", note, columns, lines(folder, units, 5, text))


def sampling_table(folder: Path) -> str:
    def text(_: str, row: Row) -> list[str]:
        reached = share(folder, row["sampling"], "forward", row["images/s"], row["steps"])
        return [
            f"{row['sampling']}, {row['sampler']}, {row['steps']} steps",
            f"{row['images/s']:,.0f}",
            reached,
        ]

    names = [f"sampling {name}" for name in SAMPLING]
    note = "The cells sample in fp32."
    return table("Sampling", note, ["", "images/s", "of the larger limit"], lines(folder, names, 3, text))


def cell_rows(folder: Path) -> list[Row]:
    """The values that must be equal in all runs: settings, scores, fingerprints of models."""
    made = []
    for cell in cells_of(folder):
        config, result = cell.files.config, read_result(cell.files.folder) or {}
        done = cell.state == DONE
        inception = rows(folder, f"inception {cell.cell}", "fid")
        models = json.dumps([result.get("state_sha256"), result.get("client_sha256")])
        row = {
            "partition": config["partition.name"],
            "clients": config["clients"],
            "method": config["method.name"],
            "state": cell.state,
            "fid": result["fid"]["value"] if done else None,
            "fid_inception": inception[0]["fid"] if inception else None,
            "params": result["exchange"]["params_total"] if done else None,
            "models": hashlib.sha256(models.encode()).hexdigest()[:16] if done else None,
        }
        made.append(row)
    return made


def cells_table(folder: Path) -> str:
    seconds = {
        cell.cell: (read_result(cell.files.folder) or {}).get("seconds", {}) for cell in cells_of(folder)
    }

    def number(value: float | None, text: Callable[[float], str]) -> str:
        return numbers.NONE if value is None else text(value)

    made = [
        [
            f"{row['partition']}, {row['clients']} clients, {row['method']}",
            row["state"],
            number(row["fid"], numbers.score),
            number(row["fid_inception"], numbers.score),
            number(row["params"], numbers.count),
            number(taken.get("total"), numbers.seconds),
            row["models"] or "",
        ]
        for row, taken in zip(cell_rows(folder), seconds.values(), strict=True)
    ]
    failed = [name for name in ("inception", *_parts(folder)) if rows(folder, name, "not available")]
    reasons = [f"{name}: {read(folder, name)['rows'][0]['not available']}." for name in failed]
    asked = next(
        (found["settings"] for name in _parts(folder) if "settings" in (found := read(folder, name))), []
    )
    command = f"`python -m fedlight.run -m {' '.join(asked)}`, and on." if asked else ""
    columns = ["cell", "state", "FID", "FID, Inception", "parameters exchanged", "time", "models"]
    return table("The paper's grid", " ".join([command, *reasons]).strip(), columns, made)


def _parts(folder: Path) -> list[str]:
    return [path.stem for path in sorted((folder / "results").glob("grid-*.json"))]


def write_tables(folder: Path, device: str | None, names: Sequence[str]) -> int:
    """Writes `tables.md`, `cells.csv`, the figures and, for a GPU, docs/gpu.md; counts failures."""
    folder.mkdir(parents=True, exist_ok=True)
    machine = next((found["machine"] for name in names if "machine" in (found := read(folder, name))), {})
    kept = {name: value for name, value in machine.items() if value is not None}
    where = ", ".join(f"{name} {value}" for name, value in kept.items())
    head = (
        f"# Measured on {device}\n\nWritten by `make gpu`; {where}.\n"
        if device
        else f"# A small run on a CPU: it shows that all parts work, and says nothing of a GPU\n\n{where}.\n"
    )
    figures = write_figures(folder)
    parts = [tests_table(folder), limits_table(folder), steps_table(folder), at_once_table(folder, names)]
    parts += [fused_table(folder, names), sampling_table(folder), cells_table(folder)]

    def page(images: str) -> str:
        return "\n".join(
            [head, *parts, *(f"![Quality against exchange]({images}{path.name})" for path in figures), ""]
        )

    with atomic(folder / "tables.md") as temporary:
        temporary.write_text(page(""), encoding="utf-8")
    if cells := cell_rows(folder):
        with (
            atomic(folder / "cells.csv") as temporary,
            temporary.open("w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.DictWriter(file, cells[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(cells)
    if device:
        for path in figures:
            shutil.copyfile(path, ROOT / "docs" / "images" / path.name)
        with atomic(ROOT / "docs" / "gpu.md") as temporary:
            temporary.write_text(page("images/"), encoding="utf-8")
    tests = [row for row in rows(folder, "tests", "result") if row["result"] != "passed"]
    return len(tests) + sum(row["state"] == FAILED for row in cells)


def write_figures(folder: Path) -> list[Path]:
    """Quality against exchange of the cells that are done."""
    cells = [cell for cell in cells_of(folder) if cell.state == DONE]
    made = []
    for comparison in make_comparisons(cells):
        plot = quality_exchange(comparison, "gpu_")
        if not plot.data.empty:
            plot.write(folder)
            made.append(folder / f"{plot.name}.png")
    return made
