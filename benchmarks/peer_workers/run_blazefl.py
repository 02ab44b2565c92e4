"""The federation by BlazeFL: python run_blazefl.py processes|threads FEDERATION WEIGHTS."""

import sys
import threading
from dataclasses import dataclass
from functools import cache

import torch
import torch.multiprocessing as mp
from blazefl.contrib import FedAvgBaseServerHandler
from blazefl.core import (
    BaseServerHandler,
    IPCMode,
    ProcessPoolClientTrainer,
    SHMHandle,
    ThreadPoolClientTrainer,
    deserialize_model,
)
from federation import Federation, Fit, Report, fit, mean_loss, read
from torch import Tensor, nn


@dataclass
class Downlink:
    """The global model of a round."""

    round: int
    parameters: Tensor


@dataclass
class Uplink:
    """What a client reports."""

    client: int
    parameters: Tensor | SHMHandle
    fit: Fit


@cache
def load(source: str) -> tuple[Federation, nn.Module]:
    """The federation and a UNet, once in a process; the processes of a pool inherit both."""
    federation = read(source)
    return federation, federation.make_unet()


def flatten(unet: nn.Module) -> Tensor:
    """All parameters in one tensor; BlazeFL's `serialize_model` takes no channels-last weights."""
    return torch.cat([tensor.reshape(-1) for tensor in unet.state_dict().values()])


def train(unet: nn.Module, federation: Federation, payload: Downlink, client: int) -> Uplink:
    """A client's update."""
    deserialize_model(unet, payload.parameters)
    done = fit(unet, federation, payload.round, client)
    return Uplink(client, flatten(unet), done)


class Server(BaseServerHandler[Uplink, Downlink]):
    """FedAvg by BlazeFL's own aggregation; the cohorts are those of the federation."""

    def __init__(self, federation: Federation, unet: nn.Module) -> None:
        self.federation = federation
        self.unet = unet
        self.round = 0
        self.fits: list[Fit] = []

    def sample_clients(self) -> list[int]:
        return self.federation.cohorts[self.round]

    def if_stop(self) -> bool:
        return self.round == len(self.federation.cohorts)

    def downlink_package(self) -> Downlink:
        return Downlink(self.round, flatten(self.unet))

    def global_update(self, buffer: list[Uplink]) -> None:
        parameters = [update.parameters for update in buffer]
        self.fits = [update.fit for update in buffer]
        images = [done.images for done in self.fits]
        deserialize_model(self.unet, FedAvgBaseServerHandler.aggregate(parameters, images))
        self.round += 1


class ProcessTrainer(ProcessPoolClientTrainer[Uplink, Downlink, tuple[str, int]]):
    """Clients in a pool of processes; parameters pass through shared memory."""

    def __init__(self, source: str) -> None:
        self.source = source
        federation, unet = load(source)
        self.num_parallels = federation.workers
        self.device = "cpu"
        self.cache: list[Uplink] = []
        self.ipc_mode = IPCMode.SHARED_MEMORY
        self.manager = mp.Manager()
        self.stop_event = self.manager.Event()
        self.buffer = flatten(unet)

    def get_client_config(self, cid: int) -> tuple[str, int]:
        return self.source, cid

    def prepare_uplink_package_buffer(self) -> Uplink:
        return Uplink(-1, self.buffer.clone(), Fit(0.0, 0, 0, 0))

    @staticmethod
    def worker(
        config: tuple[str, int],
        payload: Downlink,
        device: str,
        stop_event: threading.Event,
        *,
        shm_buffer: Uplink | None = None,
    ) -> Uplink:
        source, client = config
        federation, unet = load(source)
        update = train(unet, federation, payload, client)
        shm_buffer.parameters.copy_(update.parameters)
        update.parameters = SHMHandle()
        return update


class ThreadTrainer(ThreadPoolClientTrainer[Uplink, Downlink]):
    """Clients in a pool of threads of this process, with a UNet for each."""

    def __init__(self, source: str) -> None:
        self.federation, _ = load(source)
        self.num_parallels = self.federation.workers
        self.device = "cpu"
        self.cache: list[Uplink] = []
        self.stop_event = threading.Event()
        self.free = [self.federation.make_unet() for _ in range(self.num_parallels)]

    def worker(self, cid: int, device: str, payload: Downlink, stop_event: threading.Event) -> Uplink:
        unet = self.free.pop()
        try:
            return train(unet, self.federation, payload, cid)
        finally:
            self.free.append(unet)


TRAINERS = {"processes": ProcessTrainer, "threads": ThreadTrainer}


def main(mode: str, source: str, out: str) -> None:
    torch.set_num_threads(1)
    federation, _ = load(source)
    server, trainer = Server(federation, federation.make_unet()), TRAINERS[mode](source)
    report = Report()
    report.begin()
    while not server.if_stop():
        trainer.local_process(server.downlink_package(), server.sample_clients())
        uploads, trainer.cache = trainer.cache, []
        server.global_update(uploads)
        fits = server.fits
        report.end_round(mean_loss(fits), sum(done.steps for done in fits), sum(done.seen for done in fits))
    report.print(server.unet.state_dict(), out)


if __name__ == "__main__":
    main(*sys.argv[1:])
