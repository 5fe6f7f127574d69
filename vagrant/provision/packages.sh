#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Installs the distribution packages that cwndtrace needs, and tools that show the tracepoint.
. "$(dirname "$0")/common.sh"
need_root

# An interrupted run may have left packages unconfigured.
[ -z "$(dpkg --audit)" ] || attempt "dpkg --configure -a" "Fix the cause in the VM, then: vagrant provision" dpkg --configure -a
say "packages for tracing"
"$PROJECT/tools/setup" packages run
for tool in bpftrace linux-perf; do
    if ! dpkg-query -W -f '${db:Status-Status}' "$tool" 2>/dev/null | grep -qx installed; then
        say "installing $tool"
        # The project doesn't need them, so provisioning continues in a VM without a network.
        (apt_install "$tool") || say "continuing without $tool"
    fi
done
took
