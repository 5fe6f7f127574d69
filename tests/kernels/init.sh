#!/bin/busybox sh
# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=dash
# The initramfs's init: load the kernel's own modules for the disks, and go on in the root.
/bin/busybox --install -s /bin
PATH=/bin
mkdir -p /proc /sys /dev /newroot
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
while read -r module; do
    insmod "/modules/$module" || echo "init: $module can't be loaded"
done </modules/order
# Kernels differ in the order in which they find the disks.
root='' left=300
until [ -n "$root" ] || [ "$left" = 0 ]; do
    sleep 0.1
    left=$((left - 1))
    root=$(grep -lx root /sys/block/vd*/serial 2>/dev/null | cut -d / -f 4)
done
mount -t ext4 -o noatime "/dev/$root" /newroot || echo "init: the root can't be mounted"
mount --move /dev /newroot/dev
mount --move /proc /newroot/proc
mount --move /sys /newroot/sys
cp /guest.sh /newroot/guest.sh
exec switch_root /newroot /bin/bash /guest.sh "$@"
