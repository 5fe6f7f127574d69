# SPDX-License-Identifier: Apache-2.0
"""Facts about kernels of which there are only a few files or types here."""

from __future__ import annotations

import gzip
import os
import time
from pathlib import Path

import pytest

from cwndtrace.errors import KernelLacks
from cwndtrace.kernel import facts, offsets
from cwndtrace.kernel.btf import Btf
from tests.unit.btf_blob import Blob

_RELEASE = os.uname().release
_PLACES = (f"boot/config-{_RELEASE}", f"usr/lib/modules/{_RELEASE}/config", f"lib/modules/{_RELEASE}/config")


@pytest.mark.parametrize("rate", [100, 250, 300, 1000])
@pytest.mark.parametrize("place", ["proc/config.gz", *_PLACES])
def test_hz_is_read_from_the_kernels_configuration(tmp_path: Path, place: str, rate: int) -> None:
    text = f"# CONFIG_HZ_PERIODIC is not set\nCONFIG_HZ_{rate}=y\nCONFIG_HZ={rate}\n".encode()
    file = tmp_path / place
    file.parent.mkdir(parents=True)
    file.write_bytes(gzip.compress(text) if file.suffix == ".gz" else text)
    assert facts.hz(tmp_path) == rate


@pytest.mark.parametrize("rate", [100, 250, 300, 1000])
def test_hz_is_measured_where_there_is_no_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rate: int
) -> None:
    clock = [5.0]
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/timer_list").touch()
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: f"now at 1 nsecs\njiffies: {int(clock[0] * rate)}\n")
    monkeypatch.setattr(facts, "_configuration", lambda _: "")
    monkeypatch.setattr(time, "monotonic_ns", lambda: int(clock[0] * 1e9))
    monkeypatch.setattr(time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    assert facts.hz(tmp_path) == rate


def test_an_unknown_hz_raises_kernel_lacks(tmp_path: Path) -> None:
    with pytest.raises(KernelLacks, match="can't tell the kernel's HZ") as caught:
        facts.hz(tmp_path)
    assert "/boot" in caught.value.remedy


@pytest.mark.parametrize(
    ("text", "level"),
    [
        ("[none] integrity confidentiality\n", "none"),
        ("none [integrity] confidentiality\n", "integrity"),
        ("none\n", "unknown"),
        (None, "unknown (securityfs isn't mounted)"),
    ],
)
def test_the_level_of_lockdown_is_the_one_in_brackets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, level: str
) -> None:
    if text is not None:
        (tmp_path / "lockdown").write_text(text)
    places = {"/sys/kernel/security/lockdown": tmp_path / "lockdown"}
    monkeypatch.setattr(facts, "Path", places.__getitem__)
    assert facts.lockdown() == level


# ---- the cgroup of a socket ----

_SK_CGROUP = "READ_OPT(u64, sk, sock, sk_cgrp_data__val) READ_OPT(u64, sk, sock, sk_cgrp_data__cgroup)"


def _kernel(data: str) -> Btf:
    """Return a kernel's types, whose struct sock_cgroup_data is as in Linux 5.15 and later, as before, or empty."""
    blob = Blob()
    u8, u32, u64 = (blob.integer(f"u{8 * n}", n) for n in (1, 4, 8))
    cgroup = blob.struct("cgroup", 16, [("kn", blob.pointer(blob.struct("kernfs_node", 8, [("id", u64, 0)])), 64)])
    if data == "5.15":
        inside = blob.struct("sock_cgroup_data", 16, [("cgroup", blob.pointer(cgroup), 0), ("classid", u32, 64)])
    elif data == "5.10":
        tags = blob.struct("", 8, [("is_data", u8, 1 << 24), ("no_refcnt", u8, 1 << 24 | 1)], bitfields=True)
        both = blob.union("", 8, [("", tags, 0), ("val", u64, 0)])
        inside = blob.struct("sock_cgroup_data", 8, [("", both, 0)])
    else:
        inside = blob.struct("sock_cgroup_data", 0, [])
    blob.struct("sock", 32, [("a", u64, 0), ("sk_cgrp_data", inside, 128)])
    return blob.btf()


@pytest.mark.parametrize(("data", "lacking"), [("5.15", "val"), ("5.10", "cgroup")])
def test_a_sockets_cgroup_is_read_from_the_member_that_the_kernel_has(data: str, lacking: str) -> None:
    facts.check_sock_cgroups(_kernel(data))
    defines = offsets.defines(_kernel(data), _SK_CGROUP)
    sizes = {name: defines[f"SIZE_sock__sk_cgrp_data__{name}"] for name in ("cgroup", "val")}
    assert sizes == {"cgroup": 8, "val": 8} | {lacking: 0}
    assert max(defines[f"OFF_sock__sk_cgrp_data__{name}"] for name in ("cgroup", "val")) == 16


def test_a_kernel_without_the_cgroups_of_sockets_refuses_the_filter() -> None:
    with pytest.raises(KernelLacks, match="doesn't tell the cgroup of a connection") as e:
        facts.check_sock_cgroups(_kernel("none"))
    assert "--port" in str(e.value.remedy)
