"""A short soak: two replicas and a store under `kill -9`, damage under way, and every answer that of an uninterrupted run."""

from __future__ import annotations

from pathlib import Path

from bench.chaos import soak
from bench.soak import Plan


async def test_nothing_is_lost_stepped_twice_or_mixed_up_under_kill_9(tmp_path: Path, tiny_model_path: Path) -> None:
    report = await soak(Plan(kills=20, seconds=35, rate=1.5, streams=40, seed=1, model=tiny_model_path), tmp_path)
    assert report.violations == []
    assert sum(report.kills.values()) >= 8
    assert report.counts["duplicate_with_result"] > report.events / 4
    assert report.counts["retry"] > 0
    assert report.counts["fresh_start"] > 0
    assert report.streams_checked > 30
    assert all(report.fresh_starts_counted[reason] > 0 for reason in ("corrupt", "new", "other_model"))
