# SPDX-License-Identifier: Apache-2.0
"""What the kernel's TCP calls the settings that this project is about, and whom they don't touch."""

from __future__ import annotations

from typing import Final

IDLE_SYSCTL: Final = "net.ipv4.tcp_slow_start_after_idle"
CONTROL_SYSCTL: Final = "net.ipv4.tcp_congestion_control"
"""What ``sysctls`` of meta.json holds for each network namespace, beside its name and whether it is the host's."""

EXEMPT: Final = frozenset({"bbr", "bbr2", "bbr3"})
"""Congestion controls with a cong_control of their own, which tcp_slow_start_after_idle_check() leaves alone
(include/net/tcp.h): in the kernel's tree only net/ipv4/tcp_bbr.c; BPF ones can't be told by name."""
