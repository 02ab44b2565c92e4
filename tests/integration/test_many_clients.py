"""A cell of many clients costs what its cohorts cost."""

import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import Cell

from fedlight.federation.cohort import draw_poisson
from fedlight.federation.site import Site


@pytest.mark.slow
def test_clients_that_never_took_part_are_asked_once_for_all(
    cell: Callable[..., Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    evaluate = Site.evaluate_group

    def noted(site: Site, requests: Any) -> Any:
        asked.extend(request.client for request in requests)
        return evaluate(site, requests)

    monkeypatch.setattr(Site, "evaluate_group", noted)
    done = cell("method=UDEC", "clients=12", "fraction=0.2", "transport=inline")
    met = {int(row["client"]) for row in done.rows("ledger.csv")}
    strangers = sorted(set(range(12)) - met)
    assert len(strangers) > 5
    assert sorted(asked) == sorted([*met, strangers[0]])
    hashes = done.result["client_sha256"]
    assert len(hashes) == 12
    assert len({hashes[client] for client in strangers}) == 1
    assert len(set(hashes)) == 1 + len(met)


def test_a_poisson_cohort_is_drawn_at_once_as_client_by_client() -> None:
    chance = np.random.default_rng(5)
    assert draw_poisson(np.random.default_rng(5), 1_000, 0.03) == [
        client for client in range(1_000) if chance.random() < 0.03
    ]


@pytest.mark.slow
def test_of_a_hundred_thousand_clients_those_of_the_cohort_train_on_workers_as_in_one_process(
    cell: Callable[..., Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # where workers find the data's source
    asked = ["clients=100000", "fraction=0.0001", "rounds=2", "method=UDEC", "evaluation.samples=0"]
    asked += ["data.limit=null", "data.source._target_=many_digits.load", "+data.source.copies=70"]
    here = cell(*asked, "transport=inline")
    there = cell(*asked, "transport=dask", "trainer.workers=2")
    assert len({(row["round"], row["client"]) for row in here.rows("ledger.csv")}) == 2 * 10
    assert len(here.result["client_sha256"]) == 100_000
    for name in ("state_sha256", "client_sha256"):
        assert there.result[name] == here.result[name]
