"""Who may import whom."""

import ast
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "fedlight"

PLUGINS = PACKAGE.parent / "hydra_plugins"
MODULES = sorted([*PACKAGE.rglob("*.py"), *PLUGINS.rglob("*.py")])

ALLOWED = {
    "runtime": {"runtime"},
    "diffusion": {"diffusion", "runtime"},
    "data": {"data", "runtime"},
    "evaluation": {"evaluation", "data", "runtime"},
    "finetuning": {"finetuning", "diffusion", "data", "runtime"},
    "privacy": {"privacy", "runtime"},
    "federation": {"federation", "runtime"},
    "runs": {"runs", "runtime"},
    "loggers": {"loggers", "runs", "runtime"},
    "reporting": {"reporting", "runs", "runtime"},
}
SECTIONS = {"data_config", "model_config", "federation_config", "evaluation_config", "finetuning_config"}
"""Modules that hold the sections of the configuration."""


def imported(path: Path) -> set[str]:
    """Dotted names that a module imports, at its top or inside a function, all of them absolute."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return names


def imports(path: Path) -> set[str]:
    """The rooms of fedlight that a module imports."""
    return {name.split(".")[1] for name in imported(path) if name.startswith("fedlight.")}


def dotted(path: Path) -> str:
    """The name under which a file is imported."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("room", ALLOWED)
def test_rooms_see_only_whom_they_may(room: str) -> None:
    modules = list((PACKAGE / room).rglob("*.py"))
    assert modules
    for module in modules:
        assert imports(module) <= ALLOWED[room], module


def test_every_room_has_its_rule() -> None:
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert rooms == {*ALLOWED, "experiment", "deployment"}
    seen = set().union(*(imports(path) for path in (PACKAGE / "experiment").glob("*.py")))
    assert seen >= rooms - {"reporting", "deployment"}
    assert not seen & {"deployment", "run", "sweeps", "deploy"}


def test_no_module_imports_itself_through_others() -> None:
    names = {dotted(path): path for path in MODULES}
    graph = {name: imported(path) & (names.keys() - {name}) for name, path in names.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_no_import_is_hidden_from_the_running_program() -> None:
    assert [path for path in MODULES if "TYPE_CHECKING" in path.read_text()] == []


def test_no_function_replaces_a_global_variable() -> None:
    for path in MODULES:
        replaced = [
            node.names for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Global)
        ]
        assert not replaced, path


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_reads_its_own_section_of_the_configuration_alone(room: str) -> None:
    for path in (PACKAGE / room).rglob("*.py"):
        for name in imported(path):
            assert name != "fedlight.config", path
            parts = name.split(".")
            if parts[0] == "fedlight" and SECTIONS & set(parts):
                assert parts[1] == room, path


def test_no_two_classes_and_no_two_modules_have_one_name() -> None:
    trees = (ast.parse(path.read_text()) for path in MODULES)
    classes = [node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    files = [path.name for path in MODULES if path.name != "__init__.py"]
    for names in (classes, files):
        assert names
        assert [name for name, count in Counter(names).items() if count > 1] == []


def test_every_configuration_file_says_what_it_is_for() -> None:
    root = PACKAGE.parent
    paths = [*root.glob("configs/**/*.yaml"), *root.glob("sweeps/*.yaml")]
    assert {path.parent.name for path in paths} >= {"configs", "method", "transport", "sweeps"}
    for path in paths:
        lines = path.read_text().splitlines()
        first = lines[1] if lines[0].startswith("# @package") else lines[0]
        assert first.startswith("# "), path
        assert len(first) > 20, path
