"""fedlight against Flower's simulation engine: the same model, data and settings, start-up included.

pip install -e '.[bench]' && python benchmarks/flower.py [--quick] [--out FILE.json]

Five clients, three rounds of one local epoch on digits, FULL. Both are commands typed into a shell; Flower's
clients are plain PyTorch loops, one a core.
"""

import os
import subprocess
import sys
import tempfile
from functools import cache, partial

from common import ROOT, composed, in_turns, parser, show, write

CLIENTS, ROUNDS, BATCH = 5, 3, 16
SETTINGS = [f"clients={CLIENTS}", f"rounds={ROUNDS}", "epochs=1", f"data.batch_size={BATCH}", "logger=none"]
SETTINGS += ["evaluation.samples=0", "evaluation.grid=0"]


@cache
def parts():
    from fedlight.parts import build

    return build(*composed(*SETTINGS))


def train(message, context):
    """A client's local update, as Flower calls it."""
    import torch
    import torch.nn.functional as F
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

    module = parts().module
    share = parts().shares[context.node_config["partition-id"]]
    own = parts().dataset.train.pixels[torch.from_numpy(share)]
    module.load_state_dict(message.content["arrays"].to_torch_state_dict())
    optimizer = module.configure_optimizers()
    total = 0.0
    for batch in torch.randperm(len(own)).split(BATCH):
        images = own[batch].float().div_(127.5).sub_(1)
        t = torch.randint(1000, images.shape[:1])
        eps = torch.randn_like(images)
        loss = F.smooth_l1_loss(module.unet(module.schedule.add_noise(images, eps, t), t).sample, eps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(images)
    content = {
        "arrays": ArrayRecord(module.state_dict()),
        "metrics": MetricRecord({"train_loss": total / len(own), "num-examples": len(own)}),
    }
    return Message(content=RecordDict(content), reply_to=message)


def run_flower() -> None:
    from flwr.app import ArrayRecord
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    client, server = ClientApp(), ServerApp()
    client.train()(train)

    @server.main()
    def main(grid, context):
        strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0)
        first = ArrayRecord(parts().module.state_dict())
        strategy.start(grid=grid, initial_arrays=first, num_rounds=ROUNDS)

    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server, client, num_supernodes=CLIENTS, backend_config=resources)


def main() -> None:
    if sys.argv[1:] == ["flower"]:
        run_flower()
        return
    given = parser(__doc__).parse_args()
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}"}

    def act(*command: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(
                [sys.executable, *command], cwd=folder, env=environment, check=True, capture_output=True
            )

    seconds = in_turns(
        {
            "Flower": partial(act, __file__, "flower"),
            "fedlight": partial(act, "-m", "fedlight.run", *SETTINGS),
        },
        repeats=1 if given.quick else 3,
    )
    ratio = seconds["Flower"] / seconds["fedlight"]
    show(
        f"{CLIENTS} clients, {ROUNDS} rounds of one local epoch, digits, FULL, start-up included",
        ["", "seconds", "against Flower"],
        [[name, f"{value:.1f}", f"{seconds['Flower'] / value:.2f}x"] for name, value in seconds.items()],
    )
    write(given.out, {"Flower over fedlight": ratio}, {"seconds": seconds})


if __name__ == "__main__":
    main()
