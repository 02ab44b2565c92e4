"""The figures of a board, one message each."""

from functools import partial

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator

from fedlight.reporting.comparison import Board
from fedlight.reporting.plots import INK, Plot
from fedlight.runs.palette import colours

WIDE = 40  # labels; more are not named at the axis
LONG = 14  # characters of a label at the axis


def plots(board: Board, prefix: str) -> list[Plot]:
    """Every figure for which the board has numbers; names of files begin with `prefix`."""
    made = [
        quality_exchange(board, prefix),
        client_spread(board, prefix),
        budget(board, prefix),
        rounds_curve(board, prefix, "fid", "FID", "FID over rounds"),
        rounds_curve(board, prefix, "train_loss", "training loss", "Training loss over rounds"),
        exchange_curve(board, prefix),
        partitions(board, prefix),
    ]
    return [plot for plot in made if not plot.data.empty]


def quality_exchange(board: Board, prefix: str) -> Plot:
    """The paper's question: how good are the images for what was exchanged?"""
    rows = [
        {
            "panel": _panel(place.setting, place.partition),
            "method": entry.method,
            "clients": place.clients,
            "bytes": entry.mean(lambda result: result.exchange.bytes_total),
            "fid": entry.fid,
            "fid_std": entry.spread[0],
            "fid_std_over": entry.spread[1],
        }
        for place in board.places
        for entry in board.in_place(place)
        if entry.fid is not None
    ]
    return Plot(
        f"{prefix}quality_exchange",
        "Quality against exchange",
        "One curve a method, through its client counts (the number at each point). Lower left is better: "
        "good images for few bytes. Bars: standard deviation over seeds or clients. Dashed: nothing crosses.",
        pd.DataFrame(rows, columns=["panel", "method", "clients", "bytes", "fid", "fid_std", "fid_std_over"]),
        partial(_draw_quality, palette=_palette(board)),
        _palette(board),
    )


def _draw_quality(axis: Axes, rows: pd.DataFrame, palette: dict[str, str]) -> None:
    for method, group in rows.groupby("method", sort=False):
        colour, points = palette[str(method)], group[group["bytes"] > 0].sort_values("clients")
        if points.empty:
            axis.axhline(group["fid"].iloc[0], color=colour, linestyle="--")
            continue
        spread = points["fid_std"].astype(float).fillna(0)
        axis.errorbar(
            points["bytes"], points["fid"], spread, color=colour, marker="o", elinewidth=1, capsize=2
        )
        for x, y, clients in zip(points["bytes"], points["fid"], points["clients"], strict=True):
            axis.annotate(str(clients), (x, y), (4, 4), textcoords="offset points", fontsize=7, color=INK)
    _scale_bytes(axis)
    axis.set_xlabel("exchanged, both ways (bytes)")
    axis.set_ylabel("FID")
    axis.set_ylim(bottom=0)


def budget(board: Board, prefix: str) -> Plot:
    """FID over the bytes so far: what a method is worth when it is stopped early."""
    rows = _history(board, "fid")
    several = rows.groupby(["panel", "method"])["round"].transform("size") > 1
    return Plot(
        f"{prefix}budget",
        "Quality at a budget",
        "FID after each evaluated round over the bytes exchanged so far: of two curves at the same height, "
        "the left one has paid less.",
        rows[several & (rows["bytes_cumulative"] > 0)],
        partial(
            _draw_curves,
            palette=_palette(board),
            x=("bytes_cumulative", "exchanged so far (bytes)"),
            y=("fid", "FID"),
        ),
        _palette(board),
    )


def rounds_curve(board: Board, prefix: str, key: str, label: str, title: str) -> Plot:
    """A quantity of each method over rounds."""
    note = "Mean over seeds; the band is their standard deviation."
    if key == "train_loss":
        note = f"{note} A partial method's loss is that of its clients' own models on their own data."
    draw = partial(_draw_curves, palette=_palette(board), x=("round", "round"), y=(key, label))
    return Plot(f"{prefix}{key}_rounds", title, note, _history(board, key), draw, _palette(board))


def exchange_curve(board: Board, prefix: str) -> Plot:
    """The paper's figure: parameters exchanged so far, over rounds."""
    return Plot(
        f"{prefix}exchange_rounds",
        "Exchange over rounds",
        "Parameters that crossed so far, both ways, all clients. The first contact sends the whole model.",
        _history(board, "params_cumulative"),
        partial(
            _draw_curves,
            palette=_palette(board),
            x=("round", "round"),
            y=("params_cumulative", "parameters exchanged"),
        ),
        _palette(board),
    )


def _history(board: Board, key: str) -> pd.DataFrame:
    """The rounds in which there is a value, with the panel that each row belongs to."""
    history = board.history
    columns = {"place": "panel"}
    rows = history[history[key].notna()].rename(columns=columns)
    order = {place.label: position for position, place in enumerate(board.places)}
    ranks = {method: position for position, method in enumerate(board.methods)}
    if rows.empty:
        return rows
    rows = rows.assign(_place=rows["panel"].map(order), _method=rows["method"].map(ranks))
    rows = rows.sort_values(["_place", "_method", "round"]).drop(columns=["_place", "_method"])
    wanted = ["panel", "method", "round", key, f"{key}_std", "bytes_cumulative"]
    return rows[list(dict.fromkeys(wanted))].reset_index(drop=True)


def _draw_curves(
    axis: Axes, rows: pd.DataFrame, palette: dict[str, str], x: tuple[str, str], y: tuple[str, str]
) -> None:
    (across, x_label), (key, y_label) = x, y
    for method, group in rows.groupby("method", sort=False):
        colour = palette[str(method)]
        marker = "o" if len(group) <= 20 else None
        axis.plot(group[across], group[key], color=colour, marker=marker, markersize=3.5)
        spread = group[f"{key}_std"].astype(float).fillna(0)
        if spread.any():
            low, high = group[key] - spread, group[key] + spread
            axis.fill_between(group[across], low, high, color=colour, alpha=0.2, linewidth=0)
    if across == "round":
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        _scale_bytes(axis)
    if key == "params_cumulative":
        axis.yaxis.set_major_formatter(EngFormatter())
    axis.set_ylim(bottom=0)
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)


def client_spread(board: Board, prefix: str) -> Plot:
    """How far the clients of client-level methods are apart."""
    rows = [
        {
            "panel": _panel(place.setting, place.partition),
            "method": entry.method,
            "clients": place.clients,
            "seed": result.seed,
            "client": client,
            "fid": fid,
        }
        for place in board.places
        for entry in board.in_place(place)
        for result in entry.results
        if result.fid and result.fid.per_client
        for client, fid in zip(
            result.fid.clients or range(len(result.fid.per_client)), result.fid.per_client, strict=True
        )
    ]
    judged = {str(row["method"]) for row in rows}
    palette = {method: colour for method, colour in _palette(board).items() if method in judged}
    return Plot(
        f"{prefix}client_spread",
        "Spread over clients",
        "FID of each client's own model, a dot a client; the line is their mean.",
        pd.DataFrame(rows, columns=["panel", "method", "clients", "seed", "client", "fid"]),
        partial(_draw_spread, palette=palette),
        palette,
    )


def _draw_spread(axis: Axes, rows: pd.DataFrame, palette: dict[str, str]) -> None:
    groups = [(clients, method) for clients in sorted(set(rows["clients"])) for method in palette]
    for position, (clients, method) in enumerate(groups):
        fids = rows[(rows["clients"] == clients) & (rows["method"] == method)]["fid"].to_numpy()
        if not len(fids):
            continue
        aside = np.linspace(-0.25, 0.25, len(fids)) if len(fids) > 1 else np.zeros(1)
        axis.scatter(position + aside, fids, color=palette[method], s=14, alpha=0.8, linewidths=0)
        axis.hlines(fids.mean(), position - 0.35, position + 0.35, color=palette[method], linewidth=2)
    counts = sorted(set(rows["clients"]))
    axis.set_xticks([len(palette) * (i + 0.5) - 0.5 for i in range(len(counts))], [str(n) for n in counts])
    axis.grid(visible=False, axis="x")
    axis.set_xlabel("clients")
    axis.set_ylabel("FID of a client's model")
    axis.set_ylim(bottom=0)


def partitions(board: Board, prefix: str) -> Plot:
    """Which client holds what: images by client and label."""
    frames = []
    for place in board.places:
        records = [r for entry in board.in_place(place) if not entry.everywhere for r in entry.records]
        for record in records:
            try:
                frame = pd.read_csv(record.folder / "partition.csv", dtype={"label": str})
                frames.append(frame[["client", "label", "count"]].assign(panel=place.label))
            except (OSError, ValueError, KeyError):
                continue
            break
    empty = pd.DataFrame(columns=["panel", "client", "label", "count"])
    return Plot(
        f"{prefix}partitions",
        "Partitions",
        "Training images of each client and label, of the first seed.",
        pd.concat(frames)[list(empty.columns)] if frames else empty,
        _draw_partition,
        {},
        below=1.05 if any((frame["label"].str.len() > 2).any() for frame in frames) else 0.5,
    )


def _draw_partition(axis: Axes, rows: pd.DataFrame) -> None:
    labels = list(dict.fromkeys(rows["label"]))
    counts = rows.pivot(index="client", columns="label", values="count")[labels].fillna(0)
    image = axis.imshow(counts.to_numpy(), cmap="cividis", aspect="auto", vmin=0)
    axis.grid(visible=False)
    if len(labels) <= WIDE:
        short = [label if len(label) <= LONG else f"{label[: LONG - 1]}…" for label in labels]
        turned = 90 if max(map(len, labels)) > 2 else 0
        axis.set_xticks(range(len(labels)), short, rotation=turned, fontsize=7)
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("label")
    axis.set_ylabel("client")
    left, bottom, width, height = axis.get_position().bounds
    axis.set_position((left, bottom, 0.9 * width, height))  # the scale's numbers need room on its right
    figure = axis.get_figure(root=True)
    assert figure is not None
    figure.colorbar(image, ax=axis, label="images", ticks=MaxNLocator(5, integer=True))


def _scale_bytes(axis: Axes) -> None:
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(EngFormatter("B"))
    axis.minorticks_off()


def _panel(setting: str, partition: str) -> str:
    return f"{partition}, {setting}" if setting else partition


def _palette(board: Board) -> dict[str, str]:
    return colours(set(board.methods))
