"""The rows of a cell's tables."""

from pathlib import Path
from types import SimpleNamespace

from toy import federate, inline, toy_server, toy_setup, toy_site

from fedlight.experiment.result import round_record


def test_a_row_of_rounds_counts_both_directions(tmp_path: Path) -> None:
    setup = toy_setup()
    server = toy_server(setup)
    (done,) = federate(server, inline(toy_site(setup, tmp_path)), 1)
    config = SimpleNamespace(clients=2)
    row = round_record(done, 2.5, server, {"value": 7.0}, config)["row"]  # type: ignore[arg-type]
    params = 2 * sum(tensor.numel() for tensor in server.theta.values())
    known = {"round": 1, "participants": 2, "reports": 2, "fid": 7.0, "seconds": 2.5}
    sent = {"params_down": params, "params_up": params, "params_cumulative": 2 * params}
    expected = {**known, **sent, "bytes_cumulative": 8 * params}
    assert {key: row[key] for key in expected} == expected
