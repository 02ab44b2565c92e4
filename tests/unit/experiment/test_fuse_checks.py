"""Which cells may set `trainer.fuse`, and what it does to their id."""

from dataclasses import replace

import pytest
from composed import config

from fedlight.data.loading import load
from fedlight.diffusion.depthwise import DepthwiseConv
from fedlight.experiment import estimate, fusing, step_time
from fedlight.experiment.setup import assemble
from fedlight.experiment.trial import check
from fedlight.runs.identity import cell_id
from fedlight.runtime.errors import BadInput


def test_null_is_no_part_of_the_id() -> None:
    keys = ((), ("trainer.fuse=null",), ("trainer.fuse=2",), ("trainer.fuse=auto",))
    plain, null, two, auto = (cell_id(config(*key).plain()) for key in keys)
    assert plain == null
    assert len({plain, two, auto}) == 3


@pytest.mark.parametrize(
    ("overrides", "number"),
    [
        ((), 3),  # five clients
        (("clients=1000", "fraction=0.1", "data.limit=null"), 32),
        (("clients=40",), 20),
        (("clients=40", "trainer.workers=7"), 20),
        (("clients=40", "fraction=0.1"), 2),
        (("clients=2",), 1),
        (("method=CENTRAL",), 1),
        (("model.unet.dim=32",), 1),
        (("privacy=example",), 1),
        (("trainer.compile=true",), 1),
        (("transport=flower",), 1),
    ],
    ids=str,
)
def test_auto_is_a_function_of_the_configuration(overrides: tuple[str, ...], number: int) -> None:
    """Half a cohort, up to 32 clients, where steps are small and clients can be fused."""
    cell = config("trainer.fuse=auto", "trainer.accelerator=cpu", *overrides)
    parts = assemble(cell, load(cell.data))
    assert parts.fuse == number
    stacked = {layer.stacked for layer in parts.model.modules() if isinstance(layer, DepthwiseConv)}
    assert stacked == {number > 1}


@pytest.mark.parametrize(
    ("overrides", "number"),
    [
        (("evaluation.grid=8",), 4),
        (("evaluation.samples=30",), 4),
        (("evaluation.samples=500",), 1),  # calls do not bound the denoising of so many images
        (("evaluation.samples=30", "model.conditional=true", "evaluation.guidance=3"), 1),
        (("evaluation.grid=0",), 1),
        (("evaluation.grid=8", "method=FULL"), 1),
        (("evaluation.grid=8", "trainer.fuse=null"), 1),
    ],
    ids=str,
)
def test_few_images_are_drawn_from_several_models_together(overrides: tuple[str, ...], number: int) -> None:
    cell = config("trainer.fuse=4", "trainer.accelerator=cpu", "method=UDEC", *overrides)
    parts = replace(assemble(cell, load(cell.data)), fuse=cell.trainer.fuse or 1)
    assert fusing.choose_drawn_together(parts) == number


def test_auto_fuses_as_many_clients_as_fit_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = config("trainer.fuse=auto", "trainer.accelerator=cpu", "clients=40")
    parts = assemble(cell, load(cell.data))
    once = 4 * sum(tensor.nbytes for tensor in parts.model.state_dict().values())
    monkeypatch.setattr(fusing, "MEMORY", 7 * once + 1)
    assert assemble(cell, load(cell.data)).fuse == 7


def test_the_plan_says_what_auto_picks(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(settings: str, parts: object, batch: int, fuse: int = 1) -> float:
        return 1.0 if fuse == 1 else fuse / 2.5

    monkeypatch.setattr(step_time, "_step_seconds", seconds)
    notes = []
    for overrides in (("trainer.fuse=auto",), ("trainer.fuse=auto", "clients=2"), ("trainer.fuse=3",), ()):
        parts = check(config("trainer.accelerator=cpu", "trainer.workers=2", *overrides), elsewhere=False)
        assert parts
        notes.append(estimate.describe_fuse(parts))
    assert notes == [
        "trainer.fuse=auto trains up to 3 clients at once, 2.5 times as fast a step here",
        "trainer.fuse=auto trains each client alone",
        None,
        "trainer.fuse=3 would train 3 clients at once, 2.5 times as fast a step",
    ]


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
