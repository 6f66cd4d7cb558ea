"""What `pi0 bench --serve` measures, on a server whose engine takes a known time."""

from __future__ import annotations

from dataclasses import asdict

import pytest
from serving import WIDTH, StateEngine, make_policy, running

from pi0.cli.bench_serve import print_rows
from pi0.errors import Pi0Error
from pi0.policy import ROBOTS
from pi0.serve import load
from pi0.serve.load import Load, answer_times, server, summarize


def test_answers_are_counted_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "WARM_UP", 0.2)
    with running(make_policy(StateEngine(seconds=0.05))) as served:
        times = answer_times(f"ws://{served.address}", ROBOTS["generic"], WIDTH, 2, 1.0)
    found = summarize(2, times, 1.0)
    assert 1 <= len(times) <= 1.5 / 0.05  # one at a time, however many ask
    assert min(times) >= 0.05
    assert (found.clients, found.rate) == (2, len(times))
    assert 0.05 <= found.p50 <= found.p99


def test_robots_follow_from_the_rate() -> None:
    """4.2 answers a second: 2 robots that ask twice a second."""
    assert Load(1, 4.2, 0.1, 0.2).robots(control_hz=50, execute=25) == 2
    assert Load(1, 0.1, 0.1, 0.2).robots(control_hz=50, execute=25) == 0


def test_errors_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "WARM_UP", 0.0)
    with (
        running(make_policy(StateEngine())) as served,
        pytest.raises(Pi0Error, match=r"load: expected actions, found state: expected"),
    ):
        answer_times(f"ws://{served.address}", ROBOTS["generic"], WIDTH + 40, 1, 1.0)
    with pytest.raises(Pi0Error, match="found none"):
        summarize(1, [], 1.0)


def test_a_server_that_does_not_start_says_why() -> None:
    with (
        pytest.raises(Pi0Error, match="expected it to start, found that it ended: .*nowhere"),
        server("nowhere"),
    ):
        pass
    shot = "echo pi0: warning: something >&2; kill -9 $$"  # as by a system without memory
    with (
        pytest.raises(Pi0Error, match="expected it to start, found that it was ended by SIGKILL"),
        server("nowhere", before=("sh", "-c", shot)),
    ):
        pass


@pytest.mark.parametrize(("p99", "late"), [(0.2, False), (1.2, True)])
def test_too_late_for_the_robot_is_said(
    p99: float, late: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"engine": "cpu", "batch": 1, "control_hz": 10.0, "execute": 10, "robots": 4}
    print_rows([{**row, **asdict(Load(1, 4.2, 0.1, p99))}], as_json=False, out=None)
    printed = capsys.readouterr().out
    assert "enough for 4 robots at 10 Hz, executing 10 actions of each chunk" in printed
    assert ("p99 is longer than these actions last, 1000 ms" in printed) == late
