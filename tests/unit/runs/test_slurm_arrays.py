"""Cells are split into job arrays by SLURM's MaxArraySize."""

import pytest

from fedlight.runtime.slurm_jobs import parse_max_array_size
from hydra_plugins.fedlight_sweeps.slurm import split_into_arrays

SHOWN = """\
Configuration data as of 2026-01-01T00:00:00
AccountingStorageBackupHost = (null)
LogTimeFormat           = iso8601_ms
MailDomain              = (null)
MaxArraySize            = {size}
MaxBatchRequeue         = 5
MaxJobCount             = 10000
"""


@pytest.mark.parametrize(
    ("shown", "size"),
    [
        (SHOWN.format(size=1001), 1001),
        (SHOWN.format(size=4), 4),
        (SHOWN.format(size=0), None),
        ("", None),
        ("slurm_load_ctl_conf error: Unable to contact slurm controller", None),
    ],
)
def test_the_maximum_array_size_is_parsed_from_scontrol(shown: str, size: int | None) -> None:
    assert parse_max_array_size(shown) == size


@pytest.mark.parametrize(
    ("count", "limit", "sizes"),
    [
        (1000, 1001, [1000]),
        (1001, 1001, [1001]),
        (1002, 1001, [1001, 1]),
        (7, 3, [3, 3, 1]),
        (7, None, [7]),
        (0, 3, []),
    ],
)
def test_a_grid_is_split_in_order_into_as_few_arrays_as_the_limit_allows(
    count: int, limit: int | None, sizes: list[int]
) -> None:
    """MaxArraySize is one above the largest index, and the first index is 0."""
    cells = [f"cell{number}" for number in range(count)]
    parts = split_into_arrays(cells, limit)
    assert [len(part) for part in parts] == sizes
    assert [cell for part in parts for cell in part] == cells
