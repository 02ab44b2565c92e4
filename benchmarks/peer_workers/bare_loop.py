"""FedAvg as a plain loop in one process, for reference: python bare_loop.py FEDERATION WEIGHTS."""

import sys

import torch
from federation import Report, fit, mean_loss, read


def main(source: str, out: str) -> None:
    torch.set_num_threads(1)
    federation = read(source)
    unet = federation.make_unet()
    state = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    report = Report()
    report.begin()
    for round_, cohort in enumerate(federation.cohorts):
        sums = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        fits = []
        for client in cohort:
            unet.load_state_dict(state)
            fits.append(fit(unet, federation, round_, client))
            for name, tensor in unet.state_dict().items():
                sums[name].add_(tensor, alpha=fits[-1].images)
        images = sum(done.images for done in fits)
        state = {name: total / images for name, total in sums.items()}
        report.end_round(mean_loss(fits), sum(done.steps for done in fits), sum(done.seen for done in fits))
    report.print(state, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
