# SPDX-License-Identifier: Apache-2.0
"""The BTF reader is right about small blobs that are built by hand, and agrees with bpftool on the running kernel."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from cwndtrace.errors import KernelLacks
from cwndtrace.kernel.btf import VMLINUX, Btf, Member
from tests.unit.btf_blob import Blob


@pytest.fixture
def blob() -> Blob:
    return Blob()


def test_members_are_found_with_offset_and_size(blob: Blob) -> None:
    u8, u32, u64 = blob.integer("u8", 1), blob.integer("u32", 4), blob.integer("u64", 8)
    blob.struct("sock", 24, [("a", u8, 0), ("b", u32, 32), ("c", u64, 64), ("p", blob.pointer(u32), 128)])
    btf = blob.btf()
    assert btf.member("sock", "a") == Member(0, 1)
    assert btf.member("sock", "b") == Member(4, 4)
    assert btf.member("sock", "c") == Member(8, 8)
    assert btf.member("sock", "p") == Member(16, 8)
    assert btf.member("sock", "missing") is None
    assert btf.member("missing", "a") is None


def test_members_of_embedded_structs_are_found(blob: Blob) -> None:
    u32 = blob.integer("u32", 4)
    inner = blob.struct("inner", 8, [("x", u32, 0), ("y", u32, 32)])
    blob.struct("outer", 16, [("first", u32, 0), ("in", inner, 64)])
    btf = blob.btf()
    assert btf.member("outer", "in") == Member(8, 8)
    assert btf.member("outer", "in.y") == Member(12, 4)
    assert btf.member("outer", "y") is None
    assert btf.member("outer", "first.y") is None


def test_members_of_anonymous_unions_and_structs_are_found(blob: Blob) -> None:
    u32, u64 = blob.integer("u32", 4), blob.integer("u64", 8)
    deep = blob.struct("", 8, [("deep", u32, 32)])
    union = blob.union("", 8, [("whole", u64, 0), ("", deep, 0)])
    blob.struct("sock", 24, [("before", u64, 0), ("", union, 64), ("after", u64, 128)])
    btf = blob.btf()
    assert btf.member("sock", "whole") == Member(8, 8)
    assert btf.member("sock", "deep") == Member(12, 4)
    assert btf.member("sock", "after") == Member(16, 8)


def test_the_argument_of_a_tracepoint_is_found_by_its_type(blob: Blob) -> None:
    """Linux 5.10 passes a queue before the request, and later kernels don't."""
    request, queue, bio = (blob.struct(name, 8, []) for name in ("request", "request_queue", "bio"))
    number = blob.integer("int", 4)
    void = blob.pointer(0)
    by_type = {name: blob.pointer(blob.alias(10, target)) for name, target in (("rq", request), ("q", queue))}
    for name, parameters in (("old", (by_type["q"], by_type["rq"])), ("new", (by_type["rq"], number, void))):
        blob.alias(8, blob.pointer(blob.function(void, *parameters)), f"btf_trace_{name}")
    blob.alias(8, number, "btf_trace_odd")
    btf = blob.btf()
    assert bio
    assert [btf.argument("old", name) for name in ("request_queue", "request", "bio")] == [0, 1, None]
    assert [btf.argument("new", name) for name in ("request_queue", "request", "missing")] == [None, 0, None]
    assert btf.argument("odd", "request") is None
    assert btf.argument("missing", "request") is None


def test_typedefs_and_qualifiers_are_resolved(blob: Blob) -> None:
    u32 = blob.integer("u32", 4)
    inner = blob.struct("inner", 8, [("x", u32, 0), ("y", u32, 32)])
    named = blob.alias(8, inner, "inner_t")
    for kind in (9, 10, 11, 18):  # volatile, const, restrict, type tag
        named = blob.alias(kind, named)
    blob.struct("outer", 16, [("m", named, 64)])
    btf = blob.btf()
    assert btf.member("outer", "m") == Member(8, 8)
    assert btf.member("outer", "m.y") == Member(12, 4)


def test_an_array_has_its_whole_size_and_the_members_of_its_first_element(blob: Blob) -> None:
    u32 = blob.integer("u32", 4)
    pair = blob.struct("pair", 8, [("t", u32, 0), ("v", u32, 32)])
    blob.struct("minmax", 32, [("win", u32, 0), ("s", blob.array(pair, 3), 32)])
    btf = blob.btf()
    assert btf.member("minmax", "s") == Member(4, 24)
    assert btf.member("minmax", "s.v") == Member(8, 4)


def test_bitfields_have_a_shift_and_a_width(blob: Blob) -> None:
    u8 = blob.integer("u8", 1)
    fields = [("a", u8, 5 << 24 | 0), ("b", u8, 1 << 24 | 5), ("c", u8, 2 << 24 | 14), ("plain", u8, 16)]
    blob.struct("flags", 3, fields, bitfields=True)
    btf = blob.btf()
    assert btf.member("flags", "a") == Member(0, 1, shift=0, bits=5)
    assert btf.member("flags", "b") == Member(0, 1, shift=5, bits=1)
    assert btf.member("flags", "c") == Member(1, 1, shift=6, bits=2)
    assert btf.member("flags", "plain") == Member(2, 1)


def test_functions_tracepoints_and_enumerators_are_found(blob: Blob) -> None:
    proto = blob.add(13, "", 0, vlen=2, trailer=bytes(16))
    blob.add(12, "tcp_cwnd_restart", proto)
    blob.alias(8, blob.pointer(proto), "btf_trace_block_io_start")
    blob.enum("rqf_flags", {"RQF_STARTED": 0, "RQF_FLUSH_SEQ": 3, "RQF_NEGATIVE": -1})
    # A variable, a section, a float, a tag and a 64-bit enum follow; the reader must know their sizes to skip them.
    blob.add(14, "var", proto, trailer=bytes(4))
    blob.add(15, ".data", 0, vlen=2, trailer=bytes(24))
    blob.add(16, "double", 8)
    blob.add(17, "tag", proto, trailer=bytes(4))
    blob.add(19, "big", 8, vlen=1, trailer=struct.pack("<III", blob.string("BIG"), 1, 1))
    blob.struct("last", 4, [("x", blob.integer("u32", 4), 0)])
    btf = blob.btf()
    assert btf.has_function("tcp_cwnd_restart")
    assert not btf.has_function("tcp_cwnd_application_limited")
    assert not btf.has_function("cwnd_restart")
    assert btf.has_tracepoint("block_io_start")
    assert not btf.has_tracepoint("block_io")
    assert btf.enumerator("rqf_flags", "RQF_FLUSH_SEQ") == 3
    assert btf.enumerator("rqf_flags", "RQF_NEGATIVE") == -1
    assert btf.enumerator("rqf_flags", "RQF_NONE") is None
    assert btf.enumerator("nothing", "RQF_NONE") is None
    assert btf.member("last", "x") == Member(0, 4)


def test_a_struct_is_distinguished_from_a_union_of_the_same_name(blob: Blob) -> None:
    u32 = blob.integer("u32", 4)
    blob.union("thing", 4, [("x", u32, 0)])
    blob.struct("thing", 8, [("x", u32, 32)])
    assert blob.btf().member("thing", "x") == Member(4, 4)


@pytest.mark.parametrize("data", [b"", b"\x9f\xeb", b"\xeb\x9f" + bytes(40), b"\x7fELF" + bytes(40)])
def test_other_data_than_btf_is_refused(data: bytes) -> None:
    with pytest.raises(KernelLacks, match="not little-endian BTF"):
        Btf(data)


def test_the_error_without_btf_names_the_kernel_option(tmp_path: Path) -> None:
    with pytest.raises(KernelLacks, match=r"no BTF: .*No such file") as caught:
        Btf.running(tmp_path / "vmlinux")
    assert "CONFIG_DEBUG_INFO_BTF" in caught.value.remedy


def test_btf_of_the_running_kernel_equals_that_of_bpftool() -> None:
    tool = shutil.which("bpftool", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if tool is None:
        pytest.skip("needs bpftool, another reader of BTF: apt install bpftool")
    if not os.access(VMLINUX, os.R_OK):
        pytest.skip(f"needs {VMLINUX}: use a kernel with CONFIG_DEBUG_INFO_BTF=y")
    dump = subprocess.run([tool, "btf", "dump", "file", str(VMLINUX), "format", "raw"], capture_output=True, text=True)
    if dump.returncode != 0:
        pytest.skip(f"needs a bpftool that can read {VMLINUX} ({dump.stderr.strip()}): sudo make test")
    btf, compared = Btf.running(), 0
    for name in ("tcp_sock", "inet_connection_sock", "sock_common", "request", "net_device", "sk_buff"):
        struct_dump = re.search(
            rf"^\[\d+\] STRUCT '{name}' size=(\d+) vlen=\d+\n((?:\t.*\n)+)", dump.stdout, re.MULTILINE
        )
        assert struct_dump, name
        for line in struct_dump[2].splitlines():
            match = re.match(r"\t'(\w+)' type_id=\d+ bits_offset=(\d+)(?: bitfield_size=(\d+))?", line)
            if match is None or match[1] == "(anon)":
                continue
            member = btf.member(name, match[1])
            assert member is not None, (name, match[1])
            bit, bits = int(match[2]), int(match[3] or 0)
            assert (member.offset * 8 + member.shift, member.bits) == (bit, bits), (name, match[1])
            assert member.offset + member.size <= int(struct_dump[1]) + 8
            compared += 1
    assert compared > 200
