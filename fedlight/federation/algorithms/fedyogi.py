"""FedYogi (arXiv 2003.00295, algorithm 2): the server steps with Yogi."""

from torch import Tensor

from fedlight.federation.algorithms.fedadam import FedAdam


class FedYogi(FedAdam):
    """As FedAdam, but for a second moment that grows and shrinks at a pace of its own."""

    def second_moment(self, v: Tensor, squared: Tensor) -> Tensor:
        return v - (1 - self.beta2) * squared * (v - squared).sign()
