# SPDX-License-Identifier: Apache-2.0
"""The image of contrib/docker, run by podman as docs/containers.md says, sees this machine as its host.

The pod of contrib/kubernetes runs too, as far as podman knows such a file. All containers share one image, and a
connection of another user's process on this machine, in a network namespace and a cgroup of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

import cwndtrace
from cwndtrace.errors import NotFound
from cwndtrace.kernel import cgroups
from tests.harness import podman as podmen
from tests.harness import tcp
from tests.harness.chroot import CHECKOUT
from tests.harness.podman import Podman
from tests.harness.users import UID
from tests.harness.written import written

pytestmark = [pytest.mark.chroot, pytest.mark.timeout(1800)]

IMAGE, BASE, SUITE = "localhost/cwndtrace", "docker.io/library/debian:trixie-slim", "trixie"
CAPTURES, CACHE = "/var/lib/cwndtrace", "/var/cache/cwndtrace"
HOST_MOUNT: Final = ("-v", "/:/host:ro,rslave")
"""What docs/containers.md has for hosts that forbid /proc/1/root."""
TRACE_S: Final = 6


def documented() -> list[str]:
    """Return the options of the command in docs/containers.md that traces, without those for a terminal."""
    page = (CHECKOUT / "docs/containers.md").read_text(encoding="utf-8")
    (command,) = (text for text in re.findall(r"```sh\n(.*?)```", page, re.DOTALL) if "cwndtrace run" in text)
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:4] == ["docker", "run", "--rm", "-it"]
    return words[4 : words.index("cwndtrace")]


def manifest() -> dict[str, Any]:
    """Return the DaemonSet of contrib/kubernetes."""
    text = (CHECKOUT / "contrib/kubernetes/daemonset.yaml").read_text(encoding="utf-8")
    (found,) = (document for document in yaml.safe_load_all(text) if document["kind"] == "DaemonSet")
    assert isinstance(found, dict)
    return found


@pytest.fixture(scope="module")
def podman() -> Iterator[Podman]:
    """podman with the image."""
    podmen.need_podman()
    with podmen.storage() as made:
        made.build(IMAGE, CHECKOUT / "contrib/docker/Containerfile", BASE, SUITE)
        yield made


@dataclass
class Containers:
    """Runs containers with the documented options; ``folder`` has their captures, ``cache`` their probes."""

    podman: Podman
    folder: Path
    cache: Path

    def options(self, *without: str) -> list[str]:
        """Return the documented options, with folders of the test, but for those that are ``without``."""
        options = [option for option in documented() if option not in without]
        places = {f"{CAPTURES}:{CAPTURES}": f"{self.folder}:{CAPTURES}", f"{CACHE}:{CACHE}": f"{self.cache}:{CACHE}"}
        assert places.keys() <= set(options)
        hidden = () if _reachable() or "--pid=host" in without else HOST_MOUNT
        return [*(places.get(option, option) for option in options), *hidden]

    def call(self, options: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run cwndtrace in a container to its end."""
        return self.podman.call("run", "--rm", "--pull=never", *options, IMAGE, *arguments)

    def facts(self, options: list[str]) -> list[dict[str, str]]:
        """Return what doctor says about the container."""
        done = self.call(options, "doctor", "--json")
        assert done.returncode == 0, (done.stdout, done.stderr)
        found = json.loads(done.stdout)
        assert found["probes"]["idle"] is not None
        return [fact for fact in found["facts"] if fact["name"] == "container"]

    def trace(self, options: list[str], filters: list[str], send: Callable[[], None]) -> ContainerTrace:
        """Trace for TRACE_S, and call ``send`` as soon as everything is attached."""
        shutil.rmtree(self.folder / "a.cwnd", ignore_errors=True)
        arguments = ["run", *filters, "--json", "--duration", f"{TRACE_S}s", "--output", "a.cwnd"]
        command = self.podman.command("run", "--rm", "--pull=never", *options, IMAGE, *arguments)
        with (
            (self.folder / "stderr").open("w+") as stderr,
            subprocess.Popen(
                command, env=self.podman.environment, stdout=subprocess.PIPE, stderr=stderr, text=True
            ) as process,
        ):
            assert process.stdout is not None
            first = process.stdout.readline()
            if first:
                send()
            rest, _ = process.communicate(timeout=120)
            stderr.seek(0)
            return ContainerTrace(
                process.returncode, [json.loads(line) for line in (first + rest).splitlines()], stderr.read()
            )


@dataclass
class ContainerTrace:
    """What a trace printed, and its exit code."""

    code: int
    rows: list[dict[str, Any]]
    stderr: str

    def resets_of(self, pid: int) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["event"] == "cwnd_reset" and row["tgid"] == pid]


def _reachable() -> bool:
    try:
        os.close(os.open("/proc/1/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
    except PermissionError:
        return False
    return True


@pytest.fixture(scope="module")
def containers(podman: Podman, tmp_path_factory: pytest.TempPathFactory) -> Containers:
    """Containers with folders of this module."""
    return Containers(podman, tmp_path_factory.mktemp("captures"), tmp_path_factory.mktemp("cache"))


@dataclass
class Sender:
    """Another user's process, with a window that its next send resets."""

    process: tcp.ForkedSender
    space: tcp.Space
    cgroup: Path


@pytest.fixture
def sender(space: tcp.Space, connect: tcp.Connect) -> Iterator[Sender]:
    """A sender in its own network namespace, and in the cgroup of what docker calls the container "web"."""
    container = os.urandom(32).hex()
    try:
        folder = cgroups.mount_point() / "docker" / container
    except NotFound as e:
        pytest.skip(f"{e.cause}; {e.remedy}")
    file = f"/var/lib/docker/containers/{container}/config.v2.json"
    with written({file: {"Name": "/web", "Config": {"Image": "image"}}}), _in_cgroup(space, connect, folder) as made:
        yield made


@contextlib.contextmanager
def _in_cgroup(space: tcp.Space, connect: tcp.Connect, folder: Path) -> Iterator[Sender]:
    above = [place for place in (folder.parent,) if not place.exists()]
    folder.mkdir(parents=True)
    try:
        # A connection belongs to the cgroup in which its socket was made.
        holder = tcp.Holder(space, folder)
        try:
            connection = connect(space, by=holder)
            connection.grow()
            process = tcp.ForkedSender(connection.sock, UID)
        finally:
            holder.close()
        connection.sock.close()  # the sender alone holds it now
        with process:
            (folder / "cgroup.procs").write_text(str(process.pid))
            yield Sender(process, space, folder)
    finally:
        for place in (folder, *above):
            tcp.until(lambda place=place: _removed(place), 20, f"{place} to be empty")  # type: ignore[misc]


def _removed(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        folder.rmdir()
    return not folder.exists()


def holders(containers: Containers, inode: int) -> set[tuple[int, str]]:
    """Return pid and name of the processes that the snapshots have for connections of a namespace."""
    rows = cwndtrace.load(containers.folder / "a.cwnd").connections
    rows = rows[rows["netns_ino"] == inode]
    return set(zip(rows["pid"], rows["comm"], strict=True))


# ---- as documented ---------------------------------------------------------------------------------


def test_doctor_sees_the_host(containers: Containers) -> None:
    (fact,) = containers.facts(containers.options())
    assert fact["state"] == "ok", fact
    assert "it sees the host's processes and cgroups" in fact["value"]


def test_records_have_the_hosts_pids_names_and_cgroups(containers: Containers, sender: Sender) -> None:
    cgroup = str(sender.cgroup.relative_to(cgroups.mount_point()))
    traced = containers.trace(
        containers.options(), ["--netns", sender.space.name, "--cgroup", cgroup], sender.process.send
    )
    assert traced.code == 0, traced.stderr
    assert f"in network namespace {sender.space.name} (inode {sender.space.inode})" in traced.stderr
    assert "warning" not in traced.stderr
    (reset,) = traced.resets_of(sender.process.pid)
    assert (reset["comm"], reset["reason"]) == ("sh", "idle")
    assert reset["cgroup_id"] == sender.cgroup.stat().st_ino
    assert (sender.process.pid, "sh") in holders(containers, sender.space.inode)
    trace = cwndtrace.load(containers.folder / "a.cwnd")
    assert set(trace.resets["workload"]) == {"web"}
    assert trace.workloads.loc[0, "path"] == f"/{cgroup}"
    assert set(trace.resets["cmdline"].str.startswith("/bin/sh -c while read")) == {True}


def test_a_container_of_the_host_is_selected_by_its_name(containers: Containers, sender: Sender) -> None:
    traced = containers.trace(containers.options(), ["--container", "web"], sender.process.send)
    assert traced.code == 0, traced.stderr
    assert len(traced.resets_of(sender.process.pid)) == 1


def test_the_cgroup_is_found_from_a_cgroup_namespace_too(containers: Containers, sender: Sender) -> None:
    cgroup = str(sender.cgroup.relative_to(cgroups.mount_point()))
    options = [*containers.options("--cgroupns=host"), "--cgroupns=private"]
    traced = containers.trace(options, ["--cgroup", cgroup], sender.process.send)
    assert traced.code == 0, traced.stderr
    assert len(traced.resets_of(sender.process.pid)) == 1


# ---- without one of the options --------------------------------------------------------------------


def test_without_sys_admin_nothing_is_traced(containers: Containers) -> None:
    done = containers.call(containers.options("--cap-add=SYS_ADMIN"), "run", "--duration", "1s")
    assert done.returncode != 0
    assert "cwndtrace: " in done.stderr
    assert "SYS_ADMIN" in done.stderr or "seccomp" in done.stderr


@pytest.mark.parametrize("name", ["SYS_PTRACE", "DAC_READ_SEARCH"])
def test_without_another_capability_processes_have_no_names(containers: Containers, sender: Sender, name: str) -> None:
    traced = containers.trace(
        containers.options(f"--cap-add={name}"), ["--netns", str(sender.space.inode)], sender.process.send
    )
    assert traced.code == 0, traced.stderr
    assert len(traced.resets_of(sender.process.pid)) == 1
    assert f"lacks CAP_{name}, with which" in traced.stderr
    assert sender.process.pid not in {pid for pid, _ in holders(containers, sender.space.inode)}


def test_without_the_hosts_processes_it_says_so(containers: Containers) -> None:
    options = containers.options("--pid=host")
    (fact, *_) = containers.facts(options)
    assert "sees no processes but its own" in fact["value"]
    assert "--pid=host" in fact["remedy"]
    done = containers.call(options, "run", "--pid", "1", "--duration", "1s")
    assert done.returncode != 0
    assert "process 1 here has another pid on the host" in done.stderr


def test_without_the_hosts_network_it_says_so(containers: Containers) -> None:
    options = [*containers.options("--network=host"), "--network=none"]
    _, network = containers.facts(options)
    assert "mean the container's network namespace" in network["value"]
    done = containers.call(options, "run", "--iface", "nothing0", "--duration", "1s")
    assert "no interface nothing0" in done.stderr
    assert "start this container with --network=host" in done.stderr


# ---- Kubernetes ------------------------------------------------------------------------------------


def test_the_pod_runs(podman: Podman, containers: Containers, tmp_path: Path) -> None:
    """podman reads the pod itself, but for hostPID, the image's name and the folders."""
    template = manifest()["spec"]["template"]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {**template["metadata"], "name": "test"}}
    (container,) = template["spec"]["containers"]
    container |= {"image": IMAGE, "imagePullPolicy": "Never"}
    container["args"][container["args"].index("1h")] = "3s"
    for volume in template["spec"]["volumes"]:
        volume["hostPath"]["path"] = {CAPTURES: str(tmp_path), CACHE: str(containers.cache)}[volume["hostPath"]["path"]]
    file = tmp_path / "pod.yaml"
    file.write_text(yaml.safe_dump(pod | {"spec": template["spec"] | {"restartPolicy": "Never"}}))
    podman.make_pause(BASE)
    podman.good("play", "kube", "--network", "host", str(file))
    try:
        assert podman.good("wait", "test-cwndtrace").strip() == "0"
        about = podman.inspect("test-cwndtrace")
        assert sorted(about["EffectiveCaps"]) == sorted(f"CAP_{name}" for name in _added(manifest()))
        assert about["HostConfig"]["ReadonlyRootfs"] is True
        first = json.loads(podman.good("logs", "test-cwndtrace").splitlines()[0])
        assert first["event"] == "started"
        assert cwndtrace.load(tmp_path / first["capture"]).status == "complete"
    finally:
        podman.good("play", "kube", "--down", str(file))


def _added(found: dict[str, Any]) -> list[str]:
    (container,) = found["spec"]["template"]["spec"]["containers"]
    added = container["securityContext"]["capabilities"]["add"]
    assert isinstance(added, list)
    return added
