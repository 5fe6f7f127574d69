# SPDX-License-Identifier: Apache-2.0
"""Names of containers and pods, from files as the runtimes and kubelet leave them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from cwndtrace.names import runtimes
from cwndtrace.names.files import MOST_BYTES, HostFiles
from cwndtrace.names.place import parse
from cwndtrace.names.runtimes import Names, Runtimes

ID = "3f0a12b4c5d6" + "ab" * 26
UID = "8f2b7c1e-0d4a-4c55-9a6e-1b2c3d4e5f60"
SLICE = f"kubepods-burstable-pod{UID.replace('-', '_')}.slice"
POD = f"/kubepods.slice/kubepods-burstable.slice/{SLICE}"
TASKS = "run/containerd/io.containerd.runtime.v2.task"
CRI = {
    "io.kubernetes.cri.container-type": "container",
    "io.kubernetes.cri.container-name": "nginx",
    "io.kubernetes.cri.image-name": "nginx:1.29",
    "io.kubernetes.cri.sandbox-name": "web-7d9c",
    "io.kubernetes.cri.sandbox-namespace": "prod",
    "io.kubernetes.cri.sandbox-uid": UID,
}
CRIO = {
    "io.container.manager": "cri-o",
    "io.kubernetes.container.name": "nginx",
    "io.kubernetes.cri-o.ImageName": "nginx:1.29",
    "io.kubernetes.pod.namespace": "prod",
    "io.kubernetes.pod.name": "web-7d9c",
    "io.kubernetes.pod.uid": UID,
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path


def write(root: Path, path: str, content: Any) -> Path:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return file


def bundle(root: Path, folder: str, cgroup: str, annotations: dict[str, str] | None = None) -> None:
    write(root, f"{folder}/config.json", {"annotations": annotations, "linux": {"cgroupsPath": cgroup}})


def names(root: Path, path: str) -> Names:
    return Runtimes(HostFiles(root)).names(parse(path))


def podman(root: Path, cgroup: str) -> None:
    storage = "var/lib/containers/storage/overlay-containers"
    bundle(root, f"{storage}/{ID}/userdata", cgroup, {"io.container.manager": "libpod"})
    metadata = json.dumps({"image-name": "localhost/web:1", "name": "web"})
    write(root, f"{storage}/containers.json", [{"id": ID, "names": ["web"], "metadata": metadata}])


@pytest.mark.parametrize("cgroup", [f"{SLICE}:cri-containerd:{ID}", f"{POD}/cri-containerd-{ID}.scope"])
def test_containerd_in_kubernetes(root: Path, cgroup: str) -> None:
    bundle(root, f"{TASKS}/k8s.io/{ID}", cgroup, CRI)
    expected = Names("nginx", "nginx:1.29", "containerd", "prod", "web-7d9c", UID)
    assert names(root, f"{POD}/cri-containerd-{ID}.scope") == expected
    assert names(root, f"{POD}/cri-containerd-{ID}.scope/below") == expected


def test_a_pods_sandbox_has_the_pods_name_only(root: Path) -> None:
    sandbox = CRI | {"io.kubernetes.cri.container-type": "sandbox"}
    del sandbox["io.kubernetes.cri.container-name"]
    bundle(root, f"{TASKS}/k8s.io/{ID}", f"{SLICE}:cri-containerd:{ID}", sandbox)
    found = names(root, f"{POD}/cri-containerd-{ID}.scope")
    assert (found.container_name, found.pod_name) == ("", "web-7d9c")


def test_crio(root: Path) -> None:
    bundle(root, f"run/containers/storage/overlay-containers/{ID}/userdata", f"{SLICE}:crio:{ID}", CRIO)
    assert names(root, f"{POD}/crio-{ID}.scope") == Names("nginx", "nginx:1.29", "cri-o", "prod", "web-7d9c", UID)


def test_docker(root: Path) -> None:
    bundle(root, f"{TASKS}/moby/{ID}", f"system.slice:docker:{ID}")
    write(root, f"var/lib/docker/containers/{ID}/config.v2.json", {"Name": "/web", "Config": {"Image": "nginx"}})
    assert names(root, f"/system.slice/docker-{ID}.scope") == Names("web", "nginx", "docker")


def test_docker_with_its_data_elsewhere(root: Path) -> None:
    write(root, "etc/docker/daemon.json", {"data-root": "/srv/docker"})
    write(root, f"srv/docker/containers/{ID}/config.v2.json", {"Name": "/web", "Config": {"Image": "nginx"}})
    bundle(root, f"{TASKS}/moby/{ID}", f"/docker/{ID}")
    assert names(root, f"/docker/{ID}") == Names("web", "nginx", "docker")


@pytest.mark.parametrize("path", [f"/libpod_parent/libpod-{ID}", f"/machine.slice/libpod-{ID}.scope"])
def test_podman(root: Path, path: str) -> None:
    podman(root, f"machine.slice:libpod:{ID}" if path.endswith(".scope") else path)
    assert names(root, path) == Names("web", "localhost/web:1", "podman")


@pytest.mark.parametrize(
    ("state", "content"),
    [
        ("run/runc/{}/state.json", {"config": {"labels": ["other", "bundle=/elsewhere/userdata"]}}),
        ("run/crun/{}/status", {"bundle": "/elsewhere/userdata"}),
    ],
)
def test_a_bundle_elsewhere_is_found_by_the_runtimes_state(root: Path, state: str, content: Any) -> None:
    write(root, state.format(ID), content)
    bundle(root, "elsewhere/userdata", f"{SLICE}:crio:{ID}", CRIO)
    assert names(root, f"{POD}/crio-{ID}.scope").pod_name == "web-7d9c"


def test_podman_with_its_storage_elsewhere(root: Path) -> None:
    storage = "srv/storage/overlay-containers"
    path = f"/libpod_parent/libpod-{ID}"
    write(root, f"run/runc/{ID}/state.json", {"config": {"labels": [f"bundle=/{storage}/{ID}/userdata"]}})
    bundle(root, f"{storage}/{ID}/userdata", path, {"io.container.manager": "libpod"})
    write(root, f"{storage}/containers.json", [{"id": ID, "names": ["web"]}])
    assert names(root, path) == Names("web", "", "podman")


def test_kubelets_logs_name_a_container_that_is_gone(root: Path) -> None:
    folder = root / "var/log/containers"
    folder.mkdir(parents=True)
    (folder / f"web-7d9c_prod_nginx-{ID}.log").symlink_to("/nowhere")
    (folder / "nonsense.log").touch()
    (root / f"var/log/pods/prod_web-7d9c_{UID}").mkdir(parents=True)
    expected = Names("nginx", "", "containerd", "prod", "web-7d9c", UID)
    assert names(root, f"{POD}/cri-containerd-{ID}.scope") == expected
    assert names(root, POD) == Names("", "", "", "prod", "web-7d9c", UID)


def test_names_are_those_of_now(root: Path) -> None:
    looked_up = Runtimes(HostFiles(root))
    where = parse(f"/libpod_parent/libpod-{ID}")
    assert looked_up.names(where).container_name == ""
    podman(root, where.path)
    assert looked_up.names(where).container_name == "web"
    write(root, "var/lib/containers/storage/overlay-containers/containers.json", [{"id": ID, "names": ["new name"]}])
    assert looked_up.names(where).container_name == "new name"


def test_a_container_of_containerd_may_have_any_id(root: Path) -> None:
    bundle(root, f"{TASKS}/default/web", "/default/web")
    found = Runtimes(HostFiles(root))
    assert found.other_container(parse("/default/web/below")).container_id == "web"
    assert found.other_container(parse("/other/web")).kind == "cgroup"


def test_nerdctls_names(root: Path) -> None:
    names_of = {"nerdctl/name": "web", "nerdctl/image-name": "nginx"}
    bundle(root, f"{TASKS}/default/{ID}", f"system.slice:nerdctl:{ID}", names_of)
    assert names(root, f"/system.slice/nerdctl-{ID}.scope") == Names("web", "nginx", "containerd")


# ---- strangers ----


def test_a_cgroup_that_the_runtime_did_not_make_gets_no_name(root: Path) -> None:
    podman(root, f"machine.slice:libpod:{ID}")
    mine = f"/user.slice/user-1000.slice/user@1000.service/libpod-{ID}.scope"
    assert names(root, mine) == Names()
    assert names(root, f"/libpod_parent/libpod-{ID}") == Names()


def test_without_a_bundle_a_users_cgroup_gets_no_name(root: Path) -> None:
    write(root, f"var/lib/docker/containers/{ID}/config.v2.json", {"Name": "/web", "Config": {"Image": "nginx"}})
    assert names(root, f"/docker/{ID}") == Names("web", "nginx", "docker")
    assert names(root, f"/user.slice/user-7.slice/docker-{ID}.scope") == Names()
    assert names(root, f"/user.slice/user-7.slice/kubepods-pod{UID.replace('-', '_')}.slice") == Names()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[" * 100_000,
        "null",
        "[]",
        '"text"',
        '{"annotations": 1, "linux": []}',
        '{"linux": {"cgroupsPath": 5}}',
        '{"linux": {"cgroupsPath": "a:b:c:d"}}',
        "\0",
        " " * (MOST_BYTES + 1),
    ],
    ids=range(10),
)
def test_files_of_any_content_give_no_name(root: Path, content: str) -> None:
    for path in (
        f"{TASKS}/k8s.io/{ID}/config.json",
        f"run/runc/{ID}/state.json",
        f"var/lib/docker/containers/{ID}/config.v2.json",
        "etc/docker/daemon.json",
        "var/lib/containers/storage/overlay-containers/containers.json",
    ):
        write(root, path, content)
    assert names(root, f"/docker/{ID}").container_name == ""


def test_no_link_leads_out_of_the_root(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside")
    write(outside, "config.v2.json", {"Name": "/stolen", "Config": {"Image": "x"}})
    folder = root / "var/lib/docker/containers" / ID
    folder.mkdir(parents=True)
    (folder / "config.v2.json").symlink_to(outside / "config.v2.json")
    assert names(root, f"/docker/{ID}").container_name == ""
    # The same link within the root is followed there.
    write(root, f"{outside}/config.v2.json".lstrip("/"), {"Name": "/inside", "Config": {"Image": "x"}})
    assert names(root, f"/docker/{ID}").container_name == "inside"


def test_only_regular_files_are_opened(root: Path) -> None:
    folder = root / "var/lib/docker/containers" / ID
    folder.mkdir(parents=True)
    os.mkfifo(folder / "config.v2.json")  # opening it would wait for a writer
    assert names(root, f"/docker/{ID}").container_name == ""


def test_names_can_be_written_whatever_they_are(root: Path) -> None:
    name = "\ud800\x1b[31m" + "x" * 10_000
    write(root, f"var/lib/docker/containers/{ID}/config.v2.json", {"Name": name, "Config": {"Image": 3}})
    found = names(root, f"/docker/{ID}").container_name
    assert len(found.encode()) <= runtimes.MOST_CHARACTERS * 3
    write(root, "etc/docker/daemon.json", {"data-root": "/\ud800/\0"})
    assert names(root, f"/docker/{ID}").container_name == ""
