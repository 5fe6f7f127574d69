# SPDX-License-Identifier: Apache-2.0
"""The kernel's names of the TCP settings behind idle resets, and the congestion controls that they don't affect."""

from __future__ import annotations

from typing import Final

IDLE_SYSCTL: Final = "net.ipv4.tcp_slow_start_after_idle"
CONTROL_SYSCTL: Final = "net.ipv4.tcp_congestion_control"
"""For each network namespace, ``sysctls`` in meta.json holds these two, its name and whether it is the host's.

``sysctls_end`` holds those when the capture ended, and as ``new`` whether the namespace wasn't there at the start."""

EXEMPT: Final = frozenset({"bbr", "bbr2", "bbr3"})
"""Congestion controls with a cong_control of their own, whose windows tcp_slow_start_after_idle_check() leaves alone
(include/net/tcp.h). In the kernel's tree only net/ipv4/tcp_bbr.c has one; those written in BPF can't be recognised by
name."""

INIT_CWND: Final = 10
"""The initial window in segments of a connection whose route sets none (TCP_INIT_CWND in include/net/tcp.h)."""
