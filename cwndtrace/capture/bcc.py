# SPDX-License-Identifier: Apache-2.0
"""Compiling the BPF programs: the only file that imports bcc."""

from __future__ import annotations

import ctypes
import importlib.util
import multiprocessing
import os
import platform
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np

from cwndtrace.capture import program_cache
from cwndtrace.capture.privsep import ignore_signals, start_with_signals_blocked
from cwndtrace.capture.program import Program, map_uses
from cwndtrace.errors import BccError, CwndtraceError, KernelLacks
from cwndtrace.kernel import btf, offsets
from cwndtrace.records.layout import bpf_dir

_DISTRIBUTION_PACKAGES: Final = (
    "/usr/lib/python3/dist-packages",
    "/usr/lib/python3*/site-packages",
    "/usr/lib64/python3*/site-packages",
)
_INSTALL: Final = (
    "install the distribution's package: apt install python3-bpfcc (Debian, Ubuntu), dnf install python3-bcc"
)
_RECORD_MAPS: Final = (b"counters", b"followed", b"slabs")
"""Maps whose values user space takes apart."""
_INCLUDE: Final = re.compile(r'#include "([\w.]+)"')
# What a call leaves on the stack between a function's entry and its return (bpf/cwnd_reset_kprobe.bpf.c).
_FRAME_SHIFT: Final = {"x86_64": 8}


@cache
def _place() -> Path:
    """The ``__init__.py`` of the distribution's bcc, see ``module``."""
    stranger = ""
    spec = importlib.util.find_spec("bcc")
    places = [spec.origin] if spec and spec.origin else []
    for pattern in _DISTRIBUTION_PACKAGES:
        places += [str(p) for p in sorted(Path("/").glob(pattern.lstrip("/") + "/bcc/__init__.py"))]
    for place in places:
        if not Path(place).with_name("libbcc.py").exists():
            stranger = place
            continue
        return Path(place)
    if stranger:
        raise BccError(f"the bcc in {Path(stranger).parent} is PyPI's unrelated package of that name", _INSTALL)
    raise BccError("the Python package bcc isn't installed", _INSTALL)


@cache
def module() -> ModuleType:
    """The distribution's bcc package, from wherever it is installed.

    bcc is pure Python over libbcc.so, so any Python can import it by path. Raises BccError where there is
    none, where libbcc is missing, or where the only ``bcc`` is PyPI's package of that name.
    """
    return _import_from(_place())


def _import_from(init: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("bcc", init, submodule_search_locations=[str(init.parent)])
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules["bcc"] = loaded
    try:
        spec.loader.exec_module(loaded)
    except (ImportError, OSError, AttributeError) as e:
        del sys.modules["bcc"]
        raise BccError(f"bcc in {init.parent} can't be loaded: {e}", _INSTALL) from e
    return loaded


def version() -> str:
    """bcc's version, as its package names it."""
    return str(getattr(module(), "__version__", "unknown"))


def _why(said: list[str], error: Exception) -> str:
    """One line of why loading failed: bcc's own, else the most telling one of what it printed."""
    lines = [
        line for line in "\n".join(said).splitlines() if re.search(r"error|denied|not permitted|invalid", line, re.I)
    ]
    text = str(error)
    if "super-user" in text and os.geteuid() == 0:
        text = "refused by this system's policy"
    return f"{text} ({lines[0].strip()})" if lines and lines[0].strip() not in text else text


def expanded(source: Path) -> str:
    """The text of ``source`` with each of this project's headers in place of its first ``#include "…"``.

    bcc rewrites accesses to maps in a program's main file, and leaves those in headers as they are
    (BFrontendAction in bcc's src/cc/frontends/clang/b_frontend_action.cc).
    """
    included: set[Path] = set()

    def expand(file: Path) -> str:
        included.add(file)
        lines = [f'#line 1 "{file.name}"']
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            header = _INCLUDE.fullmatch(line)
            if header is None:
                lines.append(line)
                continue
            path = bpf_dir() / header[1]
            if path not in included:
                lines.append(expand(path))
            lines.append(f'#line {number + 1} "{file.name}"')
        return "\n".join(lines)

    return expand(source)


def build(source: Path, kernel: btf.Btf, hz: int, defines: dict[str, int]) -> Program:
    """A BPF source as a program for this kernel; compiled only where no start before has done it."""
    folder, machine = bpf_dir(), platform.machine()
    text = expanded(source)
    found = offsets.defines(kernel, offsets.active(text, defines)) | defines | {"CWT_HZ": hz}
    flags = [f"-D{name}={value}" for name, value in found.items()]
    flags += [f"-DCWT_ARCH_{machine.upper()}", f"-DFRAME_SHIFT={_FRAME_SHIFT.get(machine, 0)}"]
    # clang asks the kernel which instructions it knows, so that the kernel's name is a part of the key too.
    told = (text, *flags, str(os.uname()), str(_RECORD_MAPS))
    key = program_cache.key(*(part.encode() for part in told), _headers(), _compiler())
    made = program_cache.load(key)
    if made is None:
        made = _compile_apart(text, [*flags, f"-I{folder}"], source.name)
        program_cache.keep(key, made)
    return Program(made)


@cache
def _headers() -> bytes:
    """What the sources may include, by name and content."""
    files = sorted(bpf_dir().rglob("*.h"))
    return b"".join(str(file.relative_to(bpf_dir())).encode() + b"\0" + file.read_bytes() for file in files)


@cache
def _compiler() -> bytes:
    """What tells this bcc from any other, without loading it: that takes 60 MB.

    The Python part and the library are two packages of one version in each distribution.
    """
    files = sorted(_place().parent.glob("*.py"))
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    told = _place().with_name("version.py")
    return repr((str(_place()), stats, told.read_text() if told.exists() else "")).encode()


def _library() -> Any:
    """libbcc, as bcc's own package declares it."""
    return module().libbcc.lib


def _compile_apart(text: str, flags: list[str], name: str) -> program_cache.Image:
    """``_compile`` in a process of its own, or a trace would keep the compiler's 100 MB for as long as it lasts."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)
    process = fork.Process(target=_tell, args=(theirs, text, flags, name), name="compiler", daemon=True)
    start_with_signals_blocked(process)
    theirs.close()
    try:
        found = ours.recv()
    except EOFError:
        raise BccError(f"the compiler of {name} died", "see what dmesg says, and start once more") from None
    finally:
        ours.close()
        process.join()
    if isinstance(found, program_cache.Image):
        return found
    kind, cause, remedy = found
    raise kind(cause, remedy)


def _tell(to: Connection, text: str, flags: list[str], name: str) -> None:
    ignore_signals()
    try:
        to.send(_compile(text, flags, name))
    except CwndtraceError as e:
        to.send((type(e), e.cause, e.remedy))


@contextmanager
def _quiet() -> Iterator[list[str]]:
    """Collect what libbcc, clang and libbpf write to file descriptor 2 into the list that is yielded."""
    said: list[str] = []
    sys.stderr.flush()
    saved = os.dup(2)
    # In memory: a file would lie where TMPDIR says, which may be somebody else's folder.
    with os.fdopen(os.memfd_create("cwndtrace"), "w+b") as file:
        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            file.seek(0)
            said.append(file.read().decode("utf-8", "replace").strip())


def _compile(text: str, flags: list[str], name: str) -> program_cache.Image:
    """The programs and maps of ``text``; raises BccError where it doesn't compile."""
    # bcc looks for kernel headers here; the programs need none, only the few names in this tree.
    os.environ["BCC_KERNEL_SOURCE"] = str(bpf_dir() / "compat")

    class Compiler(module().BPF):  # type: ignore[misc]
        def _trace_autoload(self) -> None:
            """Not here: whoever wants a program attached says so."""

    said: list[str] = []
    try:
        with _quiet() as said:
            made = Compiler(text=text.encode(), cflags=flags)
    except Exception as e:  # bcc raises nothing finer
        if "compile" in str(e):
            raise BccError(f"bcc {version()} can't compile {name}: {_why(said, e)}", "report this text") from e
        raise KernelLacks(_why(said, e)) from e
    try:
        return _taken(made)
    finally:
        made.cleanup()


def _fdinfo(fd: int, name: str) -> int:
    """A number that the kernel tells of one of its objects; 0 where this one doesn't."""
    match = re.search(rf"^{name}:\s*(\w+)", Path(f"/proc/self/fdinfo/{fd}").read_text(), re.MULTILINE)
    return int(match[1], 0) if match else 0


def _fields(table: Any) -> tuple[tuple[str, str], ...]:
    """The members of the struct that a map's values are, as numpy names their types."""
    # bcc turns the Leaf of a per-CPU map into an array, one for each CPU, and keeps the struct itself as sLeaf.
    leaf = np.dtype(getattr(table, "sLeaf", table.Leaf))
    return tuple((name, leaf[name].str) for name in leaf.names or ())


def _taken(made: Any) -> program_cache.Image:
    """What bcc made, with the descriptors of its own maps replaced by their places."""
    lib = _library()
    lib.bpf_table_name.restype, lib.bpf_table_name.argtypes = ctypes.c_char_p, [ctypes.c_void_p, ctypes.c_size_t]
    lib.bpf_num_tables.restype, lib.bpf_num_tables.argtypes = ctypes.c_size_t, [ctypes.c_void_p]
    maps: list[program_cache.Map] = []
    places: dict[int, int] = {}
    for number in range(lib.bpf_num_tables(made.module)):
        raw = lib.bpf_table_name(made.module, number)
        fd = lib.bpf_table_fd(made.module, raw)
        kind, flags = _fdinfo(fd, "map_type"), _fdinfo(fd, "map_flags")
        key_size, value_size, entries = (_fdinfo(fd, name) for name in ("key_size", "value_size", "max_entries"))
        fields = _fields(made[raw]) if raw in _RECORD_MAPS else ()
        places[fd] = len(maps)
        maps.append(program_cache.Map(raw.decode(), kind, key_size, value_size, entries, flags, fields))
    programs = {}
    for number in range(lib.bpf_num_functions(made.module)):
        name = lib.bpf_function_name(made.module, number)
        code, uses = map_uses(made.dump_func(name))
        code["imm"][uses] = [places[fd] for fd in code["imm"][uses].tolist()]
        programs[name.decode()] = code.tobytes()
    return program_cache.Image(programs, tuple(maps))
