# SPDX-License-Identifier: Apache-2.0
"""The best probe that works is chosen for each reason, by recorded facts of many kernels."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from cwndtrace.errors import KernelLacks, NoProbe
from cwndtrace.kernel import ladder
from cwndtrace.kernel.ladder import FUNCTIONS, REASONS, Facts
from cwndtrace.records.layout import bpf_dir

POLICY = "refused by this system's policy"
OLD = frozenset(
    {"net_dev_queue", "napi_poll", "inet_sock_set_state", "tcp_probe", "tcp_destroy_sock", "tcp_retransmit_skb"}
)
CURRENT = OLD | {"tcp_cong_state_set"}
NEW = CURRENT | {"tcp_sendmsg_locked"}
ALL = frozenset(FUNCTIONS.values())
NOT_INLINED = ALL - {"tcp_cwnd_application_limited"}

Trial = Callable[[str, str], str | None]


def works(probe: str, reason: str) -> str | None:  # noqa: ARG001
    return None


def refuses(*probes: str, why: str = POLICY) -> Trial:
    return lambda probe, reason: why if probe in probes else None  # noqa: ARG005


@dataclass(frozen=True)
class KernelCase:
    """The facts of a kernel, and the probes to choose there for idle, rto_loss, app_limited and tlp_loss."""

    facts: Facts
    trial: Trial
    expected: tuple[str | None, str | None, str | None, str | None]


KERNELS = {
    "patched": KernelCase(Facts(NEW | {"tcp_cwnd_reset"}, ALL, True), works, ("tracepoint",) * 4),
    "patched with the bare tracepoint": KernelCase(
        Facts(NEW | {"tcp_cwnd_reset_tp"}, ALL, True), works, ("tracepoint",) * 4
    ),
    "patched, locked down": KernelCase(
        Facts(NEW | {"tcp_cwnd_reset"}, NOT_INLINED, False), refuses("fentry"), ("tracepoint",) * 4
    ),
    "Debian 12, Linux 6.1": KernelCase(Facts(CURRENT, ALL, True), works, ("fentry",) * 4),
    "Debian 12, fentry refused": KernelCase(Facts(CURRENT, ALL, True), refuses("fentry"), ("kprobe",) * 4),
    "Ubuntu 22.04, Linux 5.15": KernelCase(Facts(OLD, NOT_INLINED, True), works, ("fentry", "fentry", None, "fentry")),
    "Ubuntu 22.04, no fentry and no kprobes": KernelCase(
        Facts(OLD, NOT_INLINED, False), refuses("fentry"), ("tcp_probe", None, None, None)
    ),
    "Linux 6.12, app_limited inlined": KernelCase(
        Facts(CURRENT, NOT_INLINED, True), works, ("fentry", "fentry", None, "fentry")
    ),
    "Linux 6.12, tcp_process_tlp_ack inlined too": KernelCase(
        Facts(CURRENT, NOT_INLINED - {"tcp_process_tlp_ack"}, True), works, ("fentry", "fentry", None, "sendmsg")
    ),
    "Linux 6.12, locked down": KernelCase(
        Facts(CURRENT, NOT_INLINED, False), refuses("fentry"), ("tcp_probe", "sendmsg", None, "sendmsg")
    ),
    "Linux 6.18, locked down without kprobes": KernelCase(
        Facts(NEW, NOT_INLINED, False), refuses("fentry"), ("sendmsg", "sendmsg", None, "sendmsg")
    ),
    "Linux 6.18, tcp_cwnd_restart inlined": KernelCase(
        Facts(NEW, ALL - {"tcp_cwnd_restart"}, True), works, ("sendmsg", "fentry", "fentry", "fentry")
    ),
}


@pytest.mark.parametrize("name", KERNELS)
def test_the_best_probe_that_works_is_chosen_for_each_reason(name: str) -> None:
    kernel = KERNELS[name]
    choice = ladder.choose(kernel.facts, kernel.trial)
    assert tuple(choice.probes[reason] for reason in REASONS) == kernel.expected
    order = [probe.name for probe in ladder.PROBES]
    for reason, probe in choice.probes.items():
        # Each better probe has a reason why it wasn't chosen.
        better = order[: order.index(probe)] if probe else order
        assert list(choice.tried[reason]) == better
        assert all(choice.tried[reason].values())


def test_a_probe_that_the_facts_rule_out_is_never_tried() -> None:
    asked: list[tuple[str, str]] = []

    def trial(probe: str, reason: str) -> str | None:
        asked.append((probe, reason))
        return None

    ladder.choose(Facts(NEW, NOT_INLINED, False), trial)
    assert asked == [("fentry", "idle"), ("fentry", "rto_loss"), ("fentry", "tlp_loss")]


def test_no_probe_names_what_was_tried() -> None:
    error = ladder.choose(Facts(), works).unseen()
    assert isinstance(error, NoProbe)
    assert isinstance(error, KernelLacks)
    assert list(error.tried) == [probe.name for probe in ladder.PROBES]
    assert error.tried["tracepoint"] == "this kernel has no tracepoint tcp_cwnd_reset"
    assert error.tried["fentry"] == "tcp_cwnd_restart() is inlined in this kernel"
    assert all(f"{probe}: {why}" in error.cause for probe, why in error.tried.items())
    assert "cwndtrace doctor" in error.remedy


def test_nothing_is_seen_if_the_kernel_loads_no_probe() -> None:
    error = ladder.choose(Facts(NEW | {"tcp_cwnd_reset"}, ALL, True), refuses(*ladder.BY_NAME)).unseen()
    assert error is not None
    assert set(error.tried.values()) == {POLICY}


def test_a_choice_that_sees_timeouts_alone_is_incomplete() -> None:
    choice = ladder.choose(Facts(frozenset({"tcp_cong_state_set"}), frozenset(), False), works)
    assert choice.probes == {"idle": None, "rto_loss": "sendmsg", "app_limited": None, "tlp_loss": None}
    assert isinstance(choice.unseen(), NoProbe)
    assert ladder.choose(Facts(frozenset({"tcp_cong_state_set"})), works, reasons=("rto_loss",)).unseen() is None


@pytest.mark.parametrize("probe", ladder.BY_NAME)
def test_a_forced_probe_is_the_only_one_considered(probe: str) -> None:
    choice = ladder.choose(Facts(NEW | {"tcp_cwnd_reset"}, ALL, True), works, forced=probe)
    for reason in REASONS:
        assert choice.probes[reason] == (probe if reason in ladder.BY_NAME[probe].attachments else None)


def test_a_forced_probe_that_fails_has_no_substitute() -> None:
    error = ladder.choose(Facts(NEW, NOT_INLINED, True), refuses("fentry"), forced="fentry").unseen()
    assert error is not None
    assert error.tried == {"fentry": POLICY}


def test_no_reasons_need_no_probe() -> None:
    choice = ladder.choose(Facts(), works, reasons=())
    assert choice.probes == {}
    assert choice.unseen() is None


def test_a_kernel_without_kprobes_lacks_the_probe_kprobe() -> None:
    facts = Facts(CURRENT, ALL, False)
    assert ladder.lacks(facts, ladder.BY_NAME["kprobe"], "idle") == "this kernel has no kprobes (CONFIG_KPROBE_EVENTS)"


def test_every_probe_names_programs_that_exist() -> None:
    text = "".join(file.read_text(encoding="utf-8") for file in bpf_dir().glob("*.[ch]"))
    for attachments in (ladder.WRITES, *(group for probe in ladder.PROBES for group in probe.attachments.values())):
        for attachment in attachments:
            if attachment.kind not in ("fentry", "fexit"):
                assert f"int {attachment.program}(" in text, attachment


@pytest.mark.parametrize(
    ("tracepoints", "program"),
    [
        (NEW | {"sock_send_length"}, "on_write_follow"),
        (CURRENT | {"sock_send_length"}, "on_wrote_follow"),
        (CURRENT, None),
    ],
)
def test_one_program_at_most_notes_when_a_followed_socket_is_written_to(
    tracepoints: frozenset[str], program: str | None
) -> None:
    facts = Facts(tracepoints, ALL, True)
    noting = {a.program for a in ladder.WRITES}
    for name in ("tracepoint", "fentry", "kprobe", "tcp_probe"):
        for reason in ladder.BY_NAME[name].attachments:
            attached = {a.program for a in ladder.attachments(facts, ladder.BY_NAME[name], reason)}
            follows = reason in ladder.FOLLOWED and program
            assert attached & noting == ({program} if follows else set()), (name, reason)
    # The probe sendmsg has a program of its own there.
    sendmsg = ladder.BY_NAME["sendmsg"]
    assert all(ladder.attachments(facts, sendmsg, reason) == needed for reason, needed in sendmsg.attachments.items())


@pytest.mark.parametrize("name", ["tracepoint", "fentry", "kprobe"])
def test_a_socket_is_followed_after_resets_from_which_its_window_is_expected_to_return(name: str) -> None:
    following = {"on_tcp_probe_follow", "on_tcp_destroy_sock_follow"}
    for reason, attached in ladder.BY_NAME[name].attachments.items():
        programs = {a.program for a in attached}
        assert programs & following == (following if reason in ("idle", "app_limited") else set()), reason


def test_each_reason_has_the_function_that_the_kernels_patches_change() -> None:
    patches = (bpf_dir().parent / "kernel-patches").glob("*/*.patch")
    text = "".join(patch.read_text(encoding="utf-8") for patch in patches)
    assert list(FUNCTIONS) == list(REASONS)
    assert [function for function in FUNCTIONS.values() if f"{function}(" not in text] == []


@pytest.mark.parametrize("name", ["tcp_cwnd_reset", "tcp_cwnd_reset_tp"])
def test_the_patched_kernels_tracepoint_is_attached_by_its_name(name: str) -> None:
    facts = Facts(NEW | {name}, ALL, True)
    assert name in ladder.tracepoints()
    targets = {a.target for a in ladder.attachments(facts, ladder.BY_NAME["tracepoint"], "tlp_loss")}
    assert targets == {name}


def test_each_probe_says_how_exact_it_is() -> None:
    assert {probe.name: probe.exactness for probe in ladder.PROBES} == {
        "tracepoint": "exact",
        "fentry": "exact",
        "kprobe": "exact",
        "sendmsg": "computed by the kernel's rule, confirmed by the next ACK or send",
        "tcp_probe": "windows compared between ACKs and transmits, seen with the first packet after the idle time",
    }


@pytest.mark.parametrize("probe", ladder.PROBES, ids=lambda probe: probe.name)
def test_each_program_of_the_ladder_is_in_the_sources(probe: ladder.Probe) -> None:
    sources = "".join(path.read_text() for path in bpf_dir().glob("*.[ch]"))
    for group in (ladder.WRITES, *probe.attachments.values()):
        for attachment in group:
            assert re.search(rf"\b{attachment.program}\b", sources), attachment
