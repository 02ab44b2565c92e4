"""The sections `trainer`, `algorithm`, `transform`, `transport`, `privacy`, `aggregation`, `federation`."""

from typing import Annotated, Literal

from pydantic import Field

from fedlight.runtime.section import OpenSection, PositiveInt, Section, Sparse, Target

TRAINER_ARGUMENTS = frozenset(
    {
        "accumulate_grad_batches",
        "benchmark",
        "detect_anomaly",
        "deterministic",
        "gradient_clip_algorithm",
        "gradient_clip_val",
        "limit_train_batches",
        "max_steps",
    }
)
"""What a configuration may add to a client's Trainer. The federation decides others (devices, nodes, epochs,
loggers), and the rest makes a result depend on time, or has no effect on training."""


class TrainerConfig(OpenSection, Sparse):
    """The client's Lightning Trainer; further keys go to it."""

    always = frozenset({"compile", "workers"})

    accelerator: str
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"]
    threads: PositiveInt | None
    compile: bool = False
    workers: PositiveInt | None = None
    fuse: PositiveInt | Literal["auto"] | None = None


class ExtensionConfig(OpenSection):
    """An algorithm or a transport: a class and its arguments."""

    name: str
    target: Annotated[str, Field(alias="_target_")]


class TransformConfig(Section, Sparse):
    """Compression of uplink and downlink, stage by stage, and whether the first model is sent at all."""

    name: str
    up: list[Target] = Field([])
    down: list[Target] = Field([])
    seeded_start: bool = False


class PrivacyConfig(Section):
    """The differential privacy guarantee: of clients (DP-FedAvg) or of single images (DP-SGD)."""

    name: Literal["client", "example"]
    noise: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    clip: Annotated[float, Field(gt=0)]
    delta: Annotated[float, Field(gt=0, lt=1)]
    target_epsilon: Annotated[float, Field(gt=0)] | None = None
    noise_at: Literal["server", "clients"] | None = None
    clip_quantile: Annotated[float, Field(gt=0, lt=1)] | None = None
    draws: PositiveInt | None = None
    secure_noise: bool = False


class AggregationConfig(Section, Sparse):
    """Secure aggregation: the server learns sums of updates and no single update."""

    always = frozenset({"threshold"})

    name: Literal["secure"]
    threshold: Annotated[int, Field(ge=2)] | None = None
    modulus_bits: Literal[16, 24, 32, 40, 48, 56, 64]
    clip: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    bits: Annotated[int, Field(ge=2, le=32)]
    share: Annotated[float, Field(gt=0, le=1)] = 1.0


class FederationConfig(Section):
    """Simulated faults."""

    dropout: Annotated[float, Field(ge=0, le=1)]
