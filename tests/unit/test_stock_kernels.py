# SPDX-License-Identifier: Apache-2.0
"""Tests of the parts of tools/kernels that need no kernel: packages, modules, type information, the table."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kernels import images, modules, stock, table, vmlinuz
from tests.kernels.archive import Archive, depends, newest_fields
from tests.unit.btf_blob import Blob

SHOWN = """\
Package: linux-image-cloud-amd64
Version: 7.3.4-1
Depends: linux-base-cloud-amd64 (= 7.3.4-1), linux-image-7.3.4-cloud-amd64 (= 7.3.4-1), kmod | other

Package: linux-image-cloud-amd64
Version: 7.2.1-1
"""


def test_the_newest_version_of_a_package_is_taken() -> None:
    fields = newest_fields(SHOWN)
    assert fields["Version"] == "7.3.4-1"
    assert depends(fields, "linux-image-.+") == ["linux-image-7.3.4-cloud-amd64"]
    assert depends(fields, "kmod|other") == ["kmod"]


def test_packages_of_a_kernel_that_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """From 7.x on, the kernel, its modules and its configuration are in packages of their own."""
    needs = {
        "linux-image-amd64": "linux-base-amd64, linux-image-7.3.4-amd64 (= 7.3.4-1)",
        "linux-base-amd64": "linux-base-7.3.4-amd64",
        "linux-image-7.3.4-amd64": "kmod, linux-binary-7.3.4-amd64, linux-modules-7.3.4-amd64, linux-base-7.3.4-amd64",
    }
    monkeypatch.setattr(
        Archive, "fields", lambda _, name: {"Version": "7.3.4-1", "Depends": needs.get(name, "linux-base (>= 4)")}
    )
    names, version = stock.packages(Archive(("sid",), "amd64", Path()), "linux-image-amd64")
    assert names == [f"linux-{part}-7.3.4-amd64" for part in ("base", "binary", "image", "modules")]
    assert version == "7.3.4-1"


DEPENDENCIES = """\
kernel/fs/ext4/ext4.ko.xz: kernel/fs/jbd2/jbd2.ko.xz kernel/fs/mbcache.ko.xz kernel/lib/crc16.ko.xz
kernel/fs/jbd2/jbd2.ko.xz:
kernel/fs/mbcache.ko.xz:
kernel/lib/crc16.ko.xz:
kernel/arch/x86/crypto/crc32c-intel.ko.xz: kernel/lib/crc16.ko.xz
"""


def test_a_module_comes_after_those_that_it_needs() -> None:
    order = modules.in_order(DEPENDENCIES, "kernel/drivers/virtio/virtio_pci.ko\n", ["virtio_pci", "ext4"])
    assert [Path(path).name for path in order] == ["crc16.ko.xz", "mbcache.ko.xz", "jbd2.ko.xz", "ext4.ko.xz"]
    # A module's name has underscores and its file may have hyphens; nothing is loaded twice.
    more = modules.in_order(DEPENDENCIES, "", ["ext4"], ["crc32c_intel", "no_such"])
    assert more == [*order, "kernel/arch/x86/crypto/crc32c-intel.ko.xz"]


def test_a_module_that_is_missing_is_named() -> None:
    with pytest.raises(LookupError, match="virtio_blk"):
        modules.in_order(DEPENDENCIES, "", ["virtio_blk"])


def type_information() -> bytes:
    """Return BTF with one struct."""
    blob = Blob()
    blob.integer("int", 4)
    return blob.data()


@pytest.mark.parametrize("compress", [gzip.compress, lzma.compress, bz2.compress], ids=["gzip", "xz", "bzip2"])
def test_type_information_is_cut_out_of_a_compressed_kernel(compress: Callable[[bytes], bytes]) -> None:
    btf = type_information()
    # The magic number alone is no BTF.
    image = b"\x7fELF" + bytes(100) + b"\x9f\xeb\x01\x00" + bytes(50) + btf + b"more"
    payload = compress(image)
    # x86: a boot sector and one of setup code, in whose header the payload's place is; its size is appended.
    setup = bytearray(1024)
    setup[0x1F1], setup[0x202:0x206] = 1, b"HdrS"
    struct.pack_into("<II", setup, 0x248, 16, len(payload) + 4)
    x86 = bytes(setup) + bytes(16) + payload + struct.pack("<I", len(image)) + bytes(99)
    zboot = b"MZ\0\0zimg" + struct.pack("<II", 64, len(payload)) + bytes(48) + payload
    for compressed in (x86, zboot, payload):
        assert vmlinuz.btf(vmlinuz.kernel(compressed)) == btf


def test_a_kernel_that_is_not_compressed_is_taken_as_it_is() -> None:
    image = bytearray(b"MZ" + bytes(0x36) + b"ARM\x64" + type_information())
    assert vmlinuz.kernel(bytes(image)) == image


def test_kernels_without_type_information_are_refused() -> None:
    with pytest.raises(ValueError, match="no BTF"):
        vmlinuz.btf(bytes(1000))
    with pytest.raises(ValueError, match="isn't compressed"):
        vmlinuz.kernel(b"something else" * 100)


def test_what_a_guest_leaves_is_kept_for_later_ones(tmp_path: Path) -> None:
    output, kept = tmp_path / "output.tar", tmp_path / "kept"
    kept.mkdir()
    with output.open("wb") as file:
        file.truncate(1 << 20)
    images.keep(output, kept)
    assert list(kept.iterdir()) == []
    with tarfile.open(output, "w") as tar:
        for name in ("./var/cache/cwndtrace/a.json", "./opt/cwndtrace/bin/cwndtrace"):
            entry = tarfile.TarInfo(name)
            entry.size = 4
            tar.addfile(entry, io.BytesIO(b"text"))
    images.keep(output, kept)
    found = {}
    for path in kept.iterdir():
        with tarfile.open(path) as tar:
            found[path.name] = tar.getnames()
    assert found == {"images.tar": ["./var/cache/cwndtrace/a.json"], "opt.tar": ["./opt/cwndtrace/bin/cwndtrace"]}


def outcome(name: str, *results: tuple[str, bool, str], error: str = "") -> table.Outcome:
    found = [{"check": check, "ok": ok, "said": said, "seconds": 1.0} for check, ok, said in results]
    return table.Outcome(stock.BY_NAME[name], "6.1.1-1" if results else "", found, 600.0, error)


def test_the_table_shows_what_failed() -> None:
    outcomes = [
        outcome("5.10", error="could not be fetched: apt-get update: no answer"),
        outcome(
            "6.1",
            ("idle fentry", True, "12 of 12"),
            ("idle tcp_probe", False, "11 of 12; first difference: {}"),
            ("block I/O", True, "2036 of 2036"),
            ("demo", False, "exit code 77"),
        ),
    ]
    page = f"before\n{table.BEGIN}\n\nold\n\n{table.END}\nafter\n"
    written = table.replaced(page, outcomes)
    assert written.startswith("before\n")
    assert written.endswith("\nafter\n")
    assert "old" not in written
    assert "could not be fetched" in written
    (row,) = [line for line in written.splitlines() if line.startswith("| 6.1.1-1")]
    assert "fentry 12 of 12<br>tcp_probe **failed**: 11 of 12" in row
    assert "2036 of 2036" in row
    assert "2 of 4, 10 min" in row
    # Writing it again changes nothing.
    assert table.replaced(written, outcomes) == written
    assert outcomes[1].failures() == ["idle tcp_probe: 11 of 12; first difference: {}", "demo: exit code 77"]


def test_a_page_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="the page must have"):
        table.replaced("text", [])


def test_the_page_has_the_markers() -> None:
    page = (Path(__file__).parents[2] / "docs/kernels.md").read_text()
    assert page.count(table.BEGIN) == page.count(table.END) == 1
