#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Checks that the chosen kernel runs and has the tracepoint, and runs cwndtrace doctor.
. "$(dirname "$0")/common.sh"
need_root

chosen=$(cat "$STATE/kernel" 2>/dev/null) || die "no kernel was chosen yet." "On the host: vagrant provision"
[ "$(uname -r)" = "$chosen" ] ||
    die "the VM runs $(uname -r), and not the chosen $chosen." "On the host: vagrant reload. If that doesn't help: sudo update-grub in the VM"
mountpoint -q /sys/kernel/tracing || mount -t tracefs tracefs /sys/kernel/tracing
[ -e /sys/kernel/tracing/events/tcp/tcp_cwnd_reset ] ||
    die "$chosen has no tracepoint tcp:tcp_cwnd_reset." "Build it with kernel-patches/build, without --unpatched"
say "the VM runs $chosen, which has tcp:tcp_cwnd_reset"
cwndtrace doctor
took
