#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# The first process in a stock kernel's root: set the machine up, run the checks that the arguments name, hand over what
# later guests can use, and end. Results go to the port vport*, everything else to the console.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 TERM=dumb
opt=/opt/cwndtrace clone=/srv/cwndtrace

disk() { # SERIAL
    grep -lx "$1" /sys/block/vd*/serial | sed 's,/sys/block/\(.*\)/serial,/dev/\1,'
}

mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
for place in /dev/shm /run /tmp; do mount -t tmpfs -o mode=1777 tmpfs "$place"; done
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t securityfs securityfs /sys/kernel/security
ln -sfn /proc/self/fd /dev/fd
hostname guest
echo "127.0.0.1 localhost guest" >/etc/hosts
[ -e /etc/ld.so.cache ] || ldconfig
ip link set lo up
echo "guest: unpacking"
tar -xf "$(disk input)" -C / || echo "guest: the disk with the checkout can't be unpacked"
chown -R user: $clone
for port in /dev/vport*; do exec 3>"$port"; done

# On a machine with udev, opening /dev/loop-control or /dev/net/tun loads these.
modprobe -a loop tun

# A root of another architecture comes without the project: install it as a user without a network would.
if [ -d /wheels ]; then
    echo "guest: installing"
    before=$(date +%s) ok=false
    kept=$([ -x $opt/bin/cwndtrace ] && echo true || echo false)
    PIP_NO_INDEX=1 PIP_FIND_LINKS=/wheels make -s -C $clone install PACKAGES=no >/run/install.log 2>&1 && ok=true
    cat /run/install.log /tmp/cwndtrace-setup.* 2>/dev/null
    said=$(grep '^set-up:' /run/install.log | tail -n 1 | tr -d '"\134')
    printf '{"check": "install", "ok": %s, "said": "%s", "seconds": %d}\n' $ok "$said" $(($(date +%s) - before)) >&3
    $kept || echo ".${opt}" >/run/keep
fi

# The installed package is checked, and not the one in the checkout.
mkdir /run/checks
ln -s $clone/tests /run/checks/tests
cd /run/checks || exit
# The harness allows for the ticks that an emulated machine misses.
CWNDTRACE_VM=stock PYTHONPATH=/run/checks $opt/bin/python -P -X faulthandler -m tests.kernels.inside "$@" >&3
echo "guest: handing over"
# shellcheck disable=SC2046  # a list of words
tar -cf "$(disk output)" -C / ./var/cache/cwndtrace $(cat /run/keep 2>/dev/null)
sync
echo "guest: done"
echo b >/proc/sysrq-trigger
sleep 60
