# SPDX-License-Identifier: Apache-2.0
"""Tests of machines that lack or forbid a feature: the command names cause and cure, with the right exit code.

Namespaces, capabilities and limits are changed only for the command.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from cwndtrace.capture import bcc
from tests.harness.command import assert_short, call, lasting
from tests.harness.users import need_user_namespace

pytestmark = pytest.mark.live

MOUNTS = ("unshare", "--mount", "sh", "-c")


def hidden(*commands: str) -> tuple[str, ...]:
    """Return what stands before the command, so that it runs after these, in a separate mount namespace."""
    return (*MOUNTS, " && ".join([*commands, 'exec "$0" "$@"']))


def folder_of_bcc() -> str:
    return shlex.quote(str(Path(str(bcc.module().__file__)).parent))


def test_missing_bcc_is_reported(tmp_path: Path) -> None:
    before = hidden(f"mount -t tmpfs none {folder_of_bcc()}")
    assert_short(
        call("run", "-o", tmp_path / "a.cwnd", before=before), 1, "bcc isn't installed", "apt install python3-bpfcc"
    )
    assert not (tmp_path / "a.cwnd").exists()


def test_a_missing_libbcc_is_reported(tmp_path: Path) -> None:
    """bcc's Python package is installed, but not the library, which only compiling needs."""
    bcc.module()
    libraries = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libbcc.so" in line]
    no_cache = "mount -t tmpfs none /var/cache"
    before = hidden(no_cache, *(f"mount --bind /dev/null {shlex.quote(name)}" for name in sorted(set(libraries))))
    done = call("run", "-o", tmp_path / "a.cwnd", before=before)
    assert_short(done, 1, r"bcc in .* can't be loaded: .*libbcc", "apt install python3-bpfcc")


def test_another_package_called_bcc_is_not_imported(tmp_path: Path) -> None:
    (tmp_path / "bcc").mkdir()
    (tmp_path / "bcc" / "__init__.py").write_text("raise SystemExit('the unrelated package was imported')")
    python = f"env PYTHONPATH={tmp_path}:$PYTHONPATH"
    before = (*MOUNTS, f'mount -t tmpfs none {folder_of_bcc()} && exec {python} "$0" "$@"')
    done = call("run", "-o", tmp_path / "a.cwnd", before=before)
    assert_short(done, 1, "PyPI's unrelated package", "apt install python3-bpfcc")


def test_missing_btf_is_reported(tmp_path: Path) -> None:
    done = call("run", "-o", tmp_path / "a.cwnd", before=hidden("mount -t tmpfs none /sys/kernel/btf"))
    assert_short(done, 77, "no BTF: /sys/kernel/btf/vmlinux", "CONFIG_DEBUG_INFO_BTF=y")


def test_missing_capabilities_are_reported(tmp_path: Path) -> None:
    without = "--bounding-set=-bpf,-perfmon,-sys_admin", "--inh-caps=-all"
    done = call("run", "-o", tmp_path / "a.cwnd", before=("setpriv", *without))
    assert_short(done, 1, "lacks CAP_BPF and CAP_PERFMON", "--cap-add SYS_ADMIN")


def test_a_rootless_container_is_reported(tmp_path: Path) -> None:
    need_user_namespace()
    done = call("run", "-o", tmp_path / "a.cwnd", before=("unshare", "--user", "--map-root-user", "--pid", "--fork"))
    assert_short(done, 1, "root in a user namespace", "on the host")


SECCOMP = """
import ctypes, os, struct, sys
libc = ctypes.CDLL(None)
number = {"x86_64": 321}.get(os.uname().machine, 280)
# Load the system call's number. Return EPERM if it is bpf's, else allow it.
rules = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000)]
program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
filter = struct.pack("HxxxxxxP", len(rules), ctypes.addressof(program))
libc.prctl(38, 1, 0, 0, 0)
assert libc.prctl(22, 2, filter, 0, 0) == 0
os.execvp(sys.argv[1], sys.argv[1:])
"""


def test_a_seccomp_filter_is_reported(tmp_path: Path) -> None:
    done = call("run", "-o", tmp_path / "a.cwnd", before=(sys.executable, "-c", SECCOMP))
    assert_short(done, 1, "a seccomp filter refuses bpf", "seccomp=unconfined")


def test_doctor_reports_a_seccomp_filter() -> None:
    done = call("doctor", before=(sys.executable, "-c", SECCOMP))
    assert done.returncode == 77
    assert "a seccomp filter refuses bpf" in done.stdout
    assert "seccomp=unconfined" in done.stdout
    assert lasting(done.stderr) == []


def test_doctor_works_without_tracefs() -> None:
    commands = "while umount /sys/kernel/tracing 2>/dev/null; do :; done; umount -R /sys/kernel/debug 2>/dev/null; true"
    done = call("doctor", before=(*MOUNTS, f'{commands}; exec "$0" "$@"'))
    assert (done.returncode, lasting(done.stderr)) == (0, [])
    assert "not mounted; cwndtrace doesn't need it" in done.stdout


@pytest.mark.parametrize("most", [20, 64])
def test_a_low_limit_of_open_files_is_reported(most: int, tmp_path: Path) -> None:
    """Each BPF object of a tracer is an open file."""
    done = call("run", "-d", "1s", "-o", tmp_path / "a.cwnd", before=("prlimit", f"--nofile={most}"))
    assert_short(done, 1, f"may have {most} files open at once", r"ulimit -n 1024")
    assert not (tmp_path / "a.cwnd").exists()
