# SPDX-License-Identifier: Apache-2.0
"""Tests that containers, pods and processes are named as their own runtime and /proc name them, and can be selected.

podman and containerd run senders whose windows idle time resets. Where a runtime isn't at hand, its cgroups and files
are made by hand as it leaves them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pandas as pd
import pytest

import cwndtrace
from cwndtrace.kernel import cgroups
from tests.harness import podman
from tests.harness.command import call, running
from tests.harness.podman import Podman
from tests.harness.tcp import until
from tests.harness.written import written

pytestmark = pytest.mark.live

PYTHON: Final = "/usr/bin/python3"
SENDER: Final = Path(__file__).parents[1] / "harness" / "sender.py"
IMAGE: Final = "localhost/empty"
UID: Final = "8f2b7c1e-0d4a-4c55-9a6e-1b2c3d4e5f60"
SLICE: Final = f"kubepods-burstable-pod{UID.replace('-', '_')}.slice"
POD: Final = f"/kubepods.slice/kubepods-burstable.slice/{SLICE}"


@pytest.fixture(scope="module")
def pods() -> Iterator[Podman]:
    """podman with an image that has nothing but the places at which this machine's programs are mounted."""
    if missing := [tool for tool in ("podman", "runc") if shutil.which(tool) is None]:
        pytest.skip(f"needs {' and '.join(missing)}: sudo make develop installs them")
    with podman.storage() as made:
        root = made.folder / "root"
        (root / "usr").mkdir(parents=True)
        for name in ("bin", "lib", "lib64"):
            (root / name).symlink_to(f"usr/{name}")
        with subprocess.Popen(["tar", "-C", str(root), "-c", "."], stdout=subprocess.PIPE) as tar:
            subprocess.run(
                made.command("import", "-", IMAGE), env=made.environment, stdin=tar.stdout, check=True,
                capture_output=True,
            )  # fmt: skip
        yield made


def start(pods: Podman, name: str) -> str:
    """Start a container that sends, and return its id."""
    mounts = ["-v", "/usr:/usr:ro", "-v", f"{SENDER}:/sender.py:ro"]
    return pods.good("run", "-d", "--network", "none", "--name", name, *mounts, IMAGE, PYTHON, "/sender.py").strip()


@contextmanager
def containers(pods: Podman, *names: str) -> Iterator[dict[str, str]]:
    """Start containers that send; yield their ids by name."""
    try:
        yield {name: start(pods, name) for name in names}
    finally:
        for name in names:
            pods.call("rm", "--force", "--time", "0", "--ignore", name)


def traced(output: Path, *arguments: str, meanwhile: Callable[[Seen], None]) -> cwndtrace.Trace:
    """Trace until ``meanwhile``, which may wait for what has been seen, returns."""
    with running("-o", output, "--no-block", *arguments) as run:
        meanwhile(Seen(output))
        code, _, stderr = run.end()
    assert code == 0, stderr
    return cwndtrace.load(output)


@dataclass
class Seen:
    """What a trace has written so far."""

    output: Path

    def resets(self, workload: str, number: int = 2) -> None:
        """Wait until there are so many resets of a workload, and a snapshot has its connections."""

        def there() -> bool:
            trace = cwndtrace.load(self.output)
            names = (frame["workload"] == workload for frame in (trace.resets, trace.connections))
            resets, snapshots = (int(found.sum()) for found in names)
            return resets >= number and snapshots > 0

        until(there, 60, f"{number} resets of {workload}, and a snapshot")


def ids(trace: cwndtrace.Trace) -> pd.Series:
    """Return the container's id of each reset, by the cgroup that the kernel gave."""
    known = trace.workloads.set_index("cgroup_id")["container_id"].to_dict()
    return trace.resets["cgroup_id"].map(known)


def test_each_row_has_its_containers_id_and_name_also_when_it_is_gone(pods: Podman, tmp_path: Path) -> None:
    def meanwhile(seen: Seen) -> None:
        with containers(pods, "alpha", "beta") as made:
            started.update(made)
            for name in made:
                seen.resets(name)

    started: dict[str, str] = {}
    trace = traced(tmp_path / "c.cwnd", meanwhile=meanwhile)
    mine = trace.resets[trace.resets["workload"].isin(started)]
    assert set(mine["workload"]) == set(started)
    assert list(ids(trace)[mine.index]) == [started[name] for name in mine["workload"]]
    rows = trace.connections[trace.connections["workload"].isin(started)]
    assert set(rows["workload"]) == set(started)
    of = trace.workloads.drop_duplicates("container_id").set_index("workload").loc[list(started)]
    assert set(of["image"]) == {f"{IMAGE}:latest"}
    assert set(of["runtime"]) == {"podman"}
    assert (of["last_ns"] > of["first_ns"]).all()


def test_a_process_is_named_beside_its_thread_with_its_command_line(pods: Podman, tmp_path: Path) -> None:
    with containers(pods, "alpha"):
        trace = traced(tmp_path / "c.cwnd", meanwhile=lambda seen: seen.resets("alpha"))
        hidden = traced(tmp_path / "d.cwnd", "--no-cmdline", meanwhile=lambda seen: seen.resets("alpha"))
    mine = trace.resets[trace.resets["workload"] == "alpha"]
    assert set(mine["comm"]) == {"sender"}
    assert set(mine["process"]) == {"python3"}
    assert set(mine["cmdline"]) == {f"{PYTHON} /sender.py"}
    served = trace.connections[(trace.connections["workload"] == "alpha") & (trace.connections["sport"] == 5000)]
    assert set(served["listener"]) == {"python3"}
    assert set(served["listener_pid"]) == set(mine["tgid"])
    outgoing = trace.connections[(trace.connections["workload"] == "alpha") & (trace.connections["dport"] == 5000)]
    assert set(outgoing["listener_pid"]) == {0}
    assert set(hidden.resets["cmdline"]) == {""}
    assert set(hidden.processes["cmdline"]) == {""}


@pytest.mark.parametrize("by", ["name", "id"])
def test_the_filter_lets_exactly_one_container_through(pods: Podman, tmp_path: Path, by: str) -> None:
    with containers(pods, "alpha", "beta") as made:
        wanted = "beta" if by == "name" else made["beta"][:12]
        trace = traced(tmp_path / "c.cwnd", "--container", wanted, meanwhile=lambda seen: seen.resets("beta", 4))
    assert set(trace.resets["workload"]) == {"beta"}
    assert set(trace.connections["workload"]) == {"beta"}
    assert set(ids(trace)) == {made["beta"]}


def test_a_container_that_starts_later_passes_the_filter_too(pods: Podman, tmp_path: Path) -> None:
    def meanwhile(seen: Seen) -> None:
        seen.resets("alpha")
        pods.good("rm", "--force", "--time", "0", "alpha")
        second.append(start(pods, "alpha"))
        until(lambda: second[0] in set(ids(cwndtrace.load(seen.output))), 60, "a reset of the second container")

    second: list[str] = []
    with containers(pods, "alpha", "beta") as made:
        trace = traced(tmp_path / "c.cwnd", "--container", "alpha", meanwhile=meanwhile)
    assert set(ids(trace)) == {made["alpha"], second[0]}


def test_a_name_that_none_has_lists_those_that_there_are(pods: Podman, tmp_path: Path) -> None:
    with containers(pods, "alpha", "beta"):
        done = call("run", "--container", "gamma", "-o", tmp_path / "c.cwnd", "-d", "1s")
    assert done.returncode == 1
    first, second = done.stderr.splitlines()
    assert first == "cwndtrace: there is no container gamma"
    assert {"alpha", "beta"} <= set(second.removeprefix("  there are: ").split(", "))


# ---- cgroups and files made by hand ----


@contextmanager
def sending(*groups: Path) -> Iterator[int]:
    """Start a process that sends, in these cgroups, which are made and removed; yield its pid."""
    made: list[Path] = []
    script = f"ip link set lo up && read go; exec {PYTHON} {SENDER}"
    process = subprocess.Popen(["unshare", "--net", "sh", "-c", script], stdin=subprocess.PIPE)
    try:
        for group in groups:
            made += [folder for folder in (group, *group.parents) if not folder.exists()]
            group.mkdir(parents=True)
            (group / "cgroup.procs").write_text(str(process.pid))
        assert process.stdin is not None
        process.stdin.close()
        yield process.pid
    finally:
        process.kill()
        process.wait()
        for folder in made:
            until(lambda f=folder: _removed(f), 20, f"{folder} to be empty")  # type: ignore[misc]


def _removed(folder: Path) -> bool:
    with suppress(OSError):
        folder.rmdir()
    return not folder.exists()


def identity() -> str:
    return os.urandom(32).hex()


def top() -> Path:
    return cgroups.mount_point()


def test_a_pod_by_the_bundle_that_crio_leaves(tmp_path: Path) -> None:
    container = identity()
    annotations = {
        "io.container.manager": "cri-o",
        "io.kubernetes.container.name": "nginx",
        "io.kubernetes.pod.namespace": "prod",
        "io.kubernetes.pod.name": "web-7d9c",
    }
    bundle = {"annotations": annotations, "linux": {"cgroupsPath": f"{SLICE}:crio:{container}"}}
    path = f"/run/containers/storage/overlay-containers/{container}/userdata/config.json"
    with written({path: bundle}), sending(top() / f"{POD}/crio-{container}.scope".lstrip("/")):
        name = "prod/web-7d9c/nginx"
        trace = traced(tmp_path / "c.cwnd", "--pod", "prod/web-7d9c", meanwhile=lambda seen: seen.resets(name))
    assert set(trace.resets["workload"]) == {name}
    assert set(trace.workloads["pod_uid"]) == {UID}


def test_a_pod_by_kubelets_logs(tmp_path: Path) -> None:
    container = identity()
    log = f"/var/log/containers/web-7d9c_prod_nginx-{container}.log"
    with written({log: Path("/nowhere")}), sending(top() / f"{POD}/cri-containerd-{container}.scope".lstrip("/")):
        trace = traced(tmp_path / "c.cwnd", meanwhile=lambda seen: seen.resets("prod/web-7d9c/nginx"))
    assert container in set(trace.workloads["container_id"])


def test_a_unit_by_its_cgroup(tmp_path: Path) -> None:
    with sending(top() / "system.slice/cwndtrace-test.service/worker"):
        unit = "cwndtrace-test.service"
        trace = traced(tmp_path / "c.cwnd", "--unit", "cwndtrace-test", meanwhile=lambda seen: seen.resets(unit))
    assert set(trace.resets["workload"]) == {unit}


def test_with_version_1_a_container_is_told_by_its_process(tmp_path: Path) -> None:
    first = cgroups._mounted("cgroup", cgroups._MOUNTS)
    if not first:
        pytest.skip("needs a cgroup v1 hierarchy: boot with systemd.unified_cgroup_hierarchy=0")
    container = identity()
    file = f"/var/lib/docker/containers/{container}/config.v2.json"
    content = {"Name": "/old", "Config": {"Image": "image"}}
    group = next(place for place in first if (place / "cgroup.procs").exists()) / f"docker/{container}"
    with written({file: content}), sending(group) as pid:
        trace = traced(tmp_path / "c.cwnd", meanwhile=lambda seen: seen.resets("old"))
        done = call("run", "--container", "old", "-o", tmp_path / "d.cwnd", "-d", "1s")
    assert trace.about.cgroups in ("v1", "hybrid")
    assert set(trace.resets.loc[trace.resets["tgid"] == pid, "workload"]) == {"old"}
    assert done.returncode == 1
    assert "has no cgroup v2 of its own" in done.stderr
    assert f"--netns {pid}" in done.stderr


# ---- containerd itself ----


@pytest.fixture
def containerd(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """containerd with its client, as a function."""
    if missing := [tool for tool in ("containerd", "ctr") if shutil.which(tool) is None]:
        pytest.skip(f"needs {' and '.join(missing)}: sudo make develop installs containerd")
    state = Path("/run/containerd")
    if state.exists():
        pytest.skip(f"containerd runs here, or has left {state}: this test wants its own at this place")
    folder = tmp_path / "containerd"
    folder.mkdir()
    address = folder / "sock"
    daemon = subprocess.Popen(
        ["containerd", "--root", str(folder / "root"), "--address", str(address), "--log-level", "error"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def ctr(*arguments: str) -> str:
        done = subprocess.run(["ctr", "-a", str(address), "-n", "k8s.io", *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    try:
        until(lambda: address.exists(), 30, "containerd to listen")
        yield ctr
    finally:
        daemon.terminate()
        daemon.wait(30)
        for mount in reversed(Path("/proc/self/mounts").read_text().split("\n")):
            if f" {state}/" in mount:
                subprocess.run(["umount", mount.split(" ")[1]], check=False)
        shutil.rmtree(state, ignore_errors=True)


def test_containerds_own_containers_have_their_pods(containerd: Callable[..., str], tmp_path: Path) -> None:
    container = identity()
    root = tmp_path / "root"
    (root / "usr").mkdir(parents=True)
    for name in ("bin", "lib", "lib64"):
        (root / name).symlink_to(f"usr/{name}")
    names = {
        "container-type": "container",
        "container-name": "nginx",
        "sandbox-name": "web",
        "sandbox-namespace": "prod",
    }
    options = [word for key, name in names.items() for word in ("--annotation", f"io.kubernetes.cri.{key}={name}")]
    options += ["--cgroup", f"{POD}/cri-containerd-{container}.scope"]
    shutil.copy(SENDER, root)
    options += ["--mount", "type=bind,src=/usr,dst=/usr,options=rbind:ro"]
    containerd("run", "-d", "--rootfs", *options, str(root), container, PYTHON, f"/{SENDER.name}")
    try:
        trace = traced(tmp_path / "c.cwnd", "--pod", "prod/w*", meanwhile=lambda seen: seen.resets("prod/web/nginx"))
    finally:
        with suppress(AssertionError):
            containerd("task", "kill", "-s", "9", container)
        until(lambda: "STOPPED" in containerd("task", "ls"), 30, "the container's end")
        containerd("task", "rm", container)
        containerd("container", "rm", container)
    assert set(ids(trace)) == {container}
    assert set(trace.workloads["runtime"]) == {"containerd"}
