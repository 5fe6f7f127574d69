# SPDX-License-Identifier: Apache-2.0
"""The probe ladder, which selects the best probe for each reason from a kernel's facts. It loads nothing itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Final

from cwndtrace.errors import NoProbe

REASONS: Final = ("idle", "rto_loss", "app_limited", "tlp_loss")

FUNCTIONS: Final = {
    "idle": "tcp_cwnd_restart",
    "rto_loss": "tcp_enter_loss",
    "app_limited": "tcp_cwnd_application_limited",
    "tlp_loss": "tcp_process_tlp_ack",
}
"""The kernel function in which each reason lowers the window."""

_TRACEPOINT: Final = frozenset({"raw_tracepoint", "tp_btf"})


@dataclass(frozen=True)
class Attachment:
    """One BPF program and its target. ``kind`` is raw_tracepoint, tp_btf, fentry, fexit, kprobe or kretprobe.

    With tp_btf, the target is a raw tracepoint too, but the verifier knows the types that the arguments point to, so
    the program can load their members directly.
    """

    kind: str
    target: str
    program: str


@dataclass(frozen=True)
class Facts:
    """The facts about a kernel that are needed before anything is loaded.

    ``tracepoints`` and ``functions`` are those that this project uses and the kernel has; ``functions`` are those that
    aren't inlined.
    """

    tracepoints: frozenset[str] = frozenset()
    functions: frozenset[str] = frozenset()
    kprobes: bool = False


@dataclass(frozen=True)
class Probe:
    """One probe: its exactness, and the programs that it attaches for each reason that it can see."""

    name: str
    exactness: str
    attachments: dict[str, tuple[Attachment, ...]]


def _raw(target: str, program: str) -> Attachment:
    return Attachment("raw_tracepoint", target, program)


def _btf(target: str, program: str) -> Attachment:
    return Attachment("tp_btf", target, program)


# These follow a socket after its reset, on probes that need their tracepoints for nothing else.
_FOLLOW_END: Final = (_btf("tcp_destroy_sock", "on_tcp_destroy_sock_follow"),)
_FOLLOW: Final = (_btf("tcp_probe", "on_tcp_probe_follow"), *_FOLLOW_END)
FOLLOWED: Final = ("idle", "app_limited")
"""The reasons after which a socket is followed. After a loss, its window isn't expected to return."""
_FOLLOWED: Final = {r: _FOLLOW if r in FOLLOWED else () for r in REASONS}

WRITES: Final = (_btf("tcp_sendmsg_locked", "on_write_follow"), _btf("sock_send_length", "on_wrote_follow"))
"""The programs that note when a followed socket's data was written, best first (Linux 6.16 and 6.3 have them)."""

_BY_STATE: Final = {
    "rto_loss": (_raw("tcp_cong_state_set", "on_tcp_cong_state_set"),),
    "tlp_loss": (
        _raw("tcp_cong_state_set", "on_tcp_cong_state_set_tlp"),
        _raw("tcp_retransmit_skb", "on_tcp_retransmit_skb_tlp"),
    ),
}
"""The losses, for the probes that don't see the kernel's functions."""

_RESET: Final = "tcp_cwnd_reset"
_BARE: Final = "tcp_cwnd_reset_tp"
"""The same tracepoint in the form without an event in tracefs (kernel-patches/bare): DECLARE_TRACE adds the suffix."""

PROBES: Final = (
    Probe(
        "tracepoint",
        "exact",
        {r: (_raw(_RESET, "on_tcp_cwnd_reset"), *_FOLLOWED[r]) for r in REASONS},
    ),
    Probe(
        "fentry",
        "exact",
        {
            r: (Attachment("fentry", f, f"fentry_in_{r}"), Attachment("fexit", f, "fentry_out"), *_FOLLOWED[r])
            for r, f in FUNCTIONS.items()
        },
    ),
    Probe(
        "kprobe",
        "exact",
        {
            r: (Attachment("kretprobe", f, "kprobe_out"), Attachment("kprobe", f, f"kprobe_in_{r}"), *_FOLLOWED[r])
            for r, f in FUNCTIONS.items()
        },
    ),
    Probe(
        "sendmsg",
        "computed by the kernel's rule, confirmed by the next ACK or send",
        {
            "idle": (
                _btf("inet_sock_set_state", "on_inet_sock_set_state"),
                _btf("tcp_probe", "on_tcp_probe"),
                _btf("tcp_destroy_sock", "on_tcp_destroy_sock"),
                _btf("tcp_sendmsg_locked", "on_tcp_sendmsg_locked"),
            ),
            **_BY_STATE,
        },
    ),
    Probe(
        "tcp_probe",
        "windows compared between ACKs and transmits, seen with the first packet after the idle time",
        {
            "idle": (
                _btf("net_dev_queue", "on_net_dev_queue_first"),
                _raw("napi_poll", "on_napi_poll"),
                _btf("tcp_probe", "on_tcp_probe_ack"),
                _btf("tcp_destroy_sock", "on_tcp_destroy_sock_window_follow"),
            ),
            **_BY_STATE,
        },
    ),
)
"""The probes, best first."""

BY_NAME: Final = {probe.name: probe for probe in PROBES}


def tracepoints() -> frozenset[str]:
    """Return every tracepoint that some probe attaches to."""
    groups = [WRITES, *(group for probe in PROBES for group in probe.attachments.values())]
    return frozenset(a.target for group in groups for a in group if a.kind in _TRACEPOINT) | {_BARE}


def _here(facts: Facts, a: Attachment) -> Attachment:
    """Return an attachment with the name that its tracepoint has on such a kernel."""
    bare = a.target == _RESET and _RESET not in facts.tracepoints and _BARE in facts.tracepoints
    return replace(a, target=_BARE) if bare else a


def attachments(facts: Facts, probe: Probe, reason: str) -> tuple[Attachment, ...]:
    """Return what a probe attaches for a reason on such a kernel: what it needs, and where possible one of ``WRITES``.

    Without the latter, data counts as written when the ACK after it arrives, at the earliest.
    """
    needed = tuple(_here(facts, a) for a in probe.attachments[reason])
    if reason not in FOLLOWED or any(a.target == WRITES[0].target for a in needed):
        return needed
    return (*needed, *[a for a in WRITES if a.target in facts.tracepoints][:1])


def lacks(facts: Facts, probe: Probe, reason: str) -> str | None:
    """Return why ``probe`` can't see ``reason`` on such a kernel, or None where it is worth trying to load it."""
    attachments = probe.attachments.get(reason)
    if attachments is None:
        return f"this probe can't see {reason}"
    for a in (_here(facts, a) for a in attachments):
        if a.kind in _TRACEPOINT and a.target not in facts.tracepoints:
            return f"this kernel has no tracepoint {a.target}"
        if a.kind not in _TRACEPOINT and a.target not in facts.functions:
            return f"{a.target}() is inlined in this kernel"
        if a.kind in ("kprobe", "kretprobe") and not facts.kprobes:
            return "this kernel has no kprobes (CONFIG_KPROBE_EVENTS)"
    return None


@dataclass
class Choice:
    """The chosen probe for each reason (None where no probe sees it), and why each better probe wasn't chosen."""

    probes: dict[str, str | None] = field(default_factory=dict)
    tried: dict[str, dict[str, str]] = field(default_factory=dict)

    def unseen(self) -> NoProbe | None:
        """Return the error for a choice by which idle resets can't be seen, or, where they weren't asked for, none."""
        needed = {"idle"} & self.probes.keys() or self.probes.keys()
        if not needed or any(self.probes[reason] for reason in needed):
            return None
        reason, tried = next((r, self.tried[r]) for r in self.probes if r in needed)
        cause = f"no probe can see {reason} resets on this kernel: " + "; ".join(f"{r}: {w}" for r, w in tried.items())
        return NoProbe(cause, "cwndtrace doctor lists what is missing and how to fix it", tried)


def choose(
    facts: Facts,
    trial: Callable[[str, str], str | None],
    forced: str | None = None,
    reasons: Iterable[str] = REASONS,
) -> Choice:
    """Return the best probe for each reason.

    ``trial(probe, reason)`` loads and attaches the programs; it returns None, or why that failed. It is called only
    where the facts allow the probe, best probe first, until one works. ``forced`` names the only probe to consider.
    """
    choice = Choice()
    for reason in reasons:
        choice.probes[reason] = None
        tried = choice.tried.setdefault(reason, {})
        for probe in PROBES if forced is None else (BY_NAME[forced],):
            why = lacks(facts, probe, reason) or trial(probe.name, reason)
            if why is None:
                choice.probes[reason] = probe.name
                break
            tried[probe.name] = why
    return choice
