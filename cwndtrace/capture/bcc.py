# SPDX-License-Identifier: Apache-2.0
"""Compiles the BPF programs. No other module imports bcc."""

from __future__ import annotations

import ctypes
import importlib.util
import multiprocessing
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np

from cwndtrace import _libc
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
_RECORD_MAPS: Final = (b"counters", b"slabs", b"slots")
"""Maps whose values are read field by field: by capture.live, and ``slots`` by the tests."""
_PATIENCE_S: Final = 1.0
_INCLUDE: Final = re.compile(r'#include "([\w.]+)"')
# Bytes of the stack that a call's return address takes (bpf/cwnd_reset_kprobe.bpf.c); 0 on machines not listed.
_FRAME_SHIFT: Final = {"x86_64": 8}


@cache
def _place() -> Path:
    """Return the path of ``__init__.py`` of the distribution's bcc. Raises BccError, see ``module``."""
    unrelated = ""
    spec = importlib.util.find_spec("bcc")
    places = [spec.origin] if spec and spec.origin else []
    for pattern in _DISTRIBUTION_PACKAGES:
        places += [str(p) for p in sorted(Path("/").glob(pattern.lstrip("/") + "/bcc/__init__.py"))]
    for place in places:
        if not Path(place).with_name("libbcc.py").exists():
            unrelated = place
            continue
        return Path(place)
    if unrelated:
        raise BccError(f"the bcc in {Path(unrelated).parent} is PyPI's unrelated package of that name", _INSTALL)
    raise BccError("the Python package bcc isn't installed", _INSTALL)


@cache
def module() -> ModuleType:
    """Return the distribution's bcc package, from wherever it is installed.

    bcc is pure Python over libbcc.so, so any Python can import it by path. Raises BccError where bcc isn't installed,
    where libbcc is missing, or where the only ``bcc`` is PyPI's unrelated package of that name.
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
    """Return bcc's version, as its package states it."""
    return str(getattr(module(), "__version__", "unknown"))


def _reason(printed: list[str], error: Exception) -> str:
    """Return bcc's error message, with the first line in brackets that it printed about an error."""
    lines = [
        line for line in "\n".join(printed).splitlines() if re.search(r"error|denied|not permitted|invalid", line, re.I)
    ]
    text = str(error)
    if "super-user" in text and os.geteuid() == 0:
        text = "refused by this system's policy"
    return f"{text} ({lines[0].strip()})" if lines and lines[0].strip() not in text else text


def expanded(source: Path) -> str:
    """Return the text of ``source`` with each of this project's headers in place of its first ``#include "…"``.

    bcc rewrites accesses to maps in a program's main file only, and not in its headers
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


def silent(_: str) -> None:
    """Announce nothing."""


def build(
    source: Path, kernel: btf.Btf, hz: int, defines: dict[str, int], announce: Callable[[str], None] = silent
) -> Program:
    """Return a BPF source as a program for this kernel, compiled only if the cache doesn't hold it.

    ``announce`` is told what is being done if compiling takes more than a second.
    """
    folder, machine = bpf_dir(), platform.machine()
    text = expanded(source)
    macros = offsets.defines(kernel, offsets.active(text, defines)) | defines | {"CWT_HZ": hz}
    flags = [f"-D{name}={value}" for name, value in macros.items()]
    flags += [f"-DCWT_ARCH_{machine.upper()}", f"-DFRAME_SHIFT={_FRAME_SHIFT.get(machine, 0)}"]
    # clang asks the kernel which instructions it supports, so the kernel's name is a part of the key.
    inputs = (text, *flags, str(os.uname()), str(_RECORD_MAPS))
    key = program_cache.key(*(part.encode() for part in inputs), _headers(), _compiler())
    image = program_cache.load(key)
    if image is None:
        image = _compile_in_child(text, [*flags, f"-I{folder}"], source.name, announce)
        program_cache.keep(key, image)
    return Program(image)


@cache
def _headers() -> bytes:
    """Return the name and content of each header that the sources may include."""
    files = sorted(bpf_dir().rglob("*.h"))
    return b"".join(str(file.relative_to(bpf_dir())).encode() + b"\0" + file.read_bytes() for file in files)


@cache
def _compiler() -> bytes:
    """Return what identifies this installation of bcc, without loading it: that takes 60 MB of memory.

    The Python files stand for the library too: each distribution packages both in the same version.
    """
    files = sorted(_place().parent.glob("*.py"))
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    version_file = _place().with_name("version.py")
    return repr((str(_place()), stats, version_file.read_text() if version_file.exists() else "")).encode()


def _library() -> Any:
    """Return libbcc, with the argument types that bcc's own package declares."""
    return module().libbcc.lib


def _compile_in_child(text: str, flags: list[str], name: str, announce: Callable[[str], None]) -> program_cache.Image:
    """Run ``_compile`` in a child process: the trace would otherwise hold the compiler's 100 MB until its end."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)
    process = fork.Process(
        target=_send_image, args=(ours, theirs, os.getpid(), text, flags, name), name="compiler", daemon=True
    )
    start_with_signals_blocked(process)
    theirs.close()
    try:
        if not ours.poll(_PATIENCE_S):
            announce(f"compiling {name} for this kernel; the next start won't have to")
        answer = ours.recv()
    except EOFError:
        cause = f"the process that compiles {name} ended before it was done"
        raise BccError(cause, "see dmesg for the reason, and run the command again") from None
    finally:
        ours.close()
        process.join()
    if isinstance(answer, program_cache.Image):
        return answer
    error, cause, remedy = answer
    raise error(cause, remedy)


def _send_image(end: Connection, to: Connection, parent: int, text: str, flags: list[str], name: str) -> None:
    ignore_signals()
    # An image is larger than the pipe. With a reader in this process, sending it would block after the parent's end.
    end.close()
    if not _libc.end_with_parent(parent):
        return
    try:
        to.send(_compile(text, flags, name))
    except CwndtraceError as e:
        to.send((type(e), e.cause, e.remedy))


@contextmanager
def _stderr_captured() -> Iterator[list[str]]:
    """Yield a list that receives, at the end, what libbcc, clang and libbpf write to file descriptor 2."""
    printed: list[str] = []
    sys.stderr.flush()
    saved = os.dup(2)
    # The file is in memory, because TMPDIR may be a folder of another user.
    with os.fdopen(os.memfd_create("cwndtrace"), "w+b") as file:
        os.dup2(file.fileno(), 2)
        try:
            yield printed
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            file.seek(0)
            printed.append(file.read().decode("utf-8", "replace").strip())


def _compile(text: str, flags: list[str], name: str) -> program_cache.Image:
    """Return the programs and maps of ``text``. Raises BccError where it doesn't compile, else KernelLacks."""
    # bcc looks for kernel headers here. The programs need only the few names that this folder defines.
    os.environ["BCC_KERNEL_SOURCE"] = str(bpf_dir() / "compat")

    class Compiler(module().BPF):  # type: ignore[misc]
        def _trace_autoload(self) -> None:
            """Do nothing: ``Program.attach`` attaches programs."""

    printed: list[str] = []
    try:
        with _stderr_captured() as printed:
            compiled = Compiler(text=text.encode(), cflags=flags)
    except Exception as e:  # bcc raises no more specific type
        if "compile" in str(e):
            raise BccError(f"bcc {version()} can't compile {name}: {_reason(printed, e)}", "report this text") from e
        raise KernelLacks(_reason(printed, e)) from e
    try:
        return _image(compiled)
    finally:
        compiled.cleanup()


def _fdinfo(fd: int, name: str) -> int:
    """Return a number from the kernel's fdinfo of a descriptor; 0 where this kernel doesn't report it."""
    match = re.search(rf"^{name}:\s*(\w+)", Path(f"/proc/self/fdinfo/{fd}").read_text(), re.MULTILINE)
    return int(match[1], 0) if match else 0


def _fields(table: Any) -> tuple[tuple[str, str], ...]:
    """Return name and numpy type of each member of the struct that a map's values are."""
    # For a per-CPU map, bcc makes Leaf an array with an element for each CPU, and keeps the struct itself as sLeaf.
    leaf = np.dtype(getattr(table, "sLeaf", table.Leaf))
    return tuple((name, leaf[name].str) for name in leaf.names or ())


def _image(compiled: Any) -> program_cache.Image:
    """Return what bcc compiled, with each map's descriptor in the instructions replaced by the map's index."""
    lib = _library()
    lib.bpf_table_name.restype, lib.bpf_table_name.argtypes = ctypes.c_char_p, [ctypes.c_void_p, ctypes.c_size_t]
    lib.bpf_num_tables.restype, lib.bpf_num_tables.argtypes = ctypes.c_size_t, [ctypes.c_void_p]
    maps: list[program_cache.Map] = []
    indices: dict[int, int] = {}
    for number in range(lib.bpf_num_tables(compiled.module)):
        raw = lib.bpf_table_name(compiled.module, number)
        fd = lib.bpf_table_fd(compiled.module, raw)
        map_type, flags = _fdinfo(fd, "map_type"), _fdinfo(fd, "map_flags")
        key_size, value_size, entries = (_fdinfo(fd, name) for name in ("key_size", "value_size", "max_entries"))
        fields = _fields(compiled[raw]) if raw in _RECORD_MAPS else ()
        indices[fd] = len(maps)
        maps.append(program_cache.Map(raw.decode(), map_type, key_size, value_size, entries, flags, fields))
    programs = {}
    for number in range(lib.bpf_num_functions(compiled.module)):
        name = lib.bpf_function_name(compiled.module, number)
        code, uses = map_uses(compiled.dump_func(name))
        code["imm"][uses] = [indices[fd] for fd in code["imm"][uses].tolist()]
        programs[name.decode()] = code.tobytes()
    return program_cache.Image(programs, tuple(maps))
