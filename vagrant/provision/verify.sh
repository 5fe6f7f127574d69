#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Is it the chosen kernel that runs, with the tracepoint in it? Ends with what cwndtrace says of this kernel.
. "$(dirname "$0")/common.sh"
need_root

chosen=$(cat "$STATE/kernel" 2>/dev/null) || die "no kernel was chosen yet." "Outside: vagrant provision"
[ "$(uname -r)" = "$chosen" ] ||
    die "the VM runs $(uname -r), and $chosen was chosen." "Outside: vagrant reload. If that doesn't help: sudo update-grub in the VM"
mountpoint -q /sys/kernel/tracing || mount -t tracefs tracefs /sys/kernel/tracing
[ -e /sys/kernel/tracing/events/tcp/tcp_cwnd_reset ] ||
    die "$chosen has no tracepoint tcp:tcp_cwnd_reset." "Build it by kernel-patches/build, without --unpatched"
say "runs $chosen, which has tcp:tcp_cwnd_reset"
cwndtrace doctor
took
