"""Buffers, such as BatchNorm's running statistics: averaged, sent uncompressed, stepped by no optimizer."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fedlight.federation.algorithms.fedadam import FedAdam
from fedlight.federation.algorithms.fedavg import FedAvg
from fedlight.federation.algorithms.fedavgm import FedAvgM
from fedlight.federation.algorithms.fednova import FedNova
from fedlight.federation.algorithms.fedyogi import FedYogi
from fedlight.federation.algorithms.scaffold import Scaffold
from fedlight.federation.codec import Codec
from fedlight.federation.cohort import Participation
from fedlight.federation.messages import AUX, Payload, Update
from fedlight.federation.method import Method
from fedlight.federation.server import Server
from fedlight.federation.slices import SliceMap, buffer_names
from fedlight.federation.transforms.quantisation import Quantisation
from fedlight.federation.transforms.sign import Sign

MODEL = nn.Sequential(nn.Conv1d(1, 3, 1), nn.BatchNorm1d(3))
SLICES = SliceMap.build({"all": ["0", "1"]}, MODEL.state_dict(), buffers=buffer_names(MODEL))
FULL = Method(name="FULL", downlink="all", uplink="all", evaluate="global").resolve(["all"])
SIZES = (3, 5)
ALGORITHMS = [FedAvg(), FedAvgM(0.9, 2.0), FedAdam(0.5, 0.5, 0.9, 0.01), FedYogi(0.5, 0.5, 0.9, 0.01)]


def trained(round_: int, client: int) -> dict[str, Tensor]:
    """What a client reports: variances that fall from round to round, as they do while a network settles."""
    generator = torch.Generator().manual_seed(10 * round_ + client)
    state = {name: tensor.clone() for name, tensor in MODEL.state_dict().items()}
    state["0.weight"] = torch.randn(state["0.weight"].shape, generator=generator)
    state["1.running_var"] = torch.rand(3, generator=generator) * 0.1**round_
    state["1.running_mean"] = torch.randn(3, generator=generator)
    state["1.num_batches_tracked"] = torch.tensor(7 * round_ + client)
    return state


def names_of(algorithm: FedAvg) -> str:
    return type(algorithm).__name__


def test_tensors_that_are_no_parameters_are_buffers() -> None:
    assert buffer_names(MODEL) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tied[1].weight = tied[0].weight
    assert buffer_names(tied) == set()


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, FedNova(), Scaffold()], ids=names_of)
def test_the_server_averages_buffers_with_every_algorithm(algorithm: FedAvg) -> None:
    server = Server("bn", FULL, SLICES, MODEL.state_dict(), Participation(2, 1.0, 0.0, 0), algorithm, Codec())
    for round_ in range(1, 5):
        server.start_round()
        before = server.theta["0.weight"].clone()
        for client, images in enumerate(SIZES):
            state = trained(round_, client)
            aux, _ = algorithm.report(
                SLICES.parameters(server.theta), SLICES.parameters(state), {}, {}, steps=2
            )
            payloads = {"all": Payload.plain(state)} | ({AUX: Payload.plain(aux)} if aux else {})
            server.receive(Update("bn", round_, client, images, 0.5, payloads))
        server.finish_round()
        weights = (1, 1) if isinstance(algorithm, Scaffold) else SIZES
        for name in ("1.running_var", "1.running_mean"):
            mean = sum(n * trained(round_, k)[name].double() for k, n in enumerate(weights)) / sum(weights)
            torch.testing.assert_close(server.theta[name].double(), mean, rtol=1e-6, atol=1e-9)
        assert server.theta["1.num_batches_tracked"] == 7 * round_ + 1
        assert not torch.equal(server.theta["0.weight"], before)
        assert not {key for key in server.state if "running" in key}


@pytest.mark.parametrize("stage", [Quantisation(2), Sign()], ids=["int2", "sign"])
def test_no_transform_changes_a_buffer(stage: object) -> None:
    """Encoded with the weights, a variance of 1e-6 would be off by more than itself."""
    import numpy as np

    codec = Codec([stage], buffers=SLICES.buffers)
    received, state = MODEL.state_dict(), trained(6, 0)
    payload, lost = codec.encode(state, received, {}, np.random.default_rng(0), "slice all")
    values = codec.decode(payload, received)
    for name in SLICES.buffers:
        assert torch.equal(values[name], state[name])
    assert lost.keys() == SLICES.parameters(state).keys()
    assert not torch.equal(values["0.weight"], state["0.weight"])
    assert payload.params == sum(tensor.numel() for tensor in state.values())


BACKBONE = """
import torch
from types import SimpleNamespace
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config

class Net(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, track: bool = True):
        super().__init__()
        self.norm = torch.nn.BatchNorm2d(1)
        if not track:
            self.norm.num_batches_tracked = None
        self.out = torch.nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x, t):
        return SimpleNamespace(sample=self.out(self.norm(x)))
"""
MODEL_YAML = """
name: bn
unet: {{_target_: {module}.Net, track: {track}}}
schedule: {{_target_: diffusers.DDPMScheduler, num_train_timesteps: 10}}
loss: mse
ema_decay: null
exchange_ema: false
slices: {{all: [norm, out]}}
"""


@pytest.mark.parametrize(
    ("privacy", "tracked", "why"),
    [("client", "false", "which noise would spoil"), ("example", "true", "made of images without noise")],
)
def test_private_training_of_a_model_with_buffers_is_refused(
    privacy: str,
    tracked: str,
    why: str,
    command: Callable[..., int],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "my" / "model").mkdir(parents=True)
    (tmp_path / "buffered_net.py").write_text(BACKBONE)
    text = MODEL_YAML.format(module="buffered_net", track=tracked)
    (tmp_path / "my" / "model" / "bn.yaml").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert command("--config-dir", "my", "model=bn", f"privacy={privacy}", "data.limit=50", "clients=2") == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line == (
        f"fedlight: error: privacy={privacy} needs parameters alone: unet.norm.running_mean, "
        f"unet.norm.running_var is a buffer, {why}"
    )
