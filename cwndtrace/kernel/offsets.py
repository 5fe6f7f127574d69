# SPDX-License-Identifier: Apache-2.0
"""Turns the members that a BPF source names into the -D integers that it is compiled with (see bpf/kernel.h)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Final

from cwndtrace.errors import KernelLacks
from cwndtrace.format import plural
from cwndtrace.kernel.btf import Btf, Member

_MEMBER: Final = re.compile(r"\b(READ|READ_OPT|READ_NUMBER|READ_BITS|LOAD|LOAD_OPT|LOAD_BYTE|LOAD_BITS|AT)\(")
_OFFSET: Final = re.compile(r"\bOFF_([a-z]\w*?)__(\w+)")
_ENUMERATOR: Final = re.compile(r"\bENUMERATOR\((\w+), (\d+)\)")
_ARGUMENT: Final = re.compile(r"\bARGUMENT\((\w+), (\w+)\)")
_WIDTHS: Final = {"u8": 1, "u16": 2, "u32": 4, "s32": 4, "u64": 8}


def active(text: str, defined: Iterable[str]) -> str:
    """Return ``text`` without the parts that ``#ifdef NAME`` and ``#if defined(NAME) || …`` exclude.

    Header guards (``#ifndef``) count as true. Comments are removed, so that they never name a member.
    """
    names = set(defined)
    text = re.sub(r"/\*.*?\*/|//[^\n]*", " ", text, flags=re.DOTALL)
    stack: list[bool] = []
    kept: list[str] = []
    for line in text.splitlines():
        if line.startswith("#if"):
            tested = re.findall(r"defined\((\w+)\)", line) or line.split()[1:2]
            stack.append(line.startswith("#ifndef") or any(name in names for name in tested))
        elif line.startswith("#endif"):
            stack.pop()
        elif all(stack) and not line.startswith("#define"):
            kept.append(line)
    return "\n".join(kept)


def _arguments(text: str, at: int) -> list[str]:
    """Return the top-level arguments of the call whose opening bracket is right before ``at``."""
    depth, parts, part = 0, [], ""
    for c in text[at:]:
        if c == ")" and depth == 0:
            break
        depth += (c == "(") - (c == ")")
        if c == "," and depth == 0:
            parts.append(part.strip())
            part = ""
        else:
            part += c
    return [*parts, part.strip()]


def members(text: str) -> Iterator[tuple[str, str, str, str]]:
    """Yield (macro, C type or "", struct, member as spelt) for each member that the active ``text`` reads."""
    for match in _MEMBER.finditer(text):
        macro, arguments = match[1], _arguments(text, match.end())
        ctype = arguments[0] if macro in ("READ", "READ_OPT", "LOAD", "LOAD_OPT") else ""
        if re.fullmatch(r"\w+", arguments[-1]) and re.fullmatch(r"\w+", arguments[-2]):
            yield macro, ctype, arguments[-2], arguments[-1]
    for match in _OFFSET.finditer(text):
        yield "AT", "", match[1], match[2]


def _path(spelt: str) -> str:
    """Return the path of a member as spelt: a.b.c for "a__b__c". Leading underscores belong to the name."""
    body = spelt.lstrip("_")
    return spelt[: len(spelt) - len(body)] + body.replace("__", ".")


def _bits(member: Member) -> int:
    """Return the width of a member in bits: a kernel may have a whole byte for what another has a bitfield for."""
    return member.bits or 8 * member.size


def defines(btf: Btf, text: str) -> dict[str, int]:
    """Return the macros for the active ``text``: OFF_, SIZE_, SHIFT_, BITS_, ENUM_ and ARG_ names to integers.

    Raises KernelLacks, naming each member, where this kernel lacks one that isn't optional or stores it
    with another width than the source reads, and each tracepoint that has no argument of the type that the source uses.
    """
    macros: dict[str, int] = {}
    problems: list[str] = []
    for macro, ctype, struct, spelt in members(text):
        name = f"{struct}__{spelt}"
        member = btf.member(struct, spelt) or btf.member(struct, _path(spelt))
        if macro in ("READ_OPT", "LOAD_OPT"):
            macros[f"OFF_{name}"] = member.offset if member else 0
            macros[f"SIZE_{name}"] = member.size if member else 0
        elif member is None:
            problems.append(f"{struct}.{_path(spelt)} is missing")
        elif ctype and member.size != _WIDTHS[ctype]:
            problems.append(f"{struct}.{_path(spelt)} has {plural(member.size, 'byte')}, not {_WIDTHS[ctype]}")
        elif macro.endswith("_BITS") and not 0 < member.shift + _bits(member) <= 8:
            problems.append(f"{struct}.{_path(spelt)} isn't a bitfield within one byte, or a byte")
        else:
            macros |= {f"OFF_{name}": member.offset, f"SIZE_{name}": member.size}
            macros |= {f"SHIFT_{name}": member.shift, f"BITS_{name}": _bits(member)} if macro.endswith("_BITS") else {}
    for match in _ENUMERATOR.finditer(text):
        enum, _, enumerator = match[1].partition("__")
        value = btf.enumerator(enum, enumerator)
        macros[f"ENUM_{match[1]}"] = int(match[2]) if value is None else value
    for tracepoint, struct in _ARGUMENT.findall(text):
        number = btf.argument(tracepoint, struct)
        if number is None:
            problems.append(f"tracepoint {tracepoint} has no struct {struct}")
        else:
            macros[f"ARG_{tracepoint}__{struct}"] = number
    if problems:
        raise KernelLacks(
            "this kernel's structures differ from those that cwndtrace reads: " + ", ".join(sorted(set(problems))),
            "report the kernel's version, so that bpf/ can be changed to read its members",
        )
    return macros
