# SPDX-License-Identifier: Apache-2.0
"""The tables of a capture: their columns, which of them rows can do without, and arrays made without pyarrow's help."""

from __future__ import annotations

import runpy

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cwndtrace.records import arrow, layout
from cwndtrace.records import frames as records
from tests.unit import frames

SPARE = {
    "cwnd_reset": "bytes_received ca_state data_segs_in ifindex process tcp_state unacked_bytes",
    "cwnd_recovery": "acks after_loss_us bursts busy_us bytes_received chain_resets chain_window cost_us cpu"
    " data_segs_in first_cost_us held_us other_us rwnd_limited_us short_us sndbuf_limited_us waiting_bytes",
    "cwnd_sample": "packets_out",
    "block_io": "cpu flags owner_cgroup_id sector",
    "connections": "busy_us bytes_received ca_state last_snd_us listener listener_pid rwnd_limited_us sndbuf"
    " sndbuf_limited_us sock_cgroup_id uid unacked",
    "workloads": "",
    "processes": "",
}
"""The columns without which a row is judged: captures of older versions lack them, or no analysis uses them."""


def test_the_pages_of_the_tables_are_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    script = layout.bpf_dir().parent / "tools/event-pages"
    status = runpy.run_path(str(script))["main"](["--check"])
    assert (status, capsys.readouterr().err) == (0, "")


@pytest.mark.parametrize("table", arrow.TABLES)
def test_rows_can_do_without_what_older_versions_lack_and_what_nothing_judges(table: str) -> None:
    every, needed = arrow.schema(table).names, arrow.needed(table)
    assert sorted(set(every) - set(needed)) == SPARE[table].split()
    assert needed == [name for name in every if name in needed]


def test_the_tables_are_those_of_a_capture() -> None:
    assert arrow.TABLES == (
        "cwnd_reset", "cwnd_recovery", "cwnd_sample", "block_io", "connections", "workloads", "processes",
    )  # fmt: skip
    assert [arrow.schema(table).metadata[b"event"].decode() for table in arrow.TABLES] == list(arrow.TABLES)
    with pytest.raises(KeyError):
        arrow.schema("power")


def test_a_cgroup_that_an_older_capture_lacks_is_0() -> None:
    table = frames.snapshots(frames.snapshot(1), frames.snapshot(2))
    at = table.column_names.index("sock_cgroup_id")
    holed = table.set_column(at, table.schema.field(at), pa.array([7, None], pa.uint64()))
    column = records.frame(holed, "connections")["sock_cgroup_id"]
    assert (column.tolist(), str(column.dtype)) == ([7, 0], "uint64")


@pytest.mark.parametrize(
    ("column", "least"),
    [
        ("ssthresh", 2**31 - 1), ("ssthresh_before", 2**31 - 1), ("ssthresh_after", 2**31 - 1),
        ("ssthresh_end", 2**31 - 1), ("min_rtt_us", 2**32 - 1),
    ],
)  # fmt: skip
def test_a_placeholder_is_missing_and_the_number_below_it_is_not(column: str, least: int) -> None:
    frame = records.without_placeholders(pd.DataFrame({column: [least - 1, least], "cwnd": [10, least]}))
    assert frame[column].isna().tolist() == [False, True]
    assert frame[column][0] == least - 1
    assert frame["cwnd"].tolist() == [10, least]


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20), st.integers(0, 20), st.integers(0, 20))
def test_values_of_a_slice_are_those_of_its_items(items: list[int], begin: int, length: int) -> None:
    array = pa.array(items, pa.int64()).slice(min(begin, len(items)), length)
    assert arrow.values(array).tolist() == array.to_pylist()


@given(st.lists(st.tuples(st.integers(0, 2**32 - 1), st.booleans())))
def test_numbers_are_null_where_they_are_not_known(items: list[tuple[int, bool]]) -> None:
    column, known = np.array([n for n, _ in items], np.uint32), np.array([k for _, k in items], bool)
    assert arrow.numbers(pa.uint32(), column).to_pylist() == column.tolist()
    assert arrow.numbers(pa.uint32(), column, known).to_pylist() == [n if k else None for n, k in items]


@given(st.lists(st.text()))
def test_texts_are_those_of_pyarrow(strings: list[str]) -> None:
    array = arrow.texts(strings)
    array.validate(full=True)
    assert array.to_pylist() == strings


def test_numbers_that_an_enum_lacks_stand_for_themselves() -> None:
    labels = arrow.enum_labels("reason", np.array([layout.code("reason", "idle"), 77, 77], np.uint8))
    assert labels.to_pylist() == ["idle", "77", "77"]
    assert arrow.label("cwnd_reset", "reason", 77) == "77"
    assert arrow.label("block_io", "dev", 259 << 20 | 3) == "259:3"


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()], ids=str)
def test_cleaned_texts_that_become_one_are_one_and_keep_their_type(kind: pa.DataType) -> None:
    table = pa.table({"comm": pa.array(["a\x1b", "a\x07", None, "b"], kind).dictionary_encode(), "n": [1, 2, 3, 4]})
    cleaned = arrow.clean_texts(table)
    assert cleaned.schema == table.schema
    assert cleaned.column("comm").to_pylist() == ["a?", "a?", None, "b"]
    assert cleaned.column("comm").chunk(0).dictionary.to_pylist() == ["a?", "b"]
    assert cleaned.column("n").to_pylist() == [1, 2, 3, 4]


def test_parts_of_a_trace_and_tables_are_joined_in_their_order() -> None:
    def timed(*seconds: float) -> arrow.TimedRecords:
        rows = np.concatenate([frames.reset(second) for second in seconds])
        return arrow.TimedRecords("cwnd_reset", rows.tobytes(), np.arange(len(rows), dtype=np.int64) * 1000)

    parts = [timed(1, 2), timed(3), timed(4).to_arrow(), timed(5, 6)]
    table = arrow.joined(parts)
    assert table.equals(pa.concat_tables([arrow.joined([part]) for part in parts]).unify_dictionaries())
    assert [len(part) for part in parts] == [2, 1, 1, 2]
    seconds = [(ts - frames.MONO) / 1e9 for ts in table.column("ts_ns").to_pylist()]
    assert seconds == [1, 2, 3, 4, 5, 6]
    own = np.array(table.column("time").cast(pa.int64())) * 1000 - np.array(table.column("ts_ns"))
    assert (own // 1000).tolist() == [0, 1, 0, 0, 0, 1]
