"""The sentence on top of the page."""

import pytest
from scored import make_comparison

from fedlight.reporting.headline import headline

SPREAD = [0.0, 0.1, -0.1]


def near(fid: float, scale: float = 1.0) -> list[float]:
    """Three seeds around a FID."""
    return [fid + scale * deviation for deviation in SPREAD]


def test_costs_and_savings_are_said_in_numbers() -> None:
    text = headline(make_comparison({"FULL": [10, 10, 10], "UDEC": [11.0, 10.9, 11.1]}))
    assert text == (
        "Over 3 seeds, FULL is best; "
        "against FULL, UDEC costs 10 % of FID (8 to 13 %) for 65 % fewer parameters."
    )


def test_a_difference_within_the_spread_is_level() -> None:
    text = headline(make_comparison({"FULL": [10, 12, 11], "UDEC": [12, 11, 12], "USPLIT": [30, 33, 31.5]}))
    assert "FULL and UDEC are level and ahead of the others" in text
    assert "UDEC is level for 65 % fewer" in text
    assert "USPLIT has 2.9 times the FID" in text


def test_methods_that_are_all_level_have_no_best() -> None:
    text = headline(make_comparison({"FULL": [10, 12, 11], "UDEC": [12, 11, 12]}))
    assert text == "Over 3 seeds, against FULL, UDEC is level for 65 % fewer parameters."


def test_with_one_seed_nothing_is_said_of_quality() -> None:
    text = headline(make_comparison({"FULL": [10], "UDEC": [100]}))
    assert text == (
        "One seed, so differences in FID may be chance; against FULL, UDEC exchanges 65 % fewer parameters."
    )


def test_rows_are_named_where_one_is_different_and_counted_where_many_are() -> None:
    one = {"FULL": near(10), "UDEC": near(20, -1)}
    level = {"FULL": [10, 12, 11], "UDEC": [12, 11, 12]}
    assert "FULL is best with 3 clients;" in headline(make_comparison([level, one, level]))
    assert "FULL is best in 3 of 4 rows;" in headline(make_comparison([one, one, one, level]))
    assert "FULL is best in all 2 rows; against FULL, on average over 2 rows," in headline(
        make_comparison([one, one])
    )


def test_an_average_over_rows_has_the_interval_of_its_seeds() -> None:
    """Each row alone is level; over both, the seeds agree on 10 %."""
    rows = [{"FULL": [10, 10, 10], "UDEC": [12, 10, 11]}, {"FULL": [10, 10, 10], "UDEC": [10, 12, 11]}]
    text = headline(make_comparison(rows))
    assert "best" not in text
    assert "on average over 2 rows, UDEC costs 10 % of FID (9 to 10 %)" in text


@pytest.mark.parametrize("fids", [{"FULL": [1, 2]}, {"FULL": [1, 2], "CENTRAL": [1, 2], "LOCAL": [1, 2]}, {}])
def test_without_two_federated_methods_nothing_is_said(fids: dict[str, list[float]]) -> None:
    assert headline(make_comparison(fids)) == ""
