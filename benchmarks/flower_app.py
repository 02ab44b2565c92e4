"""A cell's work as a Flower app: FedAvg by its strategy, clients as plain PyTorch loops, one per core.

The cell's overrides are a JSON list in the environment variable `SETTINGS`, which Flower's processes inherit.
"""

import json
import os
import time
from functools import cache

import torch
import torch.nn.functional as F
from common import composed
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from fedlight.experiment.parts import CellParts
from fedlight.experiment.setup import set_up

client, server = ClientApp(), ServerApp()


@cache
def parts() -> CellParts:
    return set_up(composed(*json.loads(os.environ["SETTINGS"]))[1])


def fit(number: int) -> tuple[float, int]:
    """Trains the model for an epoch on a client's images; returns their mean loss and their number."""
    module = parts().model
    own = parts().dataset.train.pixels[torch.from_numpy(parts().client_indices[number])]
    optimizer = module.configure_optimizers()
    total = 0.0
    for batch in torch.randperm(len(own)).split(parts().config.data.batch_size):
        images = own[batch].float().div_(127.5).sub_(1)
        t = torch.randint(1000, images.shape[:1])
        eps = torch.randn_like(images)
        loss = F.smooth_l1_loss(module.unet(module.schedule.add_noise(images, eps, t), t).sample, eps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(images)
    return total / len(own), len(own)


@client.train()
def train(message: Message, context: Context) -> Message:
    module = parts().model
    module.load_state_dict(message.content["arrays"].to_torch_state_dict())
    loss, images = fit(int(context.node_config["partition-id"]))
    content = {
        "arrays": ArrayRecord(module.state_dict()),
        "metrics": MetricRecord({"train_loss": loss, "num-examples": images}),
    }
    return Message(content=RecordDict(content), reply_to=message)


@server.main()
def serve(grid: Grid, context: Context) -> None:
    """Prints the mean loss of the last round and the seconds that it took."""
    config = parts().config
    strategy = FedAvg(fraction_train=config.fraction, fraction_evaluate=0.0)
    arrays = ArrayRecord(parts().model.state_dict())
    for _ in range(config.rounds):
        begun = time.perf_counter()
        result = strategy.start(grid=grid, initial_arrays=arrays, num_rounds=1)
        seconds, arrays = time.perf_counter() - begun, result.arrays
    loss = result.train_metrics_clientapp[1]["train_loss"]  # it exits with 0 when clients fail
    print("FINISHED", json.dumps({"loss": loss, "seconds": seconds}))


def run() -> None:
    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server, client, num_supernodes=parts().config.clients, backend_config=resources)
