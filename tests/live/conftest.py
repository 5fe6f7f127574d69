# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the live tests: tracers by probe, network namespaces, connections, and roots of other distributions."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from itertools import count
from pathlib import Path

import pytest

from cwndtrace.kernel import ladder

pytest.register_assert_rewrite("tests.harness")

from tests.harness import chroot, tcp  # noqa: E402
from tests.harness.link import VethLink  # noqa: E402
from tests.harness.tracing import Tracer, left_out  # noqa: E402
from tests.harness.users import GID, UID, home_of  # noqa: E402


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run tests that use ``tracer`` with each probe that this machine has, or with those in CWNDTRACE_PROBES."""
    if "tracer" in metafunc.fixturenames:
        names = [probe.name for probe in ladder.PROBES]
        if os.geteuid() == 0:
            names = os.environ.get("CWNDTRACE_PROBES", "").split() or [n for n in names if n not in left_out()]
        metafunc.parametrize("tracer", names, indirect=True, scope="session")


@pytest.fixture(scope="session")
def tracer(request: pytest.FixtureRequest) -> Iterator[Tracer]:
    """A tracer without filters, with one probe."""
    with Tracer(request.param) as running:
        yield running


NUMBERS = count()
"""The numbers in the names of namespaces, so that no name is used twice in a run."""


@pytest.fixture(scope="session")
def make_space() -> Iterator[Callable[[], tcp.Space]]:
    """A function that makes network namespaces; they are deleted at the end, those of killed runs at the start."""
    spaces: list[tcp.Space] = []
    tcp.delete_left_behind()

    def make() -> tcp.Space:
        spaces.append(tcp.Space(f"{tcp.PREFIX}{os.getpid()}-{next(NUMBERS)}"))
        return spaces[-1]

    try:
        yield make
    finally:
        for space in spaces:
            space.close()


@pytest.fixture(scope="session")
def space(make_space: Callable[[], tcp.Space]) -> tcp.Space:
    """A network namespace that the tests share."""
    return make_space()


@pytest.fixture(scope="session")
def drain() -> Iterator[tcp.Drain]:
    """A thread that reads all data that the connections send."""
    reader = tcp.Drain()
    try:
        yield reader
    finally:
        reader.close()


@pytest.fixture
def connect(space: tcp.Space, drain: tcp.Drain) -> Iterator[tcp.Connect]:
    """A function that makes connections as tcp.connect does, by default in ``space``; they are closed at the end."""
    connections: list[tcp.TcpConnection] = []

    def make(where: tcp.Here | None = None, **options: object) -> tcp.TcpConnection:
        connections.append(tcp.connect(where or space, drain, **options))  # type: ignore[arg-type]
        return connections[-1]

    try:
        yield make
    finally:
        for connection in connections:
            connection.close()


@pytest.fixture(scope="session")
def counted_space(make_space: Callable[[], tcp.Space]) -> tcp.Space:
    """The network namespace that ``counter`` traces."""
    return make_space()


@pytest.fixture(scope="session")
def counter(tracer: Tracer, counted_space: tcp.Space) -> Iterator[Tracer]:
    """A tracer with the same probe that sees one namespace only, so that tests know its counters too."""
    with Tracer(tracer.probe, netns=counted_space.name) as running:
        yield running


@pytest.fixture(scope="module")
def link(make_space: Callable[[], tcp.Space]) -> VethLink:
    """A link that can drop packets."""
    return VethLink(make_space)


@pytest.fixture
def home() -> Iterator[Path]:
    """A folder of the user who calls sudo."""
    with home_of(UID, GID) as folder:
        yield folder


# ---- roots of other distributions ----


@pytest.fixture(scope="session")
def root_of() -> Iterator[Callable[[str], chroot.Root]]:
    """A function that returns the root of a suite, which all modules share because its set-up takes longest.

    The first call makes it. Fixtures of the tests prepare it, whatever state other tests have left it in.
    """
    with ExitStack() as stack:

        @cache
        def make(suite: str) -> chroot.Root:
            chroot.need_tools()
            return stack.enter_context(chroot.cloned(suite))

        yield make


@pytest.fixture(scope="module", params=chroot.SUITES)
def root(request: pytest.FixtureRequest, root_of: Callable[[str], chroot.Root]) -> chroot.Root:
    """The root of each suite."""
    return root_of(request.param)


@pytest.fixture(scope="module")
def installed(root: chroot.Root) -> chroot.Root:
    """The root of each suite after ``make install``, which changes nothing if it was run before."""
    root.make("install")
    return root
