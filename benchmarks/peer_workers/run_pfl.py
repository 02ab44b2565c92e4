"""The federation by pfl-research (PyPI: pfl), its simulated backend: python run_pfl.py FEDERATION WEIGHTS.

In several processes: torchrun --standalone --nproc_per_node=N run_pfl.py FEDERATION WEIGHTS.
"""

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from federation import Federation, Report, diffusion_loss, read, shuffled_batches
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam import NNTrainHyperParams
from pfl.internal.ops.pytorch_ops import distributed
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn

from fedlight.diffusion.unet import ConvNextUNet


class Module(nn.Module):
    """The UNet with the two methods that pfl calls; it counts what is trained in this process.

    Attributes:
        rng: source of the draws of the client in training; None in evaluation.
        total: sum of the losses of all images, over the last epochs of the clients of a round.
        images: of the clients of a round.
        steps: optimizer steps of a round.
        seen: images of the steps of a round.
    """

    def __init__(self, unet: ConvNextUNet, alpha_bar: Tensor) -> None:
        super().__init__()
        self.unet = unet
        self.alpha_bar = alpha_bar
        self.rng: torch.Generator | None = None
        self.start_epoch()
        self.start_round()

    def start_round(self) -> None:
        self.total, self.images, self.steps, self.seen = 0.0, 0, 0, 0

    def start_epoch(self) -> None:
        self.epoch_total = torch.zeros(())

    def loss(self, x_0: Tensor) -> Tensor:
        value = diffusion_loss(self.unet, x_0, self.alpha_bar, self.rng)
        self.epoch_total += value.detach() * len(x_0)
        self.steps += 1
        self.seen += len(x_0)
        return value

    def metrics(self, x_0: Tensor) -> dict[str, Any]:
        return {}


class User(Dataset):
    """The images of a client; an epoch in training is in random order."""

    def __init__(self, images: Tensor, client: int, module: Module) -> None:
        super().__init__(raw_data=(images,), user_id=client)
        self.module = module

    def iter(self, batch_size: int | None) -> Iterator[Any]:
        if self.module.rng is None:  # pfl evaluates each client in the first round; there are no metrics
            yield self.raw_data
            return
        self.module.start_epoch()
        for x_0 in shuffled_batches(self.raw_data[0], batch_size, self.module.rng):
            yield (x_0,)


class SeededAveraging(FederatedAveraging):
    """FedAvg whose clients draw from the federation's seeds."""

    def __init__(self, federation: Federation) -> None:
        super().__init__()
        self.federation = federation

    def train_one_user(self, initial_model_state, model, user_dataset, central_context):
        module, round_ = model.pytorch_model, central_context.current_central_iteration
        module.rng = torch.Generator().manual_seed(self.federation.seed(round_, user_dataset.user_id))
        trained = super().train_one_user(initial_model_state, model, user_dataset, central_context)
        module.rng = None
        module.total += module.epoch_total.item()
        module.images += len(user_dataset)
        return trained


class Timer(TrainingProcessCallback):
    """Marks the rounds."""

    def __init__(self, report: Report, module: Module) -> None:
        self.report = report
        self.module = module

    def on_train_begin(self, *, model: PyTorchModel) -> Metrics:
        self.report.begin()
        return Metrics()

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        module = self.module
        self.last_round = (module.total, module.images)
        self.report.end_round(module.total / max(1, module.images), module.steps, module.seen)
        module.start_round()
        return False, Metrics()


def order_of_users(federation: Federation, rank: int, processes: int) -> Iterator[int]:
    """The clients as pfl's sampler draws them: one for each process in turn, of which a process keeps one.

    A process stops drawing after its share of the cohort, so that the last draws of an uneven cohort are
    made by some processes only.
    """
    for cohort in federation.cohorts:
        share = len(range(rank, len(cohort), processes))
        yield from (cohort + cohort[:processes])[: share * processes]


def main(source: str, out: str) -> None:
    torch.set_num_threads(1)
    np.random.seed(0)  # noqa: NPY002  # pfl's source of randomness
    federation = read(source)
    module = Module(federation.make_unet(), federation.alpha_bar)
    model = PyTorchModel(
        module,
        local_optimizer_create=partial(torch.optim.Adam, fused=True),
        central_optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
    )
    users = partial(next, order_of_users(federation, distributed.global_rank, distributed.world_size))
    dataset = FederatedDataset(lambda client: User(federation.images(client), client, module), users)
    report = Report()
    rounds, cohort = len(federation.cohorts), len(federation.cohorts[0])
    SeededAveraging(federation).run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=rounds,
            evaluation_frequency=rounds,
            train_cohort_size=cohort,
            val_cohort_size=None,
        ),
        backend=SimulatedBackend(dataset, dataset, [WeightByDatapoints()]),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=federation.epochs,
            local_learning_rate=federation.learning_rate,
            local_batch_size=federation.batch_size,
        ),
        callbacks=[timer := Timer(report, module)],
        send_metrics_to_platform=False,
    )
    counts = torch.tensor([*timer.last_round, report.steps, report.images], dtype=torch.float64)
    if distributed.world_size > 1:
        torch.distributed.all_reduce(counts)
        torch.distributed.destroy_process_group()
    if distributed.global_rank == 0:
        report.loss = float(counts[0] / counts[1])
        report.steps, report.images = int(counts[2]), int(counts[3])
        report.print(module.unet.state_dict(), out)


if __name__ == "__main__":
    main(*sys.argv[1:])
