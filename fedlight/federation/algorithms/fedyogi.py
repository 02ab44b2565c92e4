"""FedYogi (arXiv 2003.00295, algorithm 2): the server steps with Yogi."""

from torch import Tensor

from fedlight.federation.algorithms.fedadam import FedAdam


class FedYogi(FedAdam):
    """FedAdam whose second moment moves towards the squared change in steps of (1 - beta2) times it."""

    def second_moment(self, v: Tensor, squared: Tensor) -> Tensor:
        return v - (1 - self.beta2) * squared * (v - squared).sign()
