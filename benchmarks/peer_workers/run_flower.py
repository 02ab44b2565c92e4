"""The federation by Flower's simulation, on Ray: python run_flower.py FEDERATION WEIGHTS."""

import os
import sys
import time
from collections.abc import Iterable
from functools import cache

import torch
from federation import Federation, Report, fit, read
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch import nn

SOURCE, OUT = "FEDERATION_SOURCE", "FEDERATION_OUT"  # environment variables, which Ray's actors inherit

client_app, server_app = ClientApp(), ServerApp()


@cache
def load() -> tuple[Federation, nn.Module]:
    """The federation and a UNet, once in an actor."""
    torch.set_num_threads(1)
    federation = read(os.environ[SOURCE])
    return federation, federation.make_unet()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """A client's update. The server names the client: which node hosts it makes no difference."""
    federation, unet = load()
    config = message.content["config"]
    unet.load_state_dict(message.content["arrays"].to_torch_state_dict())
    done = fit(unet, federation, int(config["server-round"]) - 1, int(config["client"]))
    metrics = {"loss": done.loss, "num-examples": done.images, "steps": done.steps, "seen": done.seen}
    content = {"arrays": ArrayRecord(unet.state_dict()), "metrics": MetricRecord(metrics)}
    return Message(content=RecordDict(content), reply_to=message)


class Cohorts(FedAvg):
    """FedAvg over the cohorts of the federation, timed."""

    def __init__(self, federation: Federation, nodes: list[int], report: Report) -> None:
        super().__init__(fraction_evaluate=0.0)
        self.federation = federation
        self.nodes = nodes
        self.report = report

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        messages = []
        for client in self.federation.cohorts[server_round - 1]:
            task = ConfigRecord({"server-round": server_round, "client": client})
            record = RecordDict({"arrays": arrays, "config": task})
            node = self.nodes[client]
            messages.append(Message(content=record, message_type="train", dst_node_id=node))
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        replies = list(replies)
        arrays, metrics = super().aggregate_train(server_round, replies)
        records = [reply.content["metrics"] for reply in replies]
        steps, seen = (sum(record[name] for record in records) for name in ("steps", "seen"))
        self.report.end_round(metrics["loss"], steps, seen)
        return arrays, metrics


@server_app.main()
def serve(grid: Grid, context: Context) -> None:
    federation, unet = load()
    report = Report()
    initial = ArrayRecord(unet.state_dict())
    while len(nodes := sorted(grid.get_node_ids())) < federation.clients:
        time.sleep(0.1)
    strategy = Cohorts(federation, nodes, report)
    report.begin()
    result = strategy.start(grid=grid, initial_arrays=initial, num_rounds=len(federation.cohorts))
    report.print(result.arrays.to_torch_state_dict(), os.environ[OUT])


def run(source: str, out: str) -> None:
    os.environ |= {SOURCE: source, OUT: out}
    workers = read(source).workers
    run_simulation(
        server_app,
        client_app,
        num_supernodes=read(source).clients,
        backend_config={
            "init_args": {"num_cpus": workers},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )


if __name__ == "__main__":
    import run_flower  # by its name, so that actors import it once and keep what it caches

    run_flower.run(*sys.argv[1:])
