"""Toy federations under secure aggregation."""

from dataclasses import replace
from typing import Any

from toy import toy_setup

from fedlight.federation.client import ClientSetup
from fedlight.federation.cohort import Participation
from fedlight.federation.secure.fixed_point import FixedPoint
from fedlight.federation.secure.secure_sum import SecureAggregation
from fedlight.federation.server import Server

FIXED = FixedPoint(clip=8.0, bits=16, modulus_bits=32)


def secure_setup(*arguments: Any, fields: dict[str, Any] | None = None, **chosen: Any) -> ClientSetup:
    """A toy setup with secure aggregation; `fields` are those of SecureAggregation."""
    setup = toy_setup(*arguments, **chosen)
    values = {"fixed": FIXED, "threshold": None, **(fields or {})}
    secure = SecureAggregation(slices=setup.slices, algorithm=setup.algorithm, seed=setup.seed, **values)
    return replace(setup, secure=secure)


def secure_server(setup: ClientSetup, clients: int = 3) -> Server:
    return Server(
        "toy",
        setup.method,
        setup.slices,
        setup.first,
        Participation(clients, 1.0, 0.0, setup.seed, poisson=setup.privacy is not None),
        setup.algorithm,
        setup.codec,
        privacy=setup.privacy,
        secure=setup.secure,
    )
