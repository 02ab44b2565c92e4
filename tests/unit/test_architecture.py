"""Who may import whom."""

import ast
from collections import Counter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "fedlight"

ALLOWED = {
    "runtime": {"runtime"},
    "diffusion": {"diffusion", "runtime"},
    "data": {"data", "runtime"},
    "evaluation": {"evaluation", "runtime"},
    "privacy": {"privacy", "runtime"},
    "federation": {"federation", "runtime"},
    "runs": {"runs", "runtime"},
    "loggers": {"loggers", "runs", "runtime"},
    "reporting": {"reporting", "runs", "runtime"},
}


def imports(path: Path) -> set[str]:
    """The rooms of fedlight that a module imports, at its top or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return {name.split(".")[1] for name in names if name.startswith("fedlight.")}


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


def test_no_two_classes_and_no_two_modules_have_one_name() -> None:
    plugins = PACKAGE.parent / "hydra_plugins"
    modules = [*PACKAGE.rglob("*.py"), *plugins.rglob("*.py")]
    trees = (ast.parse(path.read_text()) for path in modules)
    classes = [node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    files = [path.name for path in modules if path.name != "__init__.py"]
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
