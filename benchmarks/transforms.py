"""The cost of encoding and decoding the paper's UNet, beside a local update of 100 steps.

python benchmarks/transforms.py [--quick] [--out FILE.json]

The whole UNet is exchanged (method FULL), a delta of random numbers. In a round a client decodes its
broadcast and encodes its update, and the server decodes the update; once per round, for any number of
clients, the server encodes the broadcasts. A step is forward, backward and Adam of 128 images of 28x28, fp32.
One thread for all.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import ROOT, composed, in_turns, parser, show, write
from hydra.utils import instantiate
from torch import nn

from fedlight.federation.codec import Codec
from fedlight.federation.messages import State
from fedlight.runtime.memory import keep_freed_memory

STEPS = 100  # of a local update
BATCH = 128  # images
PAPER = ("experiment=paper", "logger=none")


class Exchange:
    """A delta of the UNet through the uplink of one transform."""

    def __init__(self, name: str, received: State, trained: State) -> None:
        stages: Any = composed(*PAPER, f"transform={name}")[0].transform.up
        self._codec = Codec([instantiate(stage) for stage in stages])
        self._received, self._trained = received, trained

    def encode(self) -> None:
        draws = np.random.default_rng(0)
        self.payload, self.errors = self._codec.encode(self._trained, self._received, {}, draws, "the UNet")

    def decode(self) -> None:
        self._codec.decode(self.payload, self._received)


def make_step(unet: nn.Module) -> Any:
    x, eps = torch.randn(2, BATCH, 1, 28, 28)
    t = torch.randint(0, 1000, (BATCH,))
    optimizer = torch.optim.Adam(unet.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        F.smooth_l1_loss(unet(x, t).sample, eps).backward()
        optimizer.step()

    return step


def main() -> None:
    given = parser(__doc__).parse_args()
    torch.manual_seed(0)
    unet = instantiate(composed(*PAPER)[0].model.unet, _convert_="all").to(memory_format=torch.channels_last)
    received = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    trained = {name: tensor + 1e-3 * torch.randn_like(tensor) for name, tensor in received.items()}
    size = sum(tensor.nbytes for tensor in received.values())
    names = sorted({path.stem for path in (ROOT / "configs/transform").glob("*.yaml")} - {"none"})
    exchanges = {name: Exchange(name, received, trained) for name in names}
    acts = {"step": make_step(unet)}
    for name, exchange in exchanges.items():
        acts |= {f"{name} encode": exchange.encode, f"{name} decode": exchange.decode}
    seconds = in_turns(acts, 3 if given.quick else 7)
    update = STEPS * seconds["step"]
    rows, shares = [], {}
    for name, exchange in exchanges.items():
        encode, decode = seconds[f"{name} encode"], seconds[f"{name} decode"]
        crossed = sum(tensor.nbytes for tensor in exchange.payload.tensors.values())
        owed = sum(tensor.nbytes for tensor in exchange.errors.values())
        shares[name] = (encode + 2 * decode) / update
        rows.append(
            [
                name,
                f"{1e3 * encode:.0f}",
                f"{1e3 * decode:.0f}",
                f"{shares[name]:.2%}",
                f"{crossed / size:.1%}",
                f"{owed / 2**20:.1f}",
            ]
        )
    show(
        f"{size / 2**20:.1f} MiB of fp32; an update of {STEPS} steps takes {update:.0f} s",
        ["transform", "encode, ms", "decode, ms", "of an update", "bytes", "error feedback, MiB"],
        rows,
    )
    write(
        given.out,
        {f"an update over {name}": 1 / share for name, share in shares.items()},
        {"seconds": seconds},
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    keep_freed_memory()
    main()
