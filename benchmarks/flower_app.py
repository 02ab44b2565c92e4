"""The work of `flower.py` as a Flower app: FedAvg by its strategy, clients as plain PyTorch loops."""

from functools import cache

import torch
import torch.nn.functional as F
from common import composed
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from fedlight.experiment.build import Parts, build

CLIENTS, ROUNDS, BATCH = 5, 3, 16
SETTINGS = [f"clients={CLIENTS}", f"rounds={ROUNDS}", "epochs=1", f"data.batch_size={BATCH}", "logger=none"]
SETTINGS += ["evaluation.samples=0", "evaluation.grid=0"]

client, server = ClientApp(), ServerApp()


@cache
def parts() -> Parts:
    return build(*composed(*SETTINGS))


@client.train()
def train(message: Message, context: Context) -> Message:
    module, data = parts().module, parts().dataset.train
    own = data.pixels[torch.from_numpy(parts().shares[context.node_config["partition-id"]])]
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


@server.main()
def serve(grid: Grid, context: Context) -> None:
    strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0)
    first = ArrayRecord(parts().module.state_dict())
    result = strategy.start(grid=grid, initial_arrays=first, num_rounds=ROUNDS)
    metrics = result.train_metrics_clientapp
    print("FINISHED", len(result.arrays), metrics[ROUNDS]["train_loss"])  # it exits with 0 when clients fail


def run() -> None:
    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server, client, num_supernodes=CLIENTS, backend_config=resources)
