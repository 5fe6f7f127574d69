# SPDX-License-Identifier: Apache-2.0
# Functions and variables of all provisioning steps, which source this file first. They run as root in the VM.
# shellcheck shell=sh disable=SC2034  # variables are for the steps
set -eu
umask 022
export DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8

PROJECT=$(cd "$(dirname "$0")/../.." && pwd)
STEP=$(basename "$0" .sh)
: "${STATE:=/etc/cwndtrace}" "${CACHE:=/var/cache/cwndtrace}"
BEGIN=$(date +%s)

say() {
    printf '%s %s: %s\n' "$(date +%H:%M:%S)" "$STEP" "$*"
}

took() {
    say "done after $(($(date +%s) - BEGIN)) s"
}

die() { # CAUSE CURE
    printf '%s: %s\n  %s\n' "$STEP" "$1" "$2" >&2
    exit 1
}

need_root() {
    [ "$(id -u)" = 0 ] || die "this step needs root." "Run it with vagrant provision, or with sudo in the VM"
}

need_memory() { # MIB WHAT
    have=$(($(sed -n 's/^MemTotal: *\([0-9]*\) kB/\1/p' /proc/meminfo) / 1024))
    # MemTotal is less than the VM's memory, because the kernel reserves some.
    [ "$have" -ge $(($1 * 9 / 10)) ] ||
        die "$2 takes $1 MiB of memory, and this VM has $have MiB." \
            "On the host: VAGRANT_MEMORY=$1 vagrant reload --provision; or put built packages into vagrant/debs"
}

need_disk() { # MIB FOLDER WHAT
    have=$(df --output=avail -m "$2" | tail -n 1 | tr -d ' ')
    [ "$have" -ge "$1" ] ||
        die "$3 takes $1 MiB in $2, and $have MiB are free." \
            "Make room (sudo apt-get clean, remove old kernels), use a box with a larger disk, or put built packages into vagrant/debs"
}

# Runs a command without showing its output, or shows the end of that if the command fails.
attempt() { # WHAT CURE COMMAND...
    what=$1 cure=$2
    shift 2
    log=$(mktemp)
    if ! "$@" >"$log" 2>&1 </dev/null; then
        tail -n 25 "$log" >&2
        rm -f "$log"
        die "$what failed (see above)." "$cure"
    fi
    rm -f "$log"
}

apt_install() { # PACKAGE
    attempt "installing $1" "Check that the VM can reach its package mirror" \
        apt-get -q -y -o DPkg::Lock::Timeout=300 --no-install-recommends install "$1"
}
