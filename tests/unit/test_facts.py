# SPDX-License-Identifier: Apache-2.0
"""Facts about kernels of which there are only a few files or types here."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest

from cwndtrace.errors import KernelLacks
from cwndtrace.kernel import facts, offsets
from cwndtrace.kernel.btf import Btf
from tests.unit.btf_blob import Blob


def test_hz_is_read_from_proc_config_gz(tmp_path: Path) -> None:
    (tmp_path / "config.gz").write_bytes(gzip.compress(b"CONFIG_HZ_300=y\nCONFIG_HZ=300\n"))
    assert facts.hz(proc=tmp_path) == 300


def test_hz_is_read_from_boot_config(tmp_path: Path) -> None:
    (tmp_path / f"config-{os.uname().release}").write_text("CONFIG_HZ=100\n")
    assert facts.hz(boot=tmp_path, proc=tmp_path) == 100


def test_an_unknown_hz_raises_kernel_lacks(tmp_path: Path) -> None:
    with pytest.raises(KernelLacks, match="can't tell the kernel's HZ") as caught:
        facts.hz(boot=tmp_path, proc=tmp_path)
    assert "/boot" in caught.value.remedy


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
