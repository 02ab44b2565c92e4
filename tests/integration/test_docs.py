"""README and docs: the site builds and loads nothing from elsewhere; what they show can be typed."""

import argparse
import ast
import re
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from conftest import SMALL, invoke
from hydra.core.override_parser.overrides_parser import OverridesParser
from markdown.extensions.toc import slugify
from mkdocs.commands.build import build
from mkdocs.config import load_config
from PIL import Image
from shown import ERROR, ROOT, Block, Command, blocks, checked_commands, pages

from fedlight.__main__ import VERBS
from fedlight.__main__ import main as fedlight_main
from fedlight.compose import compose_config
from fedlight.config import validate
from fedlight.overrides import keep_text

MAKEFILE = (ROOT / "Makefile").read_text()
COMPOSED = ("run", "prepare")
ERRORS = [block for page in pages() for block in blocks(page) if block.language == ERROR]


# ---- the site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; `strict` in mkdocs.yml makes a broken link or anchor an error."""
    folder = tmp_path_factory.mktemp("docs") / "site"
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder))
    assert config.strict
    config.plugins.on_startup(command="build", dirty=False)
    build(config)
    return folder


@pytest.mark.slow
def test_the_site_builds_and_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    html = {path: path.read_text() for path in site.rglob("*.html")}
    assert len(html) >= len(pages()) - 2
    for path, text in html.items():
        loaded = re.findall(r"<(?:script|img|iframe|source)[^>]* src=\"([^\"]+)", text)
        loaded += re.findall(r"<link[^>]* rel=\"(?:stylesheet|preconnect|icon)\"[^>]* href=\"([^\"]+)", text)
        loaded += re.findall(
            r"<link[^>]* href=\"([^\"]+)\"[^>]* rel=\"(?:stylesheet|preconnect|icon)\"", text
        )
        assert loaded
        assert not [address for address in loaded if re.match(r"(https?:)?//", address)], path
    index = (site / "search" / "search_index.js").read_text()
    assert index.startswith("var __index = ")
    assert "privacy.target_epsilon" in index


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_a_link_of_a_page_outside_the_site_leads_to_a_file_and_its_heading(name: str) -> None:
    links = re.findall(r"\]\(([^)]+)\)", (ROOT / name).read_text())
    for link in links:
        path, _, anchor = link.partition("#")
        if path.startswith("http"):
            continue
        assert (ROOT / path).is_file(), link
        headings = re.findall(r"^#+ (.+)$", (ROOT / path).read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in {slugify(heading, "-") for heading in headings}, link


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 6_000


# ---- what is shown


def check_composed(command: Command, folder: Path) -> None:
    """Composes and validates the configuration of a command, of a grid with the first value of each key.

    Of all values that name a file, as in `method=FULL,UDEC`, the files must exist.
    """
    arguments = [re.sub(r"\bFOLDER\b", str(folder), word) for word in command.arguments]
    arguments = [word for word in arguments if word not in ("-m", "--dry", "--help")]
    chosen = []
    for override in OverridesParser.create().parse_overrides(keep_text(arguments)):
        if not override.is_sweep_override():
            chosen.append(override.input_line)
        elif override.is_discrete_sweep():
            values = list(override.sweep_string_iterator())
            for value in values:
                check_choice(override.get_key_element(), value)
            chosen.append(f"{override.get_key_element()}={values[0]}")
    validate(compose_config(chosen))


def check_choice(group: str, choice: str) -> None:
    """Checks that the file exists that a choice of a group names, as in `method=UDEC`."""
    folder = ROOT / "configs" / group
    if folder.is_dir() and choice not in ("null", "none"):
        assert (folder / f"{choice}.yaml").is_file(), f"{group}={choice}"


def check_parsed(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parses the command line with the parser of the command."""
    module = import_module(f"fedlight.{command.verb}")

    def parse(parser: argparse.ArgumentParser, *_: object) -> int:
        parser.parse_args()
        return 0

    monkeypatch.setattr(module, "run_command", parse)
    assert invoke(*command.arguments, main=module.main) == 0


def check_other(command: Command) -> None:
    """Checks the target and variables of make, or the script and options of a benchmark."""
    first, *rest = command.words
    if first == "make":
        for word in rest:
            name, _, value = word.partition("=")
            assert re.search(rf"^{name} :=" if value else rf"^{name}:", MAKEFILE, re.MULTILINE), word
    else:
        assert first == "python", f"neither checked nor marked as not run: {' '.join(command.words)}"
        sources = [ROOT / rest[0], ROOT / "benchmarks" / "common.py"]
        text = "".join(path.read_text() for path in sources)
        assert all(f'"{word}"' in text for word in rest[1:] if word.startswith("--")), command.words


@pytest.mark.slow
@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_that_is_shown_can_be_typed(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "images" / "a").mkdir(parents=True)
    Image.new("L", (8, 8)).save(tmp_path / "images" / "a" / "0.png")
    for command in checked_commands(page):
        try:
            if command.verb in COMPOSED and "--config-dir" not in command.words:
                check_composed(command, tmp_path / "images")
            elif command.verb is None:
                check_other(command)
            elif command.verb not in COMPOSED:
                assert command.verb in VERBS
                check_parsed(command, monkeypatch)
        except Exception as error:
            error.add_note(f"{command.place}: {' '.join(command.words)}")
            raise


def test_every_block_names_its_language_and_is_valid_in_it() -> None:
    languages = {"bibtex", "python", "sh", "text", "yaml", ERROR}
    for page in pages():
        assert page.read_text().count("```") == 2 * len(list(blocks(page))), f"{page}: a block of no language"
        for block in blocks(page):
            assert block.language in languages, block.place
            if block.language == "python":
                ast.parse(block.text)
            elif block.language == "yaml":
                yaml.safe_load(block.text)


def test_a_command_in_running_text_has_a_verb_that_exists() -> None:
    inline = r"`(?:fedlight |python -m fedlight\.)([a-z]+)[ `]"
    verbs = {verb for page in pages() for verb in re.findall(inline, page.read_text())}
    assert {"run", "sweeps", "deploy"} <= verbs <= VERBS.keys()


@pytest.mark.parametrize("block", ERRORS, ids=lambda block: block.place)
def test_an_error_that_is_shown_is_the_one_that_its_command_gives(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("train", "val"):
        (tmp_path / "photos" / folder / "a").mkdir(parents=True)
    typed, _, error = block.text.partition("\n")
    assert invoke(*typed.removeprefix("$ fedlight ").split(), main=fedlight_main) == 2
    assert capfd.readouterr().err == error


# ---- what is really run


@pytest.mark.slow
def test_the_commands_of_the_readme_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """All but the sweep on a cluster, on cells that are made small by further overrides."""
    monkeypatch.chdir(tmp_path)
    small = [*SMALL, "rounds=1", "name=demo", "clients=3"]
    outputs = {}
    for command in checked_commands(ROOT / "README.md"):
        if command.verb is None or "hydra/launcher=slurm" in command.words:
            continue
        arguments = command.arguments
        if command.verb == "run":
            arguments += small
        if command.verb == "sample":
            (cell,) = Path("runs/demo").glob("UDEC-*iid*")
            arguments = [word.replace("CELL", cell.name) for word in arguments]
        arguments = [word.replace("runs/paper_iid", "runs/demo") for word in arguments]
        assert invoke(command.verb, *arguments, main=fedlight_main) == 0, command
        outputs[command.verb] = capfd.readouterr().out
    assert "5 cells: 5 done" in outputs["sweeps"]
    assert "runs/demo/report/index.html" in outputs["report"]
    assert len(list(Path("folder").glob("*.png"))) == 100


@pytest.mark.slow
def test_the_extensions_of_the_docs_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of the page are written to the folder `mine`, and its commands typed beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "mine")
    page = ROOT / "docs" / "extend.md"
    for block in blocks(page):
        if block.language != "sh":
            path = tmp_path / "mine" / block.title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)
    typed = [command.arguments for command in checked_commands(page)]
    for arguments in typed:
        assert invoke(*arguments, *SMALL, "clients=3") == 0
    assert len(typed) == 3
    assert len(list(tmp_path.glob("runs/default/*/result.json"))) == 3
