"""Panels of a project on Weights & Biases: a workspace, and a report with the same panels."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws
from wandb_workspaces import expr

from fedlight.runs.palette import COLOURS
from fedlight.runtime.errors import BadInput

METHOD = "method.name"
"""Configuration key by which runs are grouped and coloured."""


@dataclass(frozen=True)
class Topic:
    """A section of the workspace and of the report."""

    title: str
    text: str
    panels: Callable[[], list[Any]]


def topics() -> list[Topic]:
    """The sections, in the order of the page of `fedlight.report`."""
    return [
        Topic(
            "Quality against exchange",
            "FID over the bytes exchanged: lower left is better. Only cells of one data set and one "
            "extractor compare.",
            lambda: [
                wr.ScatterPlot(
                    title="FID over bytes exchanged",
                    x=wr.SummaryMetric("exchange.bytes_total"),
                    y=wr.SummaryMetric("fid.value"),
                    log_x=True,
                ),
                _bars("FID by method", "fid.value", "FID"),
            ],
        ),
        Topic(
            "Over rounds",
            "Means over the cells of a method; the band is their standard deviation.",
            lambda: [
                _curve("Training loss", "train_loss", "loss"),
                _curve("FID", "fid", "FID"),
            ],
        ),
        Topic(
            "Exchange",
            "Cumulative traffic in both directions, all clients.",
            lambda: [
                _curve("Parameters exchanged", "params_cumulative", "parameters"),
                _curve("Bytes exchanged", "bytes_cumulative", "bytes"),
                _bars("Saved against FULL", "exchange.reduction", "share"),
            ],
        ),
        Topic(
            "Client spread",
            "Differences between the clients of a cell.",
            lambda: [
                _bars("FID, standard deviation over clients", "fid.std", "FID"),
                _clients("FID of each client", "client_fid/.*"),
                _clients("Training loss of each client", "client_loss/.*"),
            ],
        ),
        Topic(
            "Samples and partitions",
            "The last grid of generated images, and the partition of the data.",
            lambda: [
                wr.MediaBrowser(title="Samples", media_keys=["samples"], num_columns=2),
                wr.MediaBrowser(title="Partitions", media_keys=["partition"], num_columns=2),
            ],
        ),
        Topic("Cells", "One row for each cell.", lambda: [wr.WeavePanelSummaryTable(table_name="cells")]),
    ]


def build(entity: str, project: str, sweep: str | None) -> tuple[ws.Workspace, wr.Report]:
    """Makes the workspace and the report without sending them.

    Args:
        entity: the team or user that owns the project.
        project: where the cells were logged.
        sweep: shows the cells of this sweep only; None for the whole project.
    """
    title = f"fedlight: {sweep or project}"
    chosen = f"Metric('Group') = '{sweep}'" if sweep else ""
    workspace = ws.Workspace(
        entity=entity,
        project=project,
        name=title,
        sections=[ws.Section(name=topic.title, panels=topic.panels(), is_open=True) for topic in topics()],
        settings=ws.WorkspaceSettings(x_axis="round"),
        runset_settings=ws.RunsetSettings(
            filters=chosen,
            groupby=[expr.Config(METHOD)],
            group_colors=dict(COLOURS.items()),
        ),
        auto_generate_panels=False,
    )
    blocks: list[Any] = [wr.TableOfContents()]
    colours: dict[Any, Any] = {
        wr.RunsetGroup("cells", (wr.RunsetGroupKey(wr.Config(METHOD), method),)): colour
        for method, colour in COLOURS.items()
    }
    for topic in topics():
        runset = wr.Runset(name="cells", filters=chosen, groupby=[f"config.{METHOD}"])
        grid = wr.PanelGrid(runsets=[runset], panels=topic.panels(), custom_run_colors=colours)
        blocks += [wr.H2(topic.title), wr.P(topic.text), grid]
    report = wr.Report(
        entity=entity,
        project=project,
        title=title,
        description="Federated diffusion: what each method exchanges, and how good its images are.",
        blocks=blocks,
        width="fluid",
    )
    return workspace, report


def specification(workspace: ws.Workspace, report: wr.Report) -> dict[str, Any]:
    """Workspace and report as JSON data."""
    return {
        name: model._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)
        for name, model in (("workspace", workspace), ("report", report))
    }


def publish(workspace: ws.Workspace, report: wr.Report) -> list[str]:
    """Sends both; returns their addresses.

    Raises:
        BadInput: W&B rejected them or cannot be reached.
    """
    try:
        workspace.save()
        report.save()
    except Exception as error:  # W&B has errors of its own
        raise BadInput(f"W&B: {error}; --out FILE writes the specification instead") from error
    return [workspace.url, report.url]


def _curve(title: str, key: str, label: str) -> Any:
    return wr.LinePlot(
        title=title,
        x="round",
        y=[key],
        title_x="round",
        title_y=label,
        groupby=wr.Config(METHOD),
        groupby_aggfunc="mean",
        groupby_rangefunc="stddev",
    )


def _clients(title: str, pattern: str) -> Any:
    return wr.LinePlot(title=title, x="round", metric_regex=pattern, title_x="round")


def _bars(title: str, key: str, label: str) -> Any:
    return wr.BarPlot(
        title=title,
        metrics=[wr.SummaryMetric(key)],
        title_x=label,
        groupby=wr.Config(METHOD),
        groupby_aggfunc="mean",
        groupby_rangefunc="stddev",
    )
