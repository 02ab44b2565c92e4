"""The figures of a comparison, one message each."""

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator

from fedlight.reporting import leakage, privacy_cost
from fedlight.reporting.comparison import Comparison, in_words
from fedlight.reporting.marks import Marks
from fedlight.reporting.plots import INK, Plot

WIDE = 40  # labels; more are not named at the axis
ALIKE = 0.03  # of their mean, by which curves differ that a reader cannot tell apart
LONG = 14  # characters of a label at the axis
TRANSFORM = "transform.name"  # beside methods it is what decides how many bytes cross
BAND = "Mean over seeds; the band is their standard deviation."


def plots(comparison: Comparison, prefix: str) -> list[Plot]:
    """Every figure for which the comparison has numbers; names of files begin with `prefix`."""
    made = [
        quality_exchange(comparison, prefix),
        client_spread(comparison, prefix),
        budget(comparison, prefix),
        _evaluated_more_than_once(
            rounds_curve(comparison, f"{prefix}fid_rounds", "FID over rounds", BAND, "fid", "FID")
        ),
        _where_methods_differ(
            rounds_curve(
                comparison,
                f"{prefix}train_loss_rounds",
                "Training loss over rounds",
                f"{BAND} A partial method's loss is that of its clients' own models on their own data.",
                "train_loss",
                "training loss",
            ),
            "train_loss",
        ),
        rounds_curve(
            comparison,
            f"{prefix}exchange_rounds",
            "Exchange over rounds",
            "Parameters exchanged so far, both ways, all clients. The first contact sends the whole model.",
            "params_cumulative",
            "parameters exchanged",
        ),
        partitions(comparison, prefix),
        privacy_cost.quality_epsilon(comparison, prefix),
        _finite(
            rounds_curve(
                comparison,
                f"{prefix}epsilon_rounds",
                "Privacy: epsilon over rounds",
                "What was spent so far, of the client that spent most. Without noise it is infinite from the "
                "first round, and not drawn.",
                "epsilon",
                "epsilon",
            )
        ),
        leakage.roc(comparison, prefix),
    ]
    return [plot for plot in made if not plot.data.empty]


def quality_exchange(comparison: Comparison, prefix: str) -> Plot:
    """The paper's question: how good are the images for what was exchanged?"""
    rows = [
        {
            "panel": place._replace(setting=in_words(_but_transform(settings))).panel,
            "method": group.method,
            "transform": settings.get(TRANSFORM) or "none",
            "clients": place.clients,
            "bytes": group.mean(lambda result: result.exchange.bytes_total),
            "fid": group.fid,
            "fid_std": group.spread[0],
            "fid_std_over": group.spread[1],
        }
        for place in comparison.places
        for settings in [comparison.settings[place.setting]]
        for group in comparison.in_place(place)
        if group.fid is not None
    ]
    columns = ["panel", "method", "transform", "clients", "bytes", "fid", "fid_std", "fid_std_over"]
    data = pd.DataFrame(rows, columns=columns)
    key = "transform" if data["transform"].nunique() > 1 else "clients"
    marks = Marks(data[key])
    return Plot(
        f"{prefix}quality_exchange",
        "Quality against exchange",
        "One curve a method and transform, from its fewest clients to its most. Lower left is better: good "
        "images for few bytes; nothing lies below the dotted frontier. Bars: standard deviation over seeds "
        "or clients. Dashed: nothing crosses.",
        data,
        partial(_draw_quality, palette=comparison.palette, key=key, marks=marks),
        comparison.palette,
        below=marks.below,
    )


def _draw_quality(axis: Axes, rows: pd.DataFrame, palette: dict[str, str], key: str, marks: Marks) -> None:
    """Marks tell the values of `key` apart."""
    for (method, _), group in rows.groupby(["method", "transform"], sort=False):
        colour, points = palette[str(method)], group[group["bytes"] > 0].sort_values("clients")
        if points.empty:
            axis.axhline(group["fid"].iloc[0], color=colour, linestyle="--")
            continue
        spread = points["fid_std"].astype(float)
        axis.errorbar(points["bytes"], points["fid"], spread, color=colour, elinewidth=1, capsize=2)
        for x, y, value in zip(points["bytes"], points["fid"], points[key], strict=True):
            axis.plot(x, y, color=colour, marker=marks.of[value])
    ends = frontier(rows[rows["bytes"] > 0])
    axis.step(ends["bytes"], ends["fid"], where="post", color=INK, linestyle=":", linewidth=1, marker="")
    _scale_bytes(axis)
    axis.set_xlabel("exchanged, both ways (bytes)")
    axis.set_ylabel("FID")
    axis.set_ylim(bottom=0)
    marks.name(axis)


def frontier(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows that are better than all that cost no more bytes, by bytes."""
    sorted_ = rows.sort_values(["bytes", "fid"])
    return sorted_[sorted_["fid"] < sorted_["fid"].cummin().shift(fill_value=np.inf)]


def _but_transform(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key != TRANSFORM}


def budget(comparison: Comparison, prefix: str) -> Plot:
    """FID over the bytes so far: what a method is worth when it is stopped early."""
    rows = _history(comparison, "fid")
    plot = Plot(
        f"{prefix}budget",
        "Quality at a budget",
        "FID after each evaluated round over the bytes exchanged so far: of two curves at the same height, "
        "the left one has paid less.",
        rows[rows["bytes_cumulative"] > 0],
        partial(
            _draw_curves,
            palette=comparison.palette,
            x=("bytes_cumulative", "exchanged so far (bytes)"),
            y=("fid", "FID"),
        ),
        comparison.palette,
    )
    return _evaluated_more_than_once(plot)


def _evaluated_more_than_once(plot: Plot) -> Plot:
    """Without the curves that have one point."""
    points = plot.data.groupby(["panel", "method"])["round"].transform("size")
    return replace(plot, data=plot.data[points > 1])


def _finite(plot: Plot) -> Plot:
    return replace(plot, data=plot.data[np.isfinite(plot.data["epsilon"].astype(float))])


def _where_methods_differ(plot: Plot, key: str) -> Plot:
    """Without the panels whose curves lie on each other; the first stays where all do."""
    rounds = plot.data.groupby(["panel", "round"], sort=False)[key]
    apart = ((rounds.max() - rounds.min()) / rounds.mean()).groupby("panel", sort=False).max()
    several = plot.data.groupby("panel")["method"].nunique().max() > 1 if len(apart) else False
    alike = list(apart[apart < ALIKE].index) if several else []
    if not alike:
        return plot
    shown = [panel for panel in apart.index if panel not in alike] or alike[:1]
    note = f"In {len(alike)} of {len(apart)} panels the methods' curves lie within {ALIKE:.0%} of each other"
    note += "; those are left out." if shown != alike[:1] else ", and one of those stands for all."
    return replace(plot, note=f"{plot.note} {note}", data=plot.data[plot.data["panel"].isin(shown)])


def rounds_curve(comparison: Comparison, name: str, title: str, note: str, key: str, label: str) -> Plot:
    """A column of `rounds.csv` over rounds, a curve a method."""
    draw = partial(_draw_curves, palette=comparison.palette, x=("round", "round"), y=(key, label))
    return Plot(name, title, note, _history(comparison, key), draw, comparison.palette)


def _history(comparison: Comparison, key: str) -> pd.DataFrame:
    """A row for each place, method and round that has a value: mean and deviation over the seeds."""
    columns = list(dict.fromkeys((key, "bytes_cumulative")))
    frames = [
        pd.DataFrame(cell.files.rounds, columns=["round", *columns], dtype=float).assign(
            panel=place.label, method=group.method
        )
        for place in comparison.places
        for group in comparison.in_place(place)
        for cell in group.cells
        if cell.files.rounds
    ]
    if not frames:
        return pd.DataFrame(columns=["panel", "method", "round", key, f"{key}_std", "bytes_cumulative"])
    grouped = pd.concat(frames).groupby(["panel", "method", "round"], sort=False)
    rows = grouped[columns].mean()
    rows.insert(1, f"{key}_std", grouped[key].std())
    return rows[rows[key].notna()].reset_index()


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
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    else:
        _scale_bytes(axis)
    if key == "params_cumulative":
        axis.yaxis.set_major_formatter(EngFormatter())
    axis.set_ylim(bottom=0)
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)


def client_spread(comparison: Comparison, prefix: str) -> Plot:
    """How far the clients of client-level methods are apart."""
    rows = [
        {
            "panel": place.panel,
            "method": group.method,
            "clients": place.clients,
            "seed": result.seed,
            "client": client,
            "fid": fid,
        }
        for place in comparison.places
        for group in comparison.in_place(place)
        for result in group.results
        if result.fid and result.fid.per_client
        for client, fid in zip(
            result.fid.clients or range(len(result.fid.per_client)), result.fid.per_client, strict=True
        )
    ]
    drawn = {str(row["method"]) for row in rows}
    palette = {method: colour for method, colour in comparison.palette.items() if method in drawn}
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


def partitions(comparison: Comparison, prefix: str) -> Plot:
    """Which client holds what: images by client and label."""
    columns = ["client", "label", "count"]
    frames = []
    for place in comparison.places:
        groups = [group for group in comparison.in_place(place) if not group.everywhere]
        tables = (cell.files.partition for group in groups for cell in group.cells)
        if first := next(filter(None, tables), None):
            frames.append(pd.DataFrame(first, columns=columns).assign(panel=place.label))
    return Plot(
        f"{prefix}partitions",
        "Partitions",
        "Training images of each client and label, of the first seed.",
        pd.concat(frames) if frames else pd.DataFrame(columns=[*columns, "panel"]),
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
    """A logarithmic axis with as many labels as there is room for."""
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    decades = np.log10(high / low)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 1.5 else (1, 3), numticks=6))
    if decades < 0.5:
        axis.xaxis.set_major_locator(MaxNLocator(3))
    axis.xaxis.set_major_formatter(EngFormatter("B"))
    axis.minorticks_off()
