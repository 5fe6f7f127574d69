# SPDX-License-Identifier: Apache-2.0
"""What the live tests share: the rungs, tracers, network namespaces and connections; other distributions' roots."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from itertools import count

import pytest

from cwndtrace.capture.live import Kernel
from cwndtrace.errors import NoProbe
from cwndtrace.kernel import btf, facts, ladder

pytest.register_assert_rewrite("tests.harness.tcp", "tests.harness.tracing")

from tests import chroot  # noqa: E402
from tests.harness.tracing import Tracer  # noqa: E402
from tests.live import tcp  # noqa: E402


@cache
def left_out() -> dict[str, str]:
    """The rungs that this machine can't have, and why: its kernel lacks something, or its policy refuses them.

    One that fails to load for another reason isn't left out, so that its tests fail.
    """
    here = facts.ladder_facts(btf.Btf.running())
    reasons = {rung.name: ladder.lacks(here, rung, "idle") or _refused(rung) for rung in ladder.RUNGS}
    return {name: why for name, why in reasons.items() if why}


def _refused(rung: ladder.Rung) -> str | None:
    if all(a.kind in ("raw_tracepoint", "tp_btf") for a in rung.attachments["idle"]):
        return None
    try:
        Kernel(probe=rung.name, block=False, reasons=("idle",)).close()
    except NoProbe as e:
        return e.tried[rung.name] if "policy" in str(e) else None
    return None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run what uses a tracer on each rung that there is; CWNDTRACE_PROBES="fentry kprobe" says on which."""
    if "tracer" in metafunc.fixturenames:
        names = [rung.name for rung in ladder.RUNGS]
        if os.geteuid() == 0:
            names = os.environ.get("CWNDTRACE_PROBES", "").split() or [n for n in names if n not in left_out()]
        metafunc.parametrize("tracer", names, indirect=True, scope="session")


@pytest.fixture(scope="session")
def tracer(request: pytest.FixtureRequest) -> Iterator[Tracer]:
    """A tracer of everything, on one rung of the ladder."""
    with Tracer(request.param) as made:
        yield made


NUMBERS = count()
"""Of namespaces: a name isn't used twice in a run."""


@pytest.fixture(scope="session")
def make_space() -> Iterator[Callable[[], tcp.Space]]:
    """Makes network namespaces, and deletes them in the end; those too that a killed run has left."""
    made: list[tcp.Space] = []
    tcp.delete_left_behind()

    def make() -> tcp.Space:
        made.append(tcp.Space(f"{tcp.PREFIX}{os.getpid()}-{next(NUMBERS)}"))
        return made[-1]

    try:
        yield make
    finally:
        for space in made:
            space.close()


@pytest.fixture(scope="session")
def space(make_space: Callable[[], tcp.Space]) -> tcp.Space:
    """One for the tests to share."""
    return make_space()


@pytest.fixture(scope="session")
def drain() -> Iterator[tcp.Drain]:
    """Reads what the connections send."""
    made = tcp.Drain()
    try:
        yield made
    finally:
        made.close()


Connect = Callable[..., tcp.Connection]


@pytest.fixture
def connect(space: tcp.Space, drain: tcp.Drain) -> Iterator[Connect]:
    """Makes connections as ``tcp.connect`` does, in the shared namespace unless told; closes them in the end."""
    made: list[tcp.Connection] = []

    def make(where: tcp.Here | None = None, **options: object) -> tcp.Connection:
        made.append(tcp.connect(where or space, drain, **options))  # type: ignore[arg-type]
        return made[-1]

    try:
        yield make
    finally:
        for connection in made:
            connection.close()


@pytest.fixture(scope="session")
def counted_space(make_space: Callable[[], tcp.Space]) -> tcp.Space:
    """The namespace that ``counter`` watches."""
    return make_space()


@pytest.fixture(scope="session")
def counter(tracer: Tracer, counted_space: tcp.Space) -> Iterator[Tracer]:
    """A second tracer on the same rung that sees one namespace only, so that its counters are known too."""
    with Tracer(tracer.probe, netns=counted_space.name) as made:
        yield made


# ---- other distributions' roots ----


@pytest.fixture(scope="session")
def root_of() -> Iterator[Callable[[str], chroot.Root]]:
    """Gives the root of a suite that all modules share, since the set-up in it takes longest; the first call makes it.

    What a test needs in it, a fixture of its own makes, whatever other tests have left there.
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
    """The same, once root has typed ``make install``: where that is done already it changes nothing."""
    root.make("install")
    return root
