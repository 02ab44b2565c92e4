"""What may be typed after `fedlight run -m`: every value makes valid cells, or is refused in one line."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL, slow
from hydra._internal.callbacks import Callbacks
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.types import HydraContext, RunMode
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf.errors import OmegaConfBaseException

from fedlight.command import describe_error
from fedlight.compose import ROOT, register_resolvers
from fedlight.config import CellConfig
from fedlight.overrides import keep_text
from fedlight.runs.identity import cell_id
from fedlight.runtime.errors import BadInput, raised_by_hydra
from fedlight.runtime.secret import move_to_environment

Command = Callable[..., int]

OPTIONAL = ("algorithm", "privacy", "transform", "transport", "experiment")
NUMBERS = ("clients", "seed", "fraction", "optimizer.lr", "data.limit", "trainer.workers", "epochs")
NAMES = ("name", "output", "data.root", "evaluation.cache", "evaluation.weights", "logger.project")
LISTS = ("method.uplink", "model.unet.dim_mults", "model.slices.encoder")
GROUPS = (*OPTIONAL, "method", "data", "partition", "logger", "sweeps", "hydra/launcher")
NODES = ("model.slices", "data.source", "logger", "hydra.sweeper", "hydra.job", "hydra")
SIGNS = "'\"\\,$ {}[]():=~.%#@*?!&|<>;+-_^`/\taZ09é猫"
WORDS = ["null", "none", "true", "1", "1e5", "2024_11_05", "0x1f", "nan", "-inf", "???", "~/x", "${name}"]
WORDS += ["${oc.env:X}", "[1,2]", "{a:1}", "choice(1,2)", "range(1,3)", "interval(0,1)", "glob(*)"]
WORDS += ["sort(2,1)", "tag(x,choice(a))", "FULL", "fedprox", "digits", "iid", "$$", "US$_1", "猫", "🐶 x"]
WORDS += ["'a b'", '"', "a b", ""]
VALUES = st.one_of(
    st.sampled_from(WORDS),
    st.text(st.sampled_from(SIGNS), max_size=8),
    st.floats().map(str),
    st.integers().map(str),
)
ARGUMENTS = st.builds(
    "{}{}={}".format,
    st.sampled_from(["", "", "", "+", "++", "~"]),
    st.sampled_from([*NUMBERS, *NAMES, *LISTS, *GROUPS, *NODES]),
    st.lists(VALUES, min_size=1, max_size=3).map(",".join),
)


@pytest.fixture(scope="module")
def loader() -> ConfigLoaderImpl:
    register_resolvers()
    return ConfigLoaderImpl(create_config_search_path(str(ROOT / "configs")))


def cells_of(loader: ConfigLoaderImpl, *arguments: str) -> list[CellConfig] | str:
    """The checked configurations of a grid, composed as `fedlight run -m` does; or the line that refuses it.

    Any other error would be a traceback for the user, and fails the test.
    """
    typed = keep_text(move_to_environment(arguments, os.environ.copy()))
    context = HydraContext(loader, Callbacks())
    try:
        config = loader.load_configuration("config", typed, RunMode.MULTIRUN)
        sweeper: Any = Plugins.instance().instantiate_sweeper(
            config=config, hydra_context=context, task_function=lambda _: None
        )
        return [sweeper.compose(cell) for cell in sweeper.grid(typed)]
    except (BadInput, HydraException, OmegaConfBaseException) as error:
        return describe_error(error)
    except Exception as error:
        if not raised_by_hydra(error):
            raise
        return describe_error(error)


@pytest.mark.parametrize("examples", [6, *slow(200)])
def test_whatever_is_typed_makes_cells_or_one_line(loader: ConfigLoaderImpl, examples: int) -> None:
    @given(st.lists(ARGUMENTS, min_size=1, max_size=2))
    @settings(derandomize=True, deadline=None, max_examples=examples)
    def check(arguments: list[str]) -> None:
        cells = cells_of(loader, *arguments)
        assert cells
        assert "\n" not in cells

    check()


@given(st.from_regex(r"\w[\w.-]*", fullmatch=True).filter(lambda name: name.lower() != "null"))
@settings(derandomize=True, deadline=None, max_examples=40)
def test_a_name_stays_as_it_is_typed(name: str) -> None:
    (argument,) = keep_text([f"name={name}"])
    parsed = OverridesParser.create().parse_override(argument).value()
    assert str(getattr(parsed, "text", parsed)) == name


@pytest.mark.parametrize("name", ["20241105", "2024_11_05", "1e5", "true", "1.50", "0x10", "nan", "١"])
def test_names_that_yaml_reads_as_something_else_are_text(loader: ConfigLoaderImpl, name: str) -> None:
    cells = cells_of(loader, f"name={name}")
    assert [cell.name for cell in cells] == [name]


def test_names_in_a_sweep_are_text(loader: ConfigLoaderImpl) -> None:
    cells = cells_of(loader, "name=2024_11_05,1e5", "output=choice(1_0)", "logger.project=2024")
    assert [(cell.name, cell.output, cell.logger["project"]) for cell in cells] == [
        ("2024_11_05", "1_0", "2024"),
        ("1e5", "1_0", "2024"),
    ]


def test_a_number_for_a_name_in_a_file_is_refused_with_what_to_do(
    command: Command, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nname: 2024_11_05\n")
    assert command("--config-dir", str(tmp_path), "experiment=mine") == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "name: input should be a valid string, got 20241105; in a YAML file, put it in quotes" in line


@pytest.mark.parametrize("group", OPTIONAL)
def test_none_and_null_are_the_same_cell_as_without_the_group(loader: ConfigLoaderImpl, group: str) -> None:
    (without,) = cells_of(loader, "clients=3")
    cells = cells_of(loader, "clients=3", f"{group}=none,null,NULL")
    assert [cell_id(cell.plain()) for cell in cells] == [cell_id(without.plain())] * 3
    assert group not in cells[0].plain()


def test_fedavg_stands_beside_other_algorithms_in_one_grid(loader: ConfigLoaderImpl) -> None:
    cells = cells_of(loader, "algorithm=fedprox,null,scaffold")
    assert [cell.algorithm and cell.algorithm.name for cell in cells] == ["fedprox", None, "scaffold"]


def test_none_leaves_out_what_an_experiment_chooses(loader: ConfigLoaderImpl) -> None:
    cells = cells_of(loader, "experiment=better", "transform=none,int8")
    assert [cell.transform and cell.transform.name for cell in cells] == [None, "int8"]


@pytest.mark.parametrize("group", ["method", "data", "partition", "sweeps"])
@pytest.mark.parametrize("value", ["null", "7"])
def test_a_group_that_must_be_chosen_names_its_choices(
    loader: ConfigLoaderImpl, group: str, value: str
) -> None:
    message = cells_of(loader, f"{group}={value},{value}")
    assert isinstance(message, str)
    assert f"Could not find '{group}/{'none' if value == 'null' else '7'}'" in message
    assert f"Available options in '{group}'" in message


@pytest.mark.parametrize("typed", ["method=glob(X*)", "clients=range(2,2)"])
def test_a_sweep_over_no_value_is_refused(loader: ConfigLoaderImpl, typed: str) -> None:
    assert cells_of(loader, typed, "seed=1,2") == f"{typed} stands for no value"


def test_no_cell_of_a_command_is_run_under_a_changed_name(command: Command, tmp_path: Path) -> None:
    assert command("-m", *SMALL, "rounds=0", "clients=2", "name=2024_11_05") == 0
    assert command(*SMALL, "rounds=0", "clients=2", "name=1e5") == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["1e5", "2024_11_05"]


# ---- paths


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    (folder / "set" / "cat").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(folder))
    return folder


@pytest.mark.parametrize("typed", ["~/set", "'~/set'", "choice(~/set)"])
def test_a_tilde_is_the_home_folder_in_every_path(loader: ConfigLoaderImpl, home: Path, typed: str) -> None:
    paths = [f"{key}={typed}" for key in ("output", "data.cache", "evaluation.cache", "evaluation.weights")]
    (cell,) = cells_of(loader, "data=image_folder", f"data.root={typed}", *paths)
    evaluation, data = cell.evaluation, cell.data
    found = {cell.output, data.root, data.source["root"], data.cache, evaluation.cache, evaluation.weights}
    assert found == {str(home / "set")}
    whole = [argument.replace(typed, str(home / "set")) for argument in (f"data.root={typed}", *paths)]
    (same,) = cells_of(loader, "data=image_folder", *whole)
    assert cell_id(cell.plain()) == cell_id(same.plain())


def test_the_cache_is_in_the_home_folder_by_default(
    loader: ConfigLoaderImpl, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FEDLIGHT_CACHE")
    (cell,) = cells_of(loader, "data=cifar10")
    assert (cell.data.cache, cell.evaluation.cache) == (str(home / ".cache" / "fedlight"),) * 2


def test_an_empty_path_is_none_or_refused(loader: ConfigLoaderImpl) -> None:
    (cell,) = cells_of(loader, "data=image_folder", "data.root=", "evaluation.weights=")
    assert (cell.data.root, cell.data.source["root"], cell.evaluation.weights) == (None, None, None)
    for key in ("output", "data.cache", "evaluation.cache"):
        assert f"{key}: string should have at least 1 character" in str(
            cells_of(loader, "data=cifar10", f"{key}=")
        )


def test_a_path_of_any_signs_needs_no_quotes(loader: ConfigLoaderImpl) -> None:
    odd = "my [photos], 2024 (final)=v2 'a' US$_1 \\"
    (cell,) = cells_of(loader, f"output={odd}")
    assert cell.output == odd


def test_a_sweep_lies_in_the_home_folder(command: Command, tmp_path: Path, home: Path) -> None:
    assert command("-m", *SMALL, "rounds=0", "clients=2,3", "output=~/runs", "name=x") == 0
    assert len(list(home.glob("runs/x/*/result.json"))) == 2
    assert list(home.glob("runs/x/.plan/*.json"))
    assert not (tmp_path / "~").exists()
