"""Which cells may set `trainer.fuse`, and what it does to their id."""

import pytest
from composed import config

from fedlight.data.loading import load
from fedlight.experiment.setup import assemble
from fedlight.runs.identity import cell_id
from fedlight.runtime.errors import BadInput


def test_only_a_number_is_part_of_the_id() -> None:
    plain, null, two = (
        cell_id(config(*key).plain()) for key in ((), ("trainer.fuse=null",), ("trainer.fuse=2",))
    )
    assert plain == null != two


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.compile=true", "needs trainer.compile=false"),
        ("privacy=example", "needs privacy=client or none"),
        ("transport=flower", "needs transport=inline, processes or dask"),
        ("optimizer._target_=torch.optim.Adafactor", "Adafactor is not one of ASGD,"),
    ],
)
def test_what_cannot_be_fused_is_refused_in_one_line(override: str, message: str) -> None:
    more = ("~optimizer.fused",) if override.startswith("optimizer") else ()
    cell = config("trainer.fuse=4", override, *more)
    with pytest.raises(BadInput, match=message) as refused:
        assemble(cell, load(cell.data))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("model", ["tiny", "unet2d"])
def test_the_shipped_models_and_algorithms_can_be_fused(model: str) -> None:
    for algorithm in ("none", "fedavgm", "fedprox", "scaffold", "fednova", "fedadam", "fedyogi", "localadam"):
        cell = config("trainer.fuse=4", f"model={model}", f"algorithm={algorithm}", "model.conditional=true")
        assemble(cell, load(cell.data))
