"""The meta files of `pi0 serve --record`: they soon have every episode, also after a kill."""

from __future__ import annotations

from pathlib import Path

import pytest
from serving import ask, eventually, observation
from test_record import episodes, recording

from pi0.data import Dataset
from pi0.serve import record


@pytest.fixture(autouse=True)
def _in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine threads of the lowest priority could take minutes."""
    monkeypatch.setattr(record, "_yield_to_others", lambda: None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "recorded"


def test_the_last_episode_does_not_wait_for_another(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The meta files have it soon, though they are not written for each episode."""
    monkeypatch.setattr(record, "FINISH_SHARE", 0.02)
    with recording(folder) as served, served.connect() as client:
        for value in (1, 2):
            ask(client, observation(value, **{"pi0/reset": True}))
        ask(client, observation(3, **{"pi0/reset": True}))
        eventually(lambda: served.server.metrics.recording["episodes"] == 2)
        eventually(lambda: Dataset.open(folder).check() == [])
        assert episodes(folder) == [[1], [2]]


def test_a_later_server_completes_what_a_killed_one_left(folder: Path) -> None:
    with recording(folder) as served, served.connect() as client:
        ask(client, observation(1))
    before = (folder / "meta" / "info.json").read_text()
    with recording(folder) as served, served.connect() as client:
        ask(client, observation(2))
    (folder / "meta" / "info.json").write_text(before)  # as if killed before it was written
    assert {finding.code for finding in Dataset.open(folder).check()} >= {"totals"}
    with recording(folder):
        pass
    assert episodes(folder) == [[1], [2]]
