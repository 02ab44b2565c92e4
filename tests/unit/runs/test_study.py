"""The journal of a search: what is drawn follows from it, and a file from elsewhere is checked."""

from pathlib import Path

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from fedlight.runtime.errors import BadInput
from hydra_plugins.fedlight_sweeps._study import draw_trial, name_study, open_study, reopen_trial

SPACE = {
    "optimizer.lr": FloatDistribution(1e-4, 1e-2, log=True),
    "method": CategoricalDistribution(["FULL", "UDEC"]),
    "epochs": IntDistribution(1, 4),
}


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "journal.log"


def opened(journal: Path, name: str = "study") -> optuna.Study:
    return open_study(journal, name, SPACE, "minimize", prunes=True)


def value(trial: optuna.trial.FrozenTrial) -> float:
    return trial.params["epochs"] + 100 * trial.params["optimizer.lr"]


def test_a_study_that_is_closed_after_each_step_draws_what_one_draws_that_stays_open(tmp_path: Path) -> None:
    """More trials than the ten that are drawn at random: the others depend on those before."""
    whole = opened(tmp_path / "whole")
    for _ in range(14):
        trial = draw_trial(whole, SPACE, 7)
        whole.tell(trial.number, value(trial))
    for _ in range(14):
        trial = draw_trial(opened(tmp_path / "parts"), SPACE, 7)
        opened(tmp_path / "parts").tell(trial.number, value(trial))
    drawn = [trial.params for trial in whole.trials]
    assert [trial.params for trial in opened(tmp_path / "parts").trials] == drawn
    assert len({str(params) for params in drawn}) == 14


def test_a_line_that_a_killed_process_has_not_finished_is_cut_off(journal: Path) -> None:
    trial = draw_trial(opened(journal), SPACE, 7)
    whole = journal.read_bytes()
    for length in range(1, len(whole), 61):
        journal.write_bytes(whole[:length])
        again = draw_trial(opened(journal), SPACE, 7)
        assert again.params == trial.params
        assert len(opened(journal).trials) == 1


def test_a_trial_goes_on_in_another_process(journal: Path) -> None:
    number = draw_trial(opened(journal), SPACE, 7).number
    reopen_trial(opened(journal), number).report(0.5, 3)
    (trial,) = opened(journal).trials
    assert (trial.state.name, trial.intermediate_values) == ("RUNNING", {3: 0.5})


def test_a_journal_holds_several_studies(journal: Path) -> None:
    draw_trial(opened(journal, "one"), SPACE, 7)
    assert opened(journal, "other").trials == []
    assert len(opened(journal, "one").trials) == 1


def test_the_name_of_a_study_tells_searches_apart() -> None:
    settings = {"metric": "train_loss", "seed": 1}
    other = SPACE | {"epochs": IntDistribution(1, 5)}
    names = {
        name_study(settings, SPACE),
        name_study(settings, other),
        name_study(settings | {"seed": 2}, SPACE),
    }
    assert len(names) == 3
    assert name_study(dict(reversed(settings.items())), SPACE) in names


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (b'"op_code":4', b'"op_code":44', "is damaged"),
        (b'{"op_code"', b"{op_code", "is damaged"),
        (b'\\"high\\": 4', b'\\"high\\": 400', "has other keys"),
        (b'"epochs"', b'"hydra.launcher.setup"', "has other keys"),
        (b'"method":', b'"method":9,"x":', "is damaged"),
    ],
)
def test_a_journal_that_the_search_could_not_have_written_is_refused(
    journal: Path, before: bytes, after: bytes, message: str
) -> None:
    draw_trial(opened(journal), SPACE, 7)
    content = journal.read_bytes()
    assert before in content, content
    journal.write_bytes(content.replace(before, after))
    with pytest.raises(BadInput, match=r"journal\.log is damaged .*; remove it") as refused:
        opened(journal)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_value_outside_the_interval_is_refused(journal: Path) -> None:
    trial = draw_trial(opened(journal), SPACE, 7)
    content = journal.read_text()
    epochs = f'"epochs":{float(trial.params["epochs"])}'
    assert epochs in content, content
    journal.write_text(content.replace(epochs, '"epochs":50.0'))
    with pytest.raises(BadInput, match="trial 0 has epochs=50"):
        opened(journal)


def test_a_last_line_that_is_no_record_is_refused(journal: Path) -> None:
    draw_trial(opened(journal), SPACE, 7)
    journal.write_bytes(journal.read_bytes() + b"nonsense\n")
    with pytest.raises(BadInput, match="is damaged"):
        opened(journal)
