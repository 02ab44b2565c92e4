"""Fetches what cells need, for nodes without internet: python -m fedlight.prepare [KEY=VALUE ...]"""

import sys

from omegaconf import DictConfig

from fedlight.command import print_error
from fedlight.hydra_command import run_hydra_command
from fedlight.runtime.errors import BadInput


def main() -> None:
    """Takes the configuration of `fedlight.run`; exits with 0, or with 2 for bad input."""
    if {"-m", "--multirun"} & set(sys.argv):
        sys.exit(print_error(BadInput("prepare takes one configuration at a time; leave out -m")))
    sys.exit(run_hydra_command(prepare))


def prepare(composed: DictConfig) -> None:
    """Loads the data set, and makes the extractor and the reference statistics of the scores.

    Raises:
        BadInput: something cannot be fetched or made.
    """
    from fedlight.config import validate
    from fedlight.data.loading import print_notes
    from fedlight.experiment.setup import set_up

    config = validate(composed)
    parts = set_up(config)
    print_notes(parts.dataset)
    train, test = parts.dataset.train, parts.dataset.test
    print(f"data {config.data.name}: {len(train):,} training and {len(test):,} test images")
    if parts.evaluator is not None:
        extractor, cache = parts.evaluator.extractor, config.evaluation.cache
        accuracy = "" if extractor.accuracy is None else f", test accuracy {extractor.accuracy:.1%}"
        print(f"extractor {extractor.name}: ready{accuracy}; it and its reference statistics are in {cache}")


if __name__ == "__main__":
    main()
