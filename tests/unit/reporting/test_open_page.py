"""fedlight report --open."""

import webbrowser
from pathlib import Path

import pytest
from plausible import write_cell
from report_page import run_report


@pytest.mark.slow
@pytest.mark.parametrize("has_browser", [True, False])
def test_the_page_is_opened_by_its_absolute_address_and_named_in_the_last_line(
    has_browser: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda address: opened.append(address) or has_browser)
    monkeypatch.chdir(tmp_path)
    write_cell(Path("runs/demo"))
    assert run_report(Path("runs/demo"), "--open") == 0
    assert opened == [(tmp_path / "runs/demo/report/index.html").as_uri()]
    output = capfd.readouterr()
    assert output.out.splitlines()[-1] == "1 done: runs/demo/report/index.html"
    assert ("no browser" in output.err) is not has_browser
