"""The dashboard's specification, validated by the library that sends it."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from wandb_workspaces.reports.v2.interface import Report, WeavePanelSummaryTable
from wandb_workspaces.reports.v2.internal import ReportViewspec
from wandb_workspaces.workspaces import Workspace
from wandb_workspaces.workspaces.internal import View

from fedlight import dashboard
from fedlight.runs.palette import COLOURS

FIGURES = {
    *("FID over bytes exchanged", "FID", "Training loss", "Parameters exchanged", "FID of each client"),
    *("Samples", "Partitions"),
}


def run_dashboard(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["fedlight.dashboard", *arguments])
    monkeypatch.setenv("WANDB_MODE", "offline")
    try:
        dashboard.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.fixture
def specification(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    path = tmp_path / "dashboard.json"
    arguments = ["--entity", "team", "--project", "skew", "--sweep", "demo", "--out", str(path)]
    assert run_dashboard(monkeypatch, *arguments) == 0
    return json.loads(path.read_text())


def test_the_specification_is_valid_for_wandb_workspaces(specification: dict[str, Any]) -> None:
    workspace = Workspace._from_model(View.model_validate(specification["workspace"]))
    assert (workspace.entity, workspace.project, workspace.settings.x_axis) == ("team", "skew", "round")
    titles = {
        panel.title for section in workspace.sections for panel in section.panels if hasattr(panel, "title")
    }
    assert titles >= FIGURES
    assert workspace.runset_settings.group_colors == COLOURS
    report = Report._from_model(ReportViewspec.model_validate(specification["report"]))
    grids = [block for block in report.blocks if hasattr(block, "panels")]
    shown = {panel.title for grid in grids for panel in grid.panels if hasattr(panel, "title")}
    assert shown == titles
    assert all("demo" in str(grid.runsets[0].filters) for grid in grids)
    for parts in (workspace.sections, grids):
        panels = [panel for part in parts for panel in part.panels]
        tables = [panel.table_name for panel in panels if isinstance(panel, WeavePanelSummaryTable)]
        assert tables == ["cells"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--entity is needed"),
        (["--entity", "team"], "no key, or WANDB_MODE says offline"),
        (["--entity", "team", "--out", "no/such/folder/file"], "--out: cannot write to no/such"),
    ],
)
def test_invalid_arguments_of_the_dashboard_end_with_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_ENTITY", raising=False)
    assert run_dashboard(monkeypatch, *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert list(tmp_path.iterdir()) == []
