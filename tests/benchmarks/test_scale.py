"""A hundred thousand rows by workers of which one is killed, and a client that is killed."""

import pytest

from benchmarks.scale import measured


@pytest.mark.long
@pytest.mark.faults
def test_a_hundred_thousand_rows_lose_two_shards_and_little_memory(tmp_path):
    record = measured(100_000, tmp_path / "project")
    print(record)
    assert record["shards"] == 98
    assert record["lost"] <= 2
    assert record["client_mib"] < 700  # of which torch is most
    assert record["manifest_kb"] < 40
    assert record["open"] < 1
