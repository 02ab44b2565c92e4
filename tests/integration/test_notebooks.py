"""The notebooks of examples/: they run from top to bottom in a kernel, and are stored with their outputs."""

import json
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from forkserver import warm_python
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
SMALL = ["rounds=1", "epochs=1", "data.limit=120", "evaluation.samples=70", "evaluation.steps=2"]
LARGEST = 300_000  # of a stored notebook, in bytes


class Client(NotebookClient):
    """Executes a notebook and keeps the texts that were shown in place of earlier ones."""

    replaced: list[str]

    def process_message(self, msg: dict[str, Any], cell: NotebookNode, cell_index: int) -> Any:
        if msg["msg_type"] == "update_display_data":
            text = msg["content"]["data"].get("text/plain", "")
            self.replaced.append(re.sub(r"\x1b\[[\d;]*m", "", text))  # without colours
        return super().process_message(msg, cell, cell_index)


def check_messages(outputs: list[NotebookNode]) -> None:
    """Asserts that nothing is on stderr but messages of fedlight: no warning of a library."""
    lines = [line for o in outputs if o.get("name") == "stderr" for line in o.text.splitlines()]
    assert [line for line in lines if not line.startswith("fedlight: ")] == []


@pytest.mark.slow  # trains two to four cells in a process of their own
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digits_classifier: object
) -> None:
    kernel = tmp_path / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    command = [warm_python(), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(
        json.dumps({"argv": command, "display_name": "Python 3", "language": "python"})
    )
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    notebook = nbformat.read(path, as_version=4)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    parameters.source += f"\nsettings += {SMALL}"

    client = Client(
        notebook,
        timeout=600,
        startup_timeout=600,  # the fork server may still be importing
        kernel_manager_class=AsyncKernelManager,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.replaced = []
    client.execute()  # raises CellExecutionError where a cell does

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    check_messages(outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert any("CellResult" in output.get("data", {}).get("text/plain", "") for output in outputs)
    shown = "\n".join(client.replaced)
    assert re.search(r"^clients .* [1-9]\d*/\d", shown, re.M), "the progress of a round's clients"
    assert client.replaced[-1] == "<IPython.core.display.HTML object>", "bars vanish at the end"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_as_it_ran(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not any(output.output_type == "error" for output in outputs)
    check_messages(outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    assert path.stat().st_size < LARGEST
