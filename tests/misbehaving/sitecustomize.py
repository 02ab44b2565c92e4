"""An institution that misbehaves in some rounds: Python reads this file by itself where it is on PYTHONPATH.

MISBEHAVE is JSON: round: what is done to the update, or `until FILE`, which waits for a file first.
"""

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

if "fedlight.experiment.resident" in sys.orig_argv:
    import torch

    from fedlight.experiment.deployed import Institution
    from fedlight.federation.messages import Payload, from_bytes, to_bytes

    honest, acts = Institution.answer, json.loads(os.environ["MISBEHAVE"])

    def answer(institution: Institution, content: bytes) -> bytes:
        act = acts.get(str(from_bytes(content).round), "")
        while act.startswith("until ") and not Path(act.removeprefix("until ")).exists():
            time.sleep(0.1)
        update = honest(institution, content)
        if act == "flip":
            return update[:12] + bytes([update[12] ^ 1]) + update[13:]
        message = from_bytes(update)
        (slice_, payload), *_ = message.payloads.items()
        name = min(payload.tensors)
        tensors = {
            "shape": {name: torch.zeros(3)},
            "name": {"theirs": torch.zeros(3)},
            "nan": {name: payload.tensors[name] * torch.nan},
        }
        if act in tensors:
            changed = Payload({**payload.tensors, **tensors[act]}, payload.params)
            return to_bytes(replace(message, payloads={slice_: changed}))
        if act == "slice":
            return to_bytes(replace(message, payloads={**message.payloads, "encoder": payload}))
        return update

    Institution.answer = answer  # type: ignore[method-assign]
