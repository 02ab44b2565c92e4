"""The table of differences between methods, paired by seed."""

from fedlight.reporting import numbers
from fedlight.reporting.comparison import Comparison
from fedlight.reporting.summaries import place_data, place_fields, place_heads
from fedlight.reporting.tables import Field, ReportTable, number

LEVEL, DIFFERENT = "level", "different"
NOTE = (
    "Differences in FID between federated methods on equal seeds, for all pairs of a row above. In brackets: "
    "intervals (t) that hold together for all pairs of a row with 95 % confidence (Bonferroni); level: "
    "the interval holds zero. p: of the pair alone. Seeds change the training, and the partition where "
    "partition.seed varies."
)
HEADS = ["lower FID", "higher FID", "difference", "interval", "relative", "p", "seeds", "verdict"]


def differences(comparison: Comparison, prefix: str) -> ReportTable | None:
    """A row for each pair of federated methods in each place; None where no pair has two equal seeds."""
    heads, numeric = place_heads(comparison)
    rows, data = [], []
    for place in comparison.places:
        for (lower, higher), difference in comparison.differences(place).items():
            if difference is None:
                continue
            (mean, low, high), p, pairs = difference
            base = comparison.groups[place, lower].fid or 0.0
            relative = mean / base if base else None
            verdict = LEVEL if difference.is_level else DIFFERENT
            rows.append(
                [
                    *place_fields(comparison, place),
                    Field(lower, lower),
                    Field(higher, higher),
                    Field(numbers.change(mean, base), mean),
                    Field(numbers.interval(low, high, base), high - low),
                    number(relative, numbers.percent),
                    Field(f"{p:.2g}", p),
                    Field(str(pairs), pairs),
                    Field(verdict, verdict),
                ]
            )
            named = {"lower": lower, "higher": higher, "difference": mean, "low": low, "high": high}
            named |= {"relative": relative, "p": p, "seeds": pairs, "verdict": verdict}
            data.append(place_data(comparison, place) | named)
    if not rows:
        return None
    numeric |= {"difference", "interval", "relative", "p", "seeds"}
    return ReportTable(
        f"{prefix}differences",
        "Differences between methods",
        NOTE,
        [*heads, *HEADS],
        numeric,
        rows,
        data,
        is_folded=True,
    )
