#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Installs a kernel with the tcp:tcp_cwnd_reset tracepoint and makes GRUB choose it.
#
# It installs the newest linux-image-VERSION.*-cwndtrace package in vagrant/debs, or if there is none builds one from
# the distribution's source. After an interruption, ccache has what was already compiled.
#   KERNEL_VERSION   the kernel line, 6.12
#   MACHINE          the VM's name, for messages
. "$(dirname "$0")/common.sh"
need_root
: "${KERNEL_VERSION:=6.12}" "${MACHINE:=}"
DEBS=$PROJECT/vagrant/debs

# Prints the newest package of the kernel line in a folder.
image_in() { # FOLDER
    find "$1" -maxdepth 1 \( -name "linux-image-$KERNEL_VERSION-cwndtrace_*.deb" -o \
        -name "linux-image-$KERNEL_VERSION.*-cwndtrace_*.deb" \) 2>/dev/null | sort -V | tail -n 1
}

build() {
    need_memory 3072 "building a kernel"
    mkdir -p "$CACHE"
    "$PROJECT/tools/setup" packages kernel
    source=linux-source-$KERNEL_VERSION
    if apt-cache show "$source" >/dev/null 2>&1; then
        say "source: $source"
        apt_install "$source"
    else
        say "this Debian has no $source, so kernel-patches/build looks for it in other ones"
    fi
    say "building Linux $KERNEL_VERSION; see docs/vm.md for how long that takes"
    export PATH="/usr/lib/ccache:$PATH" CCACHE_DIR="$CACHE/ccache" CCACHE_NOHASHDIR=1
    status=0
    folder=$("$PROJECT/kernel-patches/build" --version "$KERNEL_VERSION" --config localmodconfig --target deb \
        --cache "$CACHE") || status=$?
    case $status in
    0) return ;;
    2) die "there is no source of Linux $KERNEL_VERSION, or no patches that fit it (see above)." \
        "On the host: VAGRANT_KERNEL=6.12 vagrant provision $MACHINE, or another line (docs/vm.md)" ;;
    esac
    log=$(find "$CACHE/kernels" -name '*.failed.log' -newermt "@$BEGIN" 2>/dev/null | tail -n 1)
    if [ -n "$log" ]; then
        echo "The end of $log:"
        tail -n 25 "$log"
    fi >&2
    die "the kernel couldn't be built (see above)." \
        "Fix the cause and continue with: vagrant provision $MACHINE. The compiled files are kept"
}

# Makes GRUB boot this release even if other versions are installed; they stay in its menu.
choose() { # RELEASE
    menu=/boot/grub/grub.cfg
    [ -e "$menu" ] || die "there is no $menu, so this box doesn't boot with GRUB." "Use a box that does (docs/vm.md)"
    entry=$(sed -n "s/.*menuentry_id_option '\(gnulinux-$1-advanced-[^']*\)'.*/\1/p" "$menu" | head -n 1)
    submenu=$(sed -n "s/^submenu .*menuentry_id_option '\([^']*\)'.*/\1/p" "$menu" | head -n 1)
    [ -n "$entry" ] || die "GRUB's menu has no entry for $1." "See: ls /boot; sudo update-grub"
    default=${submenu:+$submenu>}$entry
    # The file is the last one in the folder, since each may override the files before it.
    file=/etc/default/grub.d/zz-cwndtrace.cfg
    if [ "$(cat "$file" 2>/dev/null)" = "GRUB_DEFAULT='$default'" ] && grep -qF "set default=\"$default\"" "$menu"; then
        return
    fi
    mkdir -p "$(dirname "$file")"
    echo "GRUB_DEFAULT='$default'" >"$file"
    attempt "update-grub" "Fix the cause in the VM until sudo update-grub works, then: vagrant provision $MACHINE" update-grub
}

# origin is a hash of the kernel's sources. It doesn't include the running configuration, which is that of the patched
# kernel after the first run.
image=$(image_in "$DEBS")
if [ -n "$image" ]; then
    say "taking $(basename "$image") from vagrant/debs"
    origin=$(sha256sum <"$image")
else
    origin=$({
        echo "$KERNEL_VERSION"
        find "$PROJECT/kernel-patches" -type f -exec sha256sum {} + | LC_ALL=C sort
    } | sha256sum)
fi
release=$(cat "$STATE/kernel" 2>/dev/null || :)

if [ "$(cat "$STATE/kernel.origin" 2>/dev/null)" = "$origin" ] && [ -e "/boot/vmlinuz-$release" ]; then
    say "$release is installed"
else
    if [ -z "$image" ]; then
        say "no linux-image-$KERNEL_VERSION.*-cwndtrace package is in vagrant/debs, so one is built"
        build
        image=$(image_in "$folder")
        [ -n "$image" ] || die "no linux-image package is in $folder." "See its build.log"
    fi
    release=$(dpkg-deb -f "$image" Package) || die "$image is no Debian package." "Copy or build it again"
    release=${release#linux-image-}
    need_disk 300 /boot "installing a kernel"
    say "installing $release"
    attempt "installing $(basename "$image")" "Fix the cause and continue with: vagrant provision $MACHINE" dpkg -i "$image"
    mkdir -p "$STATE"
    echo "$release" >"$STATE/kernel"
    echo "$origin" >"$STATE/kernel.origin"
fi
choose "$release"
say "GRUB boots $release; also in its menu: $(find /boot -name 'vmlinuz-*' ! -name "vmlinuz-$release" -printf '%f ')"
took
