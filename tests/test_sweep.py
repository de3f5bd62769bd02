"""Records survive what happens to a process; a second sweep makes only what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdeflow.errors import InvalidInput
from sdeflow.sweep import Run, append, mend, read, sweep


def runs_of(records, made: list[str], stop_at: str | None = None) -> list[Run]:
    def measure(record):
        if record.key == stop_at:
            raise KeyboardInterrupt
        made.append(record.key)
        return record

    return [Run(r.key, lambda r=r: measure(r)) for r in records]


@pytest.fixture
def records(make_record):
    return [make_record(steps=n, value=1.0 / n) for n in (5, 10, 20, 40)]


def test_records_come_in_the_order_of_the_runs_and_are_on_disk(records, tmp_path: Path):
    path, made = tmp_path / "deep" / "records.jsonl", []
    for n, step in enumerate(sweep(runs_of(records, made), path), start=1):
        assert read(path) == records[:n]  # on disk before the next run begins
        assert step.record == records[n - 1] and step.made and step.index == n - 1
    assert made == [r.key for r in records]


def test_an_interrupted_sweep_is_finished_by_the_same_call(records, tmp_path: Path):
    path, made = tmp_path / "records.jsonl", []
    with pytest.raises(KeyboardInterrupt):
        list(sweep(runs_of(records, made, stop_at=records[2].key), path))
    steps = list(sweep(runs_of(records, made), path))
    assert made == [r.key for r in records]  # each was made once
    assert [s.made for s in steps] == [False, False, True, True]
    assert [s.record for s in steps] == records == read(path)


def test_one_key_twice_is_one_run(records, tmp_path: Path):
    made = []
    steps = list(sweep(runs_of([records[0], records[1], records[0]], made), tmp_path / "records.jsonl"))
    assert made == [records[0].key, records[1].key]
    assert [s.record for s in steps] == [records[0], records[1], records[0]]


def test_records_of_other_runs_are_kept(records, tmp_path: Path):
    path = tmp_path / "records.jsonl"
    append(path, records[3])
    steps = list(sweep(runs_of(records[:1], []), path))
    assert [s.record for s in steps] == records[:1]
    assert read(path) == [records[3], records[0]]


@pytest.mark.parametrize("cut", [1, 2, 50, 10_000])
def test_a_torn_last_line_costs_that_record_only(records, tmp_path: Path, cut: int):
    path, made = tmp_path / "records.jsonl", []
    for r in records[:2]:
        append(path, r)
    whole = path.read_bytes()
    last = len(records[1].to_json().encode()) + 1
    torn = whole[: -min(cut, last - 1)]
    path.write_bytes(torn)
    assert read(path) == records[:1]
    assert path.read_bytes() == torn  # reading changes nothing
    list(sweep(runs_of(records, made), path))
    assert made == [r.key for r in records[1:]]
    assert read(path) == records


def test_a_broken_whole_line_is_named_not_dropped(records, tmp_path: Path):
    path = tmp_path / "records.jsonl"
    append(path, records[0])
    with open(path, "a") as file:
        file.write('{"half": 1}\n')
    append(path, records[1])
    with pytest.raises(InvalidInput, match=r"records\.jsonl line 2 is no record"):
        list(sweep(runs_of(records, []), path))


def test_a_run_whose_record_has_another_key_is_refused(records, tmp_path: Path):
    path = tmp_path / "records.jsonl"
    with pytest.raises(InvalidInput, match="another|made a record with key"):
        list(sweep([Run("other", lambda: records[0])], path))
    assert read(path) == []


def test_mend_leaves_whole_files_and_missing_files_alone(records, tmp_path: Path):
    path = tmp_path / "records.jsonl"
    mend(path)
    assert not path.exists()
    append(path, records[0])
    before = path.read_bytes()
    mend(path)
    assert path.read_bytes() == before


def test_numbers_survive_the_file(make_record, tmp_path: Path):
    """Every float comes back bit for bit, and a missing one as NaN."""
    path = tmp_path / "records.jsonl"
    exact = make_record(value=0.1 + 0.2, wall_time=1.0 / 3.0)
    append(path, exact)
    append(path, make_record(steps=1, value=float("nan")))
    first, second = read(path)
    assert first == exact
    assert second.error.value != second.error.value
