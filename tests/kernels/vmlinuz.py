# SPDX-License-Identifier: Apache-2.0
"""The type information (BTF) of a compressed kernel, without booting it."""

from __future__ import annotations

import bz2
import lzma
import struct
import subprocess
import zlib
from typing import Final

# The magic number, version 1 and no flags.
_BTF: Final = b"\x9f\xeb\x01\x00"
_HEADER: Final = 24
_X86_MAGIC: Final = b"HdrS"
_ZBOOT_MAGIC: Final = b"zimg"


def kernel(vmlinuz: bytes) -> bytes:
    """Return the decompressed kernel. Raises ValueError for an unknown compression."""
    if vmlinuz[0x202:0x206] == _X86_MAGIC:
        # Documentation/arch/x86/boot.rst: setup_sects, payload_offset and payload_length
        start = (vmlinuz[0x1F1] + 1) * 512 + struct.unpack_from("<I", vmlinuz, 0x248)[0]
        length = struct.unpack_from("<I", vmlinuz, 0x24C)[0]
        return decompressed(vmlinuz[start : start + length])
    if vmlinuz[4:8] == _ZBOOT_MAGIC:
        # drivers/firmware/efi/libstub/zboot-header.S
        start, length = struct.unpack_from("<II", vmlinuz, 8)
        return decompressed(vmlinuz[start : start + length])
    # arm64's Image is compressed as a whole, or not at all.
    return vmlinuz if vmlinuz[0x38:0x3C] == b"ARM\x64" else decompressed(vmlinuz)


def decompressed(data: bytes) -> bytes:
    """Return decompressed data; what follows the compressed data is ignored. Raises ValueError."""
    if data.startswith(b"\x1f\x8b"):
        return zlib.decompressobj(wbits=31).decompress(data)
    if data.startswith(b"\xfd7zXZ\0"):
        return lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(data)
    if data.startswith(b"\x5d\0\0"):
        return lzma.LZMADecompressor(lzma.FORMAT_ALONE).decompress(data)
    if data.startswith(b"BZh"):
        return bz2.BZ2Decompressor().decompress(data)
    for magic, tool in ((b"\x28\xb5\x2f\xfd", "zstd"), (b"\x02\x21\x4c\x18", "lz4")):
        if data.startswith(magic):
            # Both complain about the length that x86 appends, after they have written everything.
            return subprocess.run([tool, "-dc"], input=data, capture_output=True, check=False).stdout
    raise ValueError(f"a kernel that begins with {data[:4].hex()} isn't compressed in a known way")


def btf(image: bytes) -> bytes:
    """Return the BTF in a decompressed kernel, an ELF file or arm64's Image. Raises ValueError if there is none."""
    best, at = b"", image.find(_BTF)
    while at >= 0:
        if at + _HEADER <= len(image):
            header, types, types_len, strings, strings_len = struct.unpack_from("<IIIII", image, at + 4)
            end = at + header + strings + strings_len
            # The strings follow the types, and both begin and end with a zero.
            sound = header >= _HEADER and types == 0 and strings == types_len and strings_len > 0 and end <= len(image)
            if sound and image[at + header + strings] == 0 == image[end - 1] and end - at > len(best):
                best = image[at:end]
        at = image.find(_BTF, at + 1)
    if not best:
        raise ValueError("the kernel has no BTF (CONFIG_DEBUG_INFO_BTF)")
    return best
