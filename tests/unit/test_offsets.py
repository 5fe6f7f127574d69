# SPDX-License-Identifier: Apache-2.0
"""The members that the C programs read become offsets, sizes and bits, given to the compiler as -D integers."""

from __future__ import annotations

import itertools

import pytest

from cwndtrace.errors import KernelLacks
from cwndtrace.kernel import offsets
from cwndtrace.kernel.btf import Btf
from cwndtrace.records.layout import bpf_dir
from tests.unit.btf_blob import Blob


@pytest.fixture
def kernel() -> Btf:
    blob = Blob()
    u8, u16, u32, u64 = (blob.integer(f"u{8 * n}", n) for n in (1, 2, 4, 8))
    pair = blob.struct("pair", 8, [("t", u32, 0), ("v", u32, 32)])
    blob.struct(
        "sock", 32, [("a", u32, 0), ("b", u16, 32), ("p", blob.pointer(u8), 64), ("m", blob.array(pair, 2), 128)]
    )
    blob.struct("flags", 2, [("x", u8, 5 << 24 | 3), ("wide", u16, 12 << 24 | 0)], bitfields=True)
    blob.struct("odd", 16, [("__pad", u64, 0), ("_metrics", u64, 64)])
    blob.enum("rqf", {"RQF_SEQ": 7})
    return blob.btf()


# ---- active ----------------------------------------------------------------------------------------


def test_text_of_undefined_conditions_is_removed() -> None:
    text = "one\n#ifdef A\ntwo\n#endif\n#if defined(A) || defined(B)\nthree\n#ifdef C\nfour\n#endif\n#endif\nfive"
    assert offsets.active(text, ()).split() == ["one", "five"]
    assert offsets.active(text, ["A"]).split() == ["one", "two", "three", "five"]
    assert offsets.active(text, ["B"]).split() == ["one", "three", "five"]
    assert offsets.active(text, ["C"]).split() == ["one", "five"]
    assert offsets.active(text, ["B", "C"]).split() == ["one", "three", "four", "five"]


def test_include_guards_are_kept_and_definitions_are_removed() -> None:
    text = "#ifndef GUARD_H\n#define GUARD_H\n#define READ(T, base, type, member) x\nkept\n#endif"
    assert offsets.active(text, ()).split() == ["kept"]


def test_comments_are_removed() -> None:
    text = "a /* READ(u32, sk, sock, gone) */ b\n// READ(u32, sk, sock, gone)\nc /* over\nlines READ(u32, x, y, z) */ d"
    assert offsets.active(text, ()).split() == ["a", "b", "c", "d"]


# ---- members ---------------------------------------------------------------------------------------


def test_members_are_found_in_each_macro_that_reads_them() -> None:
    text = """
        READ(u32, sk, sock, a); READ_OPT(u64, READ(u64, sk, sock, p), cgroup, kn);
        READ_BITS(sk, flags, x); AT(sk, sock, m); socket - OFF_socket_alloc__socket;
        LOAD(u32, tp, tcp_sock, c); READ_NUMBER(net, net, ipv4__d); LOAD_BYTE(AT(skb, sk_buff, cb), tcp_skb_cb, f);
        LOAD_BITS(tp, tcp_sock, g);
    """
    assert sorted(offsets.members(text)) == sorted(
        [
            ("READ", "u32", "sock", "a"),
            ("READ_OPT", "u64", "cgroup", "kn"),
            ("READ", "u64", "sock", "p"),
            ("READ_BITS", "", "flags", "x"),
            ("AT", "", "sock", "m"),
            ("AT", "", "socket_alloc", "socket"),
            ("LOAD", "u32", "tcp_sock", "c"),
            ("LOAD_BYTE", "", "tcp_skb_cb", "f"),
            ("LOAD_BITS", "", "tcp_sock", "g"),
            ("READ_NUMBER", "", "net", "ipv4__d"),
            ("AT", "", "sk_buff", "cb"),
        ]
    )


def test_members_are_found_in_the_projects_programs() -> None:
    for source, least in (("block_io.bpf.c", 10), ("sock.h", 25)):
        text = offsets.active((bpf_dir() / source).read_text(encoding="utf-8"), ())
        assert len(set(offsets.members(text))) >= least


# ---- defines ---------------------------------------------------------------------------------------


def test_offsets_sizes_and_bits(kernel: Btf) -> None:
    text = "READ(u32, sk, sock, a) READ(u16, sk, sock, b) READ(u64, sk, sock, p) READ_BITS(f, flags, x) AT(sk, sock, m)"
    assert offsets.defines(kernel, text) == {
        "OFF_sock__a": 0, "SIZE_sock__a": 4,
        "OFF_sock__b": 4, "SIZE_sock__b": 2,
        "OFF_sock__p": 8, "SIZE_sock__p": 8,
        "OFF_flags__x": 0, "SIZE_flags__x": 1, "SHIFT_flags__x": 3, "BITS_flags__x": 5,
        "OFF_sock__m": 16, "SIZE_sock__m": 16,
    }  # fmt: skip


def test_two_underscores_are_a_dot_unless_they_are_part_of_a_name(kernel: Btf) -> None:
    defines = offsets.defines(kernel, "READ(u32, sk, sock, m__v) READ(u64, d, odd, __pad) READ(u64, d, odd, _metrics)")
    assert defines["OFF_sock__m__v"] == 20
    assert defines["OFF_odd____pad"] == 0
    assert defines["OFF_odd___metrics"] == 8


def test_a_missing_member_is_named_in_the_error(kernel: Btf) -> None:
    with pytest.raises(
        KernelLacks, match=r"differ from those that cwndtrace reads: sock\.gone is missing, sock\.m\.w is missing"
    ):
        offsets.defines(kernel, "READ(u32, sk, sock, gone) READ(u32, sk, sock, m__w) READ(u32, sk, sock, a)")


def test_a_wrong_width_is_named_in_the_error(kernel: Btf) -> None:
    with pytest.raises(KernelLacks, match=r"sock\.a has 4 bytes, not 8"):
        offsets.defines(kernel, "READ(u64, sk, sock, a)")


def test_another_member_than_a_small_bitfield_is_refused(kernel: Btf) -> None:
    for member in ("flags, wide", "sock, a"):
        with pytest.raises(KernelLacks, match="isn't a bitfield within one byte"):
            offsets.defines(kernel, f"READ_BITS(sk, {member})")


@pytest.mark.parametrize("macro", ["READ_OPT", "LOAD_OPT"])
def test_a_missing_optional_member_has_size_0(kernel: Btf, macro: str) -> None:
    defines = offsets.defines(kernel, f"{macro}(u64, sk, sock, gone) {macro}(u32, sk, sock, a)")
    assert defines == {"OFF_sock__gone": 0, "SIZE_sock__gone": 0, "OFF_sock__a": 0, "SIZE_sock__a": 4}


def test_a_number_may_have_any_width_but_not_be_missing(kernel: Btf) -> None:
    defines = offsets.defines(kernel, "READ_NUMBER(sk, sock, a) READ_NUMBER(sk, sock, b)")
    assert defines == {"OFF_sock__a": 0, "SIZE_sock__a": 4, "OFF_sock__b": 4, "SIZE_sock__b": 2}
    with pytest.raises(KernelLacks, match=r"sock\.gone is missing"):
        offsets.defines(kernel, "READ_NUMBER(sk, sock, gone)")


def test_what_may_be_missing_is_checked_or_has_an_alternative() -> None:
    # READ_OPT and LOAD_OPT give 0 in silence. Those of sockets are checked by facts.check_sock_cgroups(). A request has
    # its disk itself, or else its queue has it. Without CONFIG_BLK_CGROUP there is no owner.
    text = "".join(offsets.active(file.read_text(encoding="utf-8"), ()) for file in sorted(bpf_dir().glob("*.*")))
    assert {(m[2], m[3]) for m in offsets.members(text) if m[0].endswith("_OPT")} == {
        ("sock", "sk_cgrp_data__cgroup"),
        ("sock", "sk_cgrp_data__val"),
        ("cgroup", "kn"),
        ("kernfs_node", "id"),
        ("request", "rq_disk"),
        ("request_queue", "disk"),
        ("bio", "bi_blkg"),
        ("blkcg_gq", "blkcg"),
        ("blkcg", "css__cgroup"),
        ("cgroup", "root"),
        ("cgroup_root", "hierarchy_id"),
    }


def test_an_enumerator_has_its_value_or_the_fallback(kernel: Btf) -> None:
    defines = offsets.defines(kernel, "ENUMERATOR(rqf__RQF_SEQ, 4) ENUMERATOR(gone__GONE, 9)")
    assert defines == {"ENUM_rqf__RQF_SEQ": 7, "ENUM_gone__GONE": 9}


def test_an_argument_has_the_place_that_this_kernel_gives_it() -> None:
    blob = Blob()
    request, queue = (blob.pointer(blob.struct(name, 8, [])) for name in ("request", "request_queue"))
    blob.alias(8, blob.pointer(blob.function(blob.pointer(0), queue, request)), "btf_trace_block_rq_issue")
    text = "ctx->args[ARGUMENT(block_rq_issue, request)]"
    assert offsets.defines(blob.btf(), text) == {"ARG_block_rq_issue__request": 1}
    with pytest.raises(KernelLacks, match="tracepoint block_getrq has no struct bio"):
        offsets.defines(blob.btf(), "ARGUMENT(block_getrq, bio)")


@pytest.mark.parametrize("ctype", ["u8", "u16", "u32", "s32", "u64"])
def test_every_type_has_a_width(ctype: str) -> None:
    blob = Blob()
    size = int(ctype[1:]) // 8
    blob.struct("s", 8, [("m", blob.integer(ctype, size), 0)])
    assert offsets.defines(blob.btf(), f"READ({ctype}, x, s, m)")["SIZE_s__m"] == size


def test_nested_calls_keep_their_own_arguments() -> None:
    depths = ["x", "READ(u64, x, a, b)", "AT(f(x, y) - 3, a, b)"]
    for inner, outer in itertools.product(depths, ("READ(u64, {}, c, d)", "READ_OPT(u64, {}, c, d)")):
        assert outer.split("(")[0] in {m[0] for m in offsets.members(outer.format(inner)) if m[2:] == ("c", "d")}
