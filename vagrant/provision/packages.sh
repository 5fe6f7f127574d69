#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Distribution packages: what cwndtrace needs, and what one looks at the tracepoint with.
. "$(dirname "$0")/common.sh"
need_root

# What an interrupted run left half done.
[ -z "$(dpkg --audit)" ] || attempt "dpkg --configure -a" "Mend it in the VM, then: vagrant provision" dpkg --configure -a
say "packages for tracing"
"$PROJECT/tools/setup" packages run
for tool in bpftrace linux-perf; do
    if ! dpkg-query -W -f '${db:Status-Status}' "$tool" 2>/dev/null | grep -qx installed; then
        say "installing $tool"
        # Nothing of the project needs them, so a VM without network goes on.
        (apt_install "$tool") || say "goes on without $tool"
    fi
done
took
