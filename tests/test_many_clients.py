"""A cell of many clients costs what its cohorts cost."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import Cell

from fedlight.federation.cohort import draw_poisson
from fedlight.federation.site import Site


def test_clients_that_never_took_part_are_asked_once_for_all(
    cell: Callable[..., Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    evaluate = Site.evaluate

    def noted(site: Site, request: Any) -> Any:
        asked.append(request.client)
        return evaluate(site, request)

    monkeypatch.setattr(Site, "evaluate", noted)
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
