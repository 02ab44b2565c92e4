"""The configurations of cells that go on from finished ones to a larger number of rounds."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from fedlight.compose import compose_config
from fedlight.config import CellConfig, validate
from fedlight.data.data_name import KNOWN, data_name
from fedlight.evaluation.weights import weights_name
from fedlight.experiment.targets import check_targets, check_tracking
from fedlight.experiment.trial import check
from fedlight.overrides import keep_text
from fedlight.runs.beginnings import explain_dependence
from fedlight.runs.identity import cell_folder, changes_no_result, is_done, read_config, read_result
from fedlight.runs.reader import flatten
from fedlight.runtime.errors import BadInput

GROUP = re.compile(r"\+?(logger|transport)[.=]")
"""An override of a group that changes no result."""


def extended_configs(cells: Sequence[Path], typed: list[str], trust: bool) -> list[tuple[CellConfig, Path]]:
    """The configuration of each longer cell, checked, and the folder of the cell that it goes on from.

    Of several cells that are the beginning of one and the same, the longest is taken. Where there are several
    cells, those that have as many rounds already are left out.

    Args:
        cells: folders of finished cells.
        typed: `rounds=N`, and keys that change no result, as KEY=VALUE.
        trust: whether the configurations may call other code than the permitted targets.

    Raises:
        BadInput: a cell cannot be extended; the message names each of them.
    """
    rounds, overrides = _parse(typed)
    extended: dict[Path, tuple[CellConfig, Path]] = {}
    length: dict[Path, int] = {}
    refused = []
    for shorter in cells:
        try:
            plain = _read(shorter, trust)
            if len(cells) > 1 and isinstance(plain.get("rounds"), int) and plain["rounds"] >= rounds:
                continue
            config = _lengthen(shorter, plain, rounds, overrides, trust)
            folder = cell_folder(config)
            if plain["rounds"] > length.get(folder, 0):
                length[folder], extended[folder] = plain["rounds"], (config, shorter)
            if not is_done(folder):
                check(config, elsewhere=False)
        except BadInput as error:
            refused.append(f"{shorter}: {error}")
    if refused:
        none = f"{len(refused)} of {len(cells)} cells cannot be extended, so none was: " if cells[1:] else ""
        raise BadInput(f"{none}{'; '.join(refused)}")
    if not extended:
        raise BadInput(f"rounds={rounds}: no cell of {cells[0].parent} has fewer rounds")
    return list(extended.values())


def _parse(typed: list[str]) -> tuple[int, list[Override]]:
    """The number of rounds, and the other overrides."""
    try:
        overrides = OverridesParser.create().parse_overrides(keep_text(typed))
    except HydraException as error:
        raise BadInput(f"{' '.join(typed)}: {' '.join(str(error).split())}") from error
    rounds: Any = None
    others = []
    for override in overrides:
        key = override.get_key_element().lstrip("+")
        if override.is_sweep_override() or override.is_delete():
            raise BadInput(f"{override.input_line}: extend takes one value for each key")
        if key == "rounds":
            rounds = override.value()
        elif changes_no_result(key):
            others.append(override)
        else:
            raise BadInput(f"{override.input_line}: {key} changes the result; extend changes rounds alone")
    if type(rounds) is not int or rounds < 1:
        raise BadInput("extend needs rounds=N, a whole number above the rounds of the cell")
    return rounds, others


def _read(shorter: Path, trust: bool) -> dict[str, Any]:
    """The configuration of a finished cell, which is untrusted, with what it would call checked."""
    result = read_result(shorter) or {}
    if result.get("status") != "completed":
        raise BadInput("the folder holds no completed cell")
    if isinstance(stopped := result.get("stopped"), dict):
        raise BadInput(
            f"early_stopping ended it after round {stopped.get('round')}, where a longer cell would end too"
        )
    plain = read_config(shorter / "config.yaml")
    if not trust:
        try:
            check_targets(plain)
        except BadInput as error:
            raise BadInput(f"{error}; add --trust if you trust the origin of the cell") from error
    return plain


def _lengthen(
    shorter: Path, plain: dict[str, Any], rounds: int, overrides: Sequence[Override], trust: bool
) -> CellConfig:
    """The configuration of a longer cell in the same sweep.

    Raises:
        BadInput: its first rounds would not be those of the shorter one.
    """
    config = OmegaConf.create(plain)
    assert isinstance(config, DictConfig)
    place = shorter.absolute().parent
    config.output, config.name = str(place.parent), place.name
    _apply(config, overrides)
    before = validate(config)
    if not trust:
        check_tracking(before.plain())
    if before.rounds == 0:
        raise BadInput("it has no round to go on from")
    if rounds <= before.rounds:
        raise BadInput(f"rounds={rounds} must be more than its {before.rounds} rounds")
    if reason := explain_dependence(flatten(before.plain())):
        raise BadInput(f"its first rounds depend on their number: {reason}")
    _check_names(before)
    return before.model_copy(update={"rounds": rounds})


def _apply(config: DictConfig, overrides: Sequence[Override]) -> None:
    """Sets keys that change no result in a configuration."""
    typed = [str(override.input_line) for override in overrides]
    groups = [GROUP.match(one) for one in typed]
    chosen = [one for one, group in zip(typed, groups, strict=True) if group]
    composed = compose_config(chosen) if chosen else OmegaConf.create()
    for override, group in zip(overrides, groups, strict=True):
        key = override.get_key_element().lstrip("+")
        if group:
            OmegaConf.update(config, group[1], composed.get(group[1]), merge=False, force_add=True)
            continue
        OmegaConf.update(config, key, override.value(), force_add=True)
        section, _, name = key.partition(".")
        if section == "data" and name in (config.data.get("source") or {}):
            config.data.source[name] = f"${{{key}}}"  # as in configs/data


def _check_names(config: CellConfig) -> None:
    """Raises BadInput where data or weights on this machine are not those that the cell was trained with."""
    data, evaluation = config.data, config.evaluation
    module = str(data.source.get("_target_")).split(".")[-2]
    if module in (*KNOWN, "image_folder"):
        name = data_name(module, data.root, data.cache or "")
        if name != data.name:
            raise BadInput(f"data.root={data.root} holds {name} now, and the cell was trained on {data.name}")
    name_here = weights_name(evaluation.extractor, evaluation.weights)
    if name_here != evaluation.weights_name:
        raise BadInput(
            f"evaluation.weights={evaluation.weights} has the hash {name_here}, and the cell was scored with "
            f"{evaluation.weights_name}"
        )
