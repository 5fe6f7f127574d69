# SPDX-License-Identifier: Apache-2.0
"""The layouts that Python parses from bpf/events.h are those of a C compiler, and Arrow tables keep all values.

A field at another offset than Python assumes would give wrong numbers that look plausible.
"""

from __future__ import annotations

import io
import ipaddress
import shutil
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cwndtrace import format as fmt
from cwndtrace.records import arrow, layout
from tests.unit import frames

HEADER = (layout.bpf_dir() / "events.h").read_text(encoding="utf-8")
SIGNED = {"__s8", "__s16", "__s32", "__s64"}


def _compiled(folder: Path) -> dict[str, str]:
    """Return what a compiled program prints for each size, offset and enumerator, by C expression."""
    parsed = layout.header()
    expressions = {f"sizeof(struct {e.name})": "" for e in parsed.events.values()}
    for event in parsed.events.values():
        for member in event.fields:
            where = f"struct {event.name}, {member.name}"
            expressions[f"offsetof({where})"] = ""
            expressions[f"sizeof(((struct {event.name} *)0)->{member.name})"] = ""
    for enum, labels in parsed.enums.items():
        expressions |= {f"{enum.upper()}_{label.upper()}": "" for label in labels.values()}
    prints = "\n".join(f'printf("%lu\\n", (unsigned long)({expression}));' for expression in expressions)
    source = folder / "layout.c"
    source.write_text(
        f'#include <stddef.h>\n#include <stdio.h>\n#include "{layout.bpf_dir()}/events.h"\n'
        f"int main(void)\n{{\n{prints}\nreturn 0;\n}}\n",
        encoding="utf-8",
    )
    subprocess.run(["cc", "-Wall", "-Werror", "-Wpadded", "-o", folder / "layout", source], check=True)
    output = subprocess.run([folder / "layout"], check=True, capture_output=True, text=True).stdout.split()
    return dict(zip(expressions, output, strict=True))


@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler: apt-get install gcc libc6-dev")
def test_layouts_equal_those_of_the_compiler(tmp_path: Path) -> None:
    compiled = {expression: int(answer) for expression, answer in _compiled(tmp_path).items()}
    for event in layout.header().events.values():
        assert event.dtype.itemsize == event.size == compiled[f"sizeof(struct {event.name})"]
        for member in event.fields:
            dtype, offset = event.dtype.fields[member.name][:2]  # type: ignore[index]
            assert offset == member.offset == compiled[f"offsetof(struct {event.name}, {member.name})"]
            assert dtype.itemsize == compiled[f"sizeof(((struct {event.name} *)0)->{member.name})"]
            if member.count == 1:
                assert dtype.kind == ("i" if member.ctype in SIGNED else "u")
    for enum, labels in layout.header().enums.items():
        for value, label in labels.items():
            assert value == compiled[f"{enum.upper()}_{label.upper()}"]


def test_every_member_and_enumerator_of_the_header_is_parsed() -> None:
    # If the parser skipped a last member that lies in the struct's tail padding, no offset would change.
    members = sum("/* [" in line for line in HEADER.splitlines())
    labels = sum(" = " in line for line in HEADER.splitlines())
    assert sum(len(e.fields) for e in layout.header().events.values()) == members
    assert sum(len(labels) for labels in layout.header().enums.values()) == labels


GOOD = """enum kind {
	KIND_A = 0,	/* the first */
	KIND_B = 7,	/* the second */
};

/* One. */
struct one {
	__u64 ts_ns;	/* [ns] when */
	__u32 n;	/* [bytes] how many */
	__u8 kind;	/* [enum kind] which */
	__u8 more[3];	/* [id] rest */
};
"""


def test_a_small_header_is_parsed() -> None:
    parsed = layout.parse_layout(GOOD)
    assert parsed.enums == {"kind": {0: "a", 7: "b"}}
    assert [(f.name, f.offset, f.size, f.unit) for f in parsed.events["one"].fields] == [
        ("ts_ns", 0, 8, "ns"),
        ("n", 8, 4, "bytes"),
        ("kind", 12, 1, "enum kind"),
        ("more", 13, 3, "id"),
    ]


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("__u32 n;", "__u32 *n;", 9),
        ("__u32 n;", "__u32 n:4;", 9),
        ("__u32 n;", "int n;", 9),
        ("__u32 n;", "__u128 n;", 9),
        ("__u32 n;", "__u32 n[2];", 9),
        ("__u32 n;", "char n[4];", 9),
        ("[bytes] how many", "how many", 9),
        ("/* [bytes] how many */", "", 9),
        ("[enum kind]", "[enum other]", 10),
        ("__u8 kind;", "__u64 kind;", 10),
        ("__u8 more[3];", "__u8 more[2];", 12),
        ("__u8 more[3];", "__u8 more[N];", 11),
        ("__u8 more[3];", "__u8 more[0];", 11),
        ("__u8 more[3];", "__u8 n[3];", 11),
        ("KIND_B = 7,", "KIND_B = 0,", 3),
        ("KIND_B = 7,", "KIND_B,", 3),
        ("KIND_B = 7,", "KIND_B = -7,", 3),
        ("struct one {", "union one {", 7),
        ("struct one {", "typedef struct {", 7),
        ("__u32 n;", "#ifdef X", 9),
    ],
)
def test_c_outside_the_subset_is_refused_with_its_line(old: str, new: str, line: int) -> None:
    assert GOOD.count(old) == 1
    with pytest.raises(layout.LayoutError, match=rf"^line {line}: "):
        layout.parse_layout(GOOD.replace(old, new))


@pytest.mark.parametrize(
    ("ctype", "size", "kind"),
    [
        ("__u8", 1, "u"), ("__u16", 2, "u"), ("__u32", 4, "u"), ("__u64", 8, "u"),
        ("__s8", 1, "i"), ("__s16", 2, "i"), ("__s32", 4, "i"), ("__s64", 8, "i"),
    ],
)  # fmt: skip
def test_each_type_has_its_size_and_sign(ctype: str, size: int, kind: str) -> None:
    lines = "".join(f"\t{ctype} x{number}; /* [ns] when */\n" for number in range(8 // size))
    event = layout.parse_layout(f"struct one {{\n{lines}}};\n").events["one"]
    assert [(field.offset, field.size) for field in event.fields] == [(at, size) for at in range(0, 8, size)]
    assert {event.dtype[name].kind for name in event.dtype.names or ()} == {kind}


def test_an_array_of_two_bytes_is_no_number() -> None:
    text = GOOD.replace("__u8 more[3];", "__u8 more[2];\t/* [id] two */\n\t__u8 last;")
    dtype = layout.parse_layout(text).events["one"].dtype
    assert [(dtype[name].kind, dtype[name].itemsize) for name in ("kind", "more", "last")] == [
        ("u", 1), ("V", 2), ("u", 1),
    ]  # fmt: skip


def test_a_refusal_says_what_is_wrong() -> None:
    for old, new, why in (
        ("__u32 n;", "int n;", "this isn't a fixed-size field with a [unit] comment: int n; /* [bytes] how many */"),
        ("__u32 n;", "__u128 n;", "type __u128 isn't in the subset"),
        ("__u8 more[3];", "__u8 n[3];", "there is a field n already"),
        ("__u8 kind;", "__u64 kind;", "kind would be padded; order the fields by size"),
        ("__u8 more[3];", "__u8 more[2];", "struct one has 15 bytes, which isn't a multiple of 8"),
        ("[enum kind]", "[enum other]", "enum other isn't declared above"),
    ):
        with pytest.raises(layout.LayoutError) as refusal:
            layout.parse_layout(GOOD.replace(old, new).replace("\t", " "))
        assert str(refusal.value).partition(": ")[2].split() == why.split()


def test_an_empty_struct_is_refused() -> None:
    with pytest.raises(layout.LayoutError, match="empty"):
        layout.parse_layout("struct none {\n};\n")


@given(st.data())
def test_a_field_with_damaged_punctuation_never_parses_to_another_field(data: st.DataObject) -> None:
    lines = GOOD.splitlines()
    number = data.draw(st.sampled_from([7, 8, 9, 10]))
    at = data.draw(st.sampled_from([i for i, c in enumerate(lines[number]) if c in ";[]/*"]))
    lines[number] = lines[number][:at] + data.draw(st.sampled_from("?@!%")) + lines[number][at + 1 :]
    try:
        parsed = layout.parse_layout("\n".join(lines))
    except layout.LayoutError:
        return
    # Then the damage was in the description.
    assert [(f.name, f.ctype, f.count) for f in parsed.events["one"].fields] == [
        ("ts_ns", "__u64", 1),
        ("n", "__u32", 1),
        ("kind", "__u8", 1),
        ("more", "__u8", 3),
    ]


@given(st.ip_addresses())
def test_addresses_are_written_as_in_the_standard_library(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    assert arrow.address(frames.packed(str(ip))) == str(mapped or ip)


def test_a_mapped_address_is_shown_as_ipv4() -> None:
    assert arrow.address(bytes(10) + b"\xff\xff\x0a\x01\x00\x07") == "10.1.0.7"


@given(st.text())
def test_clean_text_has_no_control_characters_and_keeps_its_length(text: str) -> None:
    cleaned = fmt.clean(text)
    assert cleaned.isprintable()
    assert len(cleaned) == len(text)
    assert all(a in (b, "?") for a, b in zip(cleaned, text, strict=True))


def _raw(name: str) -> st.SearchStrategy[bytes]:
    size = layout.event(name).size
    return st.integers(0, 6).flatmap(lambda n: st.binary(min_size=n * size, max_size=n * size))


def test_texts_end_at_their_first_nul() -> None:
    records = np.zeros(3, dtype=layout.event("cwnd_reset").dtype)
    records["comm"] = [b"a\0x", b"a", b"b"]
    column = arrow.to_arrow("cwnd_reset", records, 0).column("comm").chunk(0)
    assert (column.to_pylist(), column.dictionary.to_pylist()) == (["a", "a", "b"], ["a", "b"])


@pytest.mark.parametrize("name", ["cwnd_reset", "block_io"])
@given(data=st.data())
def test_any_records_survive_arrow_and_parquet(name: str, data: st.DataObject) -> None:
    raw = data.draw(_raw(name))
    records = layout.decode(name, raw)
    assert records.tobytes() == raw
    table = arrow.to_arrow(name, records, frames.OFFSET)
    assert table.schema.equals(arrow.arrow_schema(name), check_metadata=True)
    file = io.BytesIO()
    pq.write_table(table, file)
    back = pq.read_table(io.BytesIO(file.getvalue()))
    assert back.schema.equals(table.schema, check_metadata=True)
    assert back.equals(table)
    for member in layout.event(name).fields:
        column, mine = back.column(member.name).to_pylist(), records[member.name].tolist()
        if member.unit == "addr":
            assert column == [arrow.address(value) for value in mine]
        elif member.unit == "text":
            assert column == [bytes(value).split(b"\0")[0].decode("utf-8", "replace") for value in mine]
        elif member.unit == "dev":
            assert column == [f"{value >> 20}:{value & 0xFFFFF}" for value in mine]
        elif member.unit.startswith("enum "):
            labels = layout.header().enums[member.unit[5:]]
            assert column == [labels.get(value, str(value)) for value in mine]
        else:
            assert column == mine


@pytest.mark.parametrize("lines", [2, 9])
def test_a_header_that_ends_too_early_is_refused(lines: int) -> None:
    with pytest.raises(layout.LayoutError, match="ends inside"):
        layout.parse_layout("\n".join(GOOD.splitlines()[:lines]))


def test_a_partial_record_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple"):
        layout.decode("cwnd_reset", bytes(layout.event("cwnd_reset").size + 1))


def test_the_column_time_is_the_first_field_in_utc_microseconds() -> None:
    table = frames.table("cwnd_reset", frames.reset(ts_ns=123_456_789_001))
    assert table.column_names[0] == "time"
    assert table.schema.field("time").type == pa.timestamp("us", tz="UTC")
    assert table.column("time").cast(pa.int64()).to_pylist() == [(123_456_789_001 + frames.OFFSET) // 1000]


def test_every_column_has_a_unit_and_a_description() -> None:
    for table in arrow.TABLES:
        for column in arrow.schema(table):
            assert column.metadata[b"unit"]
            assert column.metadata[b"description"]


def test_dicts_have_the_event_the_time_and_the_fields_as_text() -> None:
    (row,) = arrow.table_to_dicts("cwnd_reset", frames.table("cwnd_reset", frames.reset(2.5)))
    assert list(row)[:3] == ["event", "time", "ts_ns"]
    assert row["event"] == "cwnd_reset"
    assert row["time"] == "2026-11-18T12:30:02.500000Z"
    assert (row["saddr"], row["reason"], row["probe"], row["comm"]) == ("10.1.0.1", "idle", "sendmsg", "replica")


@given(st.integers(0, 2**62))
def test_iso_time_is_exact_to_the_microsecond(ns: int) -> None:
    text = arrow.iso_time(ns)
    whole, _, fraction = text.removesuffix("Z").partition(".")
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    assert datetime.fromisoformat(f"{whole}+00:00") == epoch + timedelta(seconds=ns // 10**9)
    assert int(fraction) == ns % 10**9 // 1000
    assert len(fraction) == 6


def test_code_is_the_inverse_of_a_label() -> None:
    for enum, labels in layout.header().enums.items():
        assert {layout.code(enum, label): label for label in labels.values()} == labels
    with pytest.raises(KeyError):
        layout.code("reason", "boredom")


def test_meanings_are_the_comments_of_the_enumerators() -> None:
    text = "enum op {\n\tOP_READ = 0,\t/* REQ_OP_READ */\n};\nenum reason {\n\tREASON_IDLE = 3, /* data, late */\n};\n"
    assert layout.parse_layout(text).meanings == {"op": {0: "REQ_OP_READ"}, "reason": {3: "data, late"}}
