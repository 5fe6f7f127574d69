# SPDX-License-Identifier: Apache-2.0
"""What the path of a cgroup says, in the shapes that systemd, the container runtimes and kubelet give it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cwndtrace.names import place
from cwndtrace.names.place import Place, parse

ID = "3f0a12b4c5d6" + "ab" * 26
OTHER = "cd" * 32
UID = "8f2b7c1e-0d4a-4c55-9a6e-1b2c3d4e5f60"
POD = f"kubepods-burstable-pod{UID.replace('-', '_')}.slice"
SLICES = f"/kubepods.slice/kubepods-burstable.slice/{POD}"


def container(own: str, runtime: str, pod: str = "") -> Place:
    return Place(own, "container", own, container_id=ID, runtime=runtime, pod_uid=pod)


@pytest.mark.parametrize(
    "expected",
    [
        container(f"/docker/{ID}", "docker"),
        container(f"/system.slice/docker-{ID}.scope", "docker"),
        container(f"/libpod_parent/libpod-{ID}", "podman"),
        container(f"/machine.slice/libpod-{ID}.scope", "podman"),
        container(f"{SLICES}/cri-containerd-{ID}.scope", "containerd", UID),
        container(f"{SLICES}/crio-{ID}.scope", "cri-o", UID),
        container(f"/kubepods/besteffort/pod{UID}/{ID}", "", UID),
        container(f"/kubelet/kubepods/pod{'0a' * 16}/{ID}", "", "0a" * 16),
        container(f"/system.slice/nerdctl-{ID}.scope", "containerd"),
        Place(SLICES, "pod", SLICES, pod_uid=UID),
        Place("/system.slice/nginx.service", "unit", unit="nginx.service"),
        Place("/system.slice/nginx.service/worker/1", "unit", unit="nginx.service"),
        Place(
            "/user.slice/user-1000.slice/user@1000.service/app.slice/app-vim-7.scope", "unit", unit="app-vim-7.scope"
        ),
        # conmon watches a container and isn't in it.
        Place(f"/machine.slice/libpod-conmon-{ID}.scope", "unit", unit=f"libpod-conmon-{ID}.scope"),
        Place("/system.slice/system-getty.slice", "slice", unit="system-getty.slice"),
        Place("/user.slice/podman-pod0123.slice", "slice", unit="podman-pod0123.slice"),
        Place("/custom/path", "cgroup"),
        Place("/", "cgroup"),
        Place(f"/docker/{ID[:-1]}", "cgroup"),
        Place(f"/docker/{ID.upper()}", "cgroup"),
    ],
    ids=lambda expected: expected.path[:50],
)
def test_a_path_says_what_its_maker_put_into_it(expected: Place) -> None:
    assert parse(expected.path) == expected


def test_below_a_containers_cgroup_it_is_still_the_container() -> None:
    own = f"/system.slice/docker-{ID}.scope"
    assert parse(f"{own}/system.slice/nginx.service") == Place(
        f"{own}/system.slice/nginx.service", "container", own, container_id=ID, runtime="docker"
    )


def test_the_innermost_container_counts_with_its_own_pod() -> None:
    path = f"/docker/{OTHER}/kubelet.slice/kubelet-kubepods.slice/kubelet-{POD}/cri-containerd-{ID}.scope"
    found = parse(path)
    assert (found.container_id, found.pod_uid, found.users) == (ID, UID, True)


@pytest.mark.parametrize(
    ("path", "users"),
    [
        (f"/docker/{ID}", False),
        (f"{SLICES}/crio-{ID}.scope", False),
        (f"/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{ID}.scope", True),
        (f"/user.slice/user-1000.slice/libpod-{ID}.scope", True),
        (f"/docker/{OTHER}/docker/{ID}", True),
    ],
)
def test_a_cgroup_that_others_than_root_may_have_made_is_known_as_such(path: str, users: bool) -> None:
    assert parse(path).users is users


@given(st.lists(st.text(st.characters(exclude_characters="/\n")), max_size=6))
def test_any_path_gives_something(parts: list[str]) -> None:
    path = f"/{'/'.join(parts)}"
    found = parse(path)
    assert found.path == path
    assert found.kind in ("container", "pod", "unit", "slice", "cgroup")
    assert path.startswith(found.own)


@pytest.mark.parametrize(
    ("lines", "path"),
    [
        ("0::/system.slice/nginx.service\n", "/system.slice/nginx.service"),
        # As on a host with both versions, where docker uses cgroupfs of version 1 and systemd version 2.
        (f"9:cpu:/docker/{ID}\n1:name=systemd:/docker/{ID}\n0::/system.slice/containerd.service\n", f"/docker/{ID}"),
        (f"9:cpu:/\n1:name=systemd:/docker/{OTHER}\n0::/libpod_parent/libpod-{ID}\n", f"/libpod_parent/libpod-{ID}"),
        ("9:cpu,cpuacct:/\n1:name=systemd:/system.slice/cron.service\n0::/\n", "/system.slice/cron.service"),
        ("9:cpu:/x\n", "/"),
        ("0::/a:b/c\n", "/a:b/c"),
        ("0::/\n", "/"),
        ("", "/"),
        ("nonsense\n::\n", "/"),
    ],
)
def test_a_processs_path_is_the_one_that_says_most(lines: str, path: str) -> None:
    assert place.of_process(lines) == path
