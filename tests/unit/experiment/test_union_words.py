"""Keys that take values of several types: one reason, in words."""

import pytest
from composed import config

from fedlight.config import UNIONS
from fedlight.runtime.errors import BadInput

WORDS = {
    "evaluation.clients": "'all' or an integer of at least 1",
    "trainer.fuse": "an integer of at least 1, 'auto' or null",
    "method.downlink": "'all' or a list of texts",
    "method.uplink": "'all' or a list of texts",
    "finetuning.rank": "an integer of at least 1, a list of integers of at least 1 or null",
}


@pytest.mark.parametrize("key", WORDS)
def test_what_a_key_takes_is_said_once(key: str) -> None:
    group = ["finetuning=lora"] if key.startswith("finetuning") else []
    with pytest.raises(BadInput) as refused:
        config(*group, f"{key}=0.5")
    assert str(refused.value) == f"{key} must be {WORDS[key]}; got 0.5"


def test_every_such_key_has_its_words() -> None:
    assert UNIONS.keys() == WORDS.keys() | {"data.range"}  # which has a message of its own
    with pytest.raises(BadInput, match=r"^data\.range: must be type, measured, or two numbers"):
        config("++data.range=odd")
