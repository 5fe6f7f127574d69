# SPDX-License-Identifier: Apache-2.0
"""Names of containers and pods, from the files that container runtimes and kubelet leave on the disk.

| runtime | what is read |
|---|---|
| docker | /var/lib/docker/containers/ID/config.v2.json (another place: data-root of /etc/docker/daemon.json) |
| containerd | the OCI bundle /run/containerd/io.containerd.runtime.v2.task/NAMESPACE/ID/config.json |
| CRI-O, podman | the OCI bundle .../storage/DRIVER-containers/ID/userdata/config.json, and podman's containers.json |
| any, elsewhere | the bundle that runc's or crun's own state file below /run names |
| kubelet | the links in /var/log/containers and the folders in /var/log/pods |

A name is taken only for the cgroup that the runtime itself made for the container: the bundle's ``cgroupsPath`` must
give it. Without a bundle, as after the container's end, the cgroup must lie where only root makes cgroups.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

from cwndtrace.names.files import HostFiles
from cwndtrace.names.place import Place

_T = TypeVar("_T")
_TASKS: Final = tuple(
    f"{state}/io.containerd.runtime.v2.task"
    for state in ("/run/containerd", "/run/k3s/containerd", "/run/docker/containerd/daemon", "/run/docker/containerd")
)
_STORAGES: Final = ("/run/containers/storage", "/var/lib/containers/storage")
_DRIVERS: Final = ("overlay", "vfs", "btrfs", "zfs", "aufs", "devmapper")
_STATES: Final = ("/run/runc/{}/state.json", "/run/crun/{}/status")
_DOCKER: Final = "/var/lib/docker"
_DOCKER_SETTINGS: Final = "/etc/docker/daemon.json"
_LOG_LINK: Final = re.compile(r"([^_/]+)_([^_/]+)_([^_/]+)-([0-9a-f]{64})\.log")
_LOG_FOLDER: Final = re.compile(r"([^_/]+)_([^_/]+)_([0-9a-f-]{32,36})")
_ID: Final = re.compile(r"[\w.-]{1,128}", re.ASCII)
_MOST_KEPT: Final = 16_384
MOST_CHARACTERS: Final = 256
"""The most characters that are kept of a name; Kubernetes' names have at most 253."""


@dataclass(frozen=True)
class Names:
    """The names of a container and of its pod; texts are empty where nothing tells."""

    container_name: str = ""
    image: str = ""
    runtime: str = ""
    pod_namespace: str = ""
    pod_name: str = ""
    pod_uid: str = ""

    def or_else(self, other: Names) -> Names:
        """Return these names, and those of ``other`` where one is empty."""
        return Names(*(mine or its for mine, its in zip(_values(self), _values(other), strict=True)))


def _values(names: Names) -> tuple[str, ...]:
    return tuple(getattr(names, name) for name in Names.__dataclass_fields__)


@dataclass(frozen=True)
class Bundle:
    """An OCI bundle: its folder, the path of the cgroup that it names as its own, and the names in its annotations."""

    folder: str
    cgroup: str
    names: Names


_CRI: Final = "io.kubernetes.cri."
_CONTAINERD: Final = Names(
    f"{_CRI}container-name",
    f"{_CRI}image-name",
    "",
    f"{_CRI}sandbox-namespace",
    f"{_CRI}sandbox-name",
    f"{_CRI}sandbox-uid",
)
_CRIO: Final = Names(
    "io.kubernetes.container.name",
    "io.kubernetes.cri-o.ImageName",
    "",
    "io.kubernetes.pod.namespace",
    "io.kubernetes.pod.name",
    "io.kubernetes.pod.uid",
)
_NERDCTL: Final = Names("nerdctl/name", "nerdctl/image-name")
"""The annotations of a bundle that have the names, by who writes them."""


class Runtimes:
    """Looks up names below a root directory, and keeps what it has read of lists until they change."""

    def __init__(self, root: HostFiles) -> None:
        self._root = root
        self._kept: dict[str, tuple[tuple[int, ...], Any]] = {}

    def names(self, place: Place) -> Names:
        """Return the names of the container or the pod to which a cgroup belongs; empty where none can be trusted."""
        if place.kind == "pod":
            return Names() if place.users else self._pod_by_logs(place.pod_uid)
        if place.kind != "container":
            return Names()
        bundle = self._bundle(place.container_id)
        if place.users if bundle is None else bundle.cgroup != place.own:
            return Names()
        found = bundle.names if bundle else Names()
        found = found.or_else(self._docker(place)).or_else(self._podman(place, bundle.folder if bundle else ""))
        found = found.or_else(self._by_log(place))
        return replace(found, runtime=found.runtime or place.runtime, pod_uid=found.pod_uid or place.pod_uid)

    def other_container(self, place: Place) -> Place:
        """Return a cgroup of containerd whose container has an id of another shape, as a container; else ``place``."""
        parts = place.path.split("/")
        if place.kind != "cgroup" or len(parts) < 3 or not all(_ID.fullmatch(part) for part in parts[1:3]):
            return place
        own = "/".join(parts[:3])
        bundle = self._read_bundle(f"{_TASKS[0]}/{parts[1]}/{parts[2]}")
        if bundle is None or bundle.cgroup != own:
            return place
        return Place(place.path, "container", own, container_id=parts[2], runtime="containerd")

    def _bundle(self, container: str) -> Bundle | None:
        """Return a container's OCI bundle; None where there is none."""
        return next((found for path in self._bundles(container) if (found := self._read_bundle(path))), None)

    def _read_bundle(self, folder: str) -> Bundle | None:
        def read(path: str) -> Bundle | None:
            content = self._root.json(path)
            return Bundle(folder, _cgroup(content), _annotated(content)) if isinstance(content, dict) else None

        return self._cached(f"{folder}/config.json", read)

    def _bundles(self, container: str) -> Iterator[str]:
        for tasks in _TASKS:
            yield from (f"{tasks}/{namespace}/{container}" for namespace in self._listed(tasks))
        for storage in _STORAGES:
            yield from (f"{storage}/{driver}-containers/{container}/userdata" for driver in _DRIVERS)
        for state in _STATES:
            yield from _bundle_of(_mapping(self._root.json(state.format(container))))

    def _docker(self, place: Place) -> Names:
        settings = _mapping(self._cached(_DOCKER_SETTINGS, self._root.json))
        folder = _text(settings.get("data-root")) or _DOCKER
        found = _mapping(self._root.json(f"{folder}/containers/{place.container_id}/config.v2.json"))
        name, image = _text(found.get("Name")).lstrip("/"), _text(_mapping(found.get("Config")).get("Image"))
        labels = _mapping(_mapping(found.get("Config")).get("Labels"))
        pod = [_text(labels.get(f"io.kubernetes.{key}")) for key in ("pod.namespace", "pod.name", "pod.uid")]
        # cri-dockerd calls a container k8s_CONTAINER_POD_NAMESPACE_UID_ATTEMPT.
        name = _text(labels.get("io.kubernetes.container.name")) or name
        return Names(name, image, "docker" if name else "", *pod)

    def _podman(self, place: Place, bundle: str) -> Names:
        folders = [f"{storage}/{driver}-containers" for storage in reversed(_STORAGES) for driver in _DRIVERS]
        if bundle.endswith(f"/{place.container_id}/userdata"):
            folders.append(bundle.rsplit("/", 2)[0])  # of a storage elsewhere
        for folder in folders:
            listed = self._cached(f"{folder}/containers.json", lambda path: _containers(self._root.json(path)))
            if listed and place.container_id in listed:
                return listed[place.container_id]
        return Names()

    def _by_log(self, place: Place) -> Names:
        links = self._cached("/var/log/containers", lambda path: _log_links(self._root.names(path))) or {}
        found = links.get(place.container_id, Names())
        return found.or_else(self._pod_by_logs(place.pod_uid)) if place.pod_uid else found

    def _pod_by_logs(self, uid: str) -> Names:
        pods = self._cached("/var/log/pods", lambda path: _log_folders(self._root.names(path))) or {}
        return pods.get(uid, Names())

    def _listed(self, folder: str) -> list[str]:
        return self._cached(folder, self._root.names) or []

    def _cached(self, path: str, read: Callable[[str], _T]) -> _T | None:
        """Return what ``read`` makes of a file or a folder, read again only when it changes; None without one."""
        stamp = self._root.stamp(path)
        if stamp is None:
            return None
        known = self._kept.get(path)
        if known is None or known[0] != stamp:
            if len(self._kept) >= _MOST_KEPT:  # most are of containers that are gone
                self._kept.clear()
            known = self._kept[path] = stamp, read(path)
        result: _T = known[1]
        return result


def _cgroup(bundle: Mapping[str, Any]) -> str:
    """Return the path of the cgroup that a bundle names as its own; empty where it names none.

    With systemd ``cgroupsPath`` is SLICE:PREFIX:NAME (libcontainer/cgroups/systemd).
    """
    asked = _mapping(bundle.get("linux")).get("cgroupsPath")
    if not isinstance(asked, str):
        return ""
    if asked.count(":") != 2:
        return f"/{asked.strip('/')}"
    above, prefix, name = asked.split(":")
    scope = name if name.endswith(".slice") else f"{prefix}-{name}.scope" if prefix else f"{name}.scope"
    return f"{_slice_path(above or 'system.slice')}/{scope}"


def _slice_path(name: str) -> str:
    """Return the cgroup of a slice: a-b.slice is in a.slice (systemd.slice(5))."""
    if name == "-.slice":
        return ""
    parts = name.removesuffix(".slice").split("-")
    return "".join(f"/{'-'.join(parts[: at + 1])}.slice" for at in range(len(parts)))


def _annotated(bundle: Mapping[str, Any]) -> Names:
    """Return the names in a bundle's annotations."""
    annotations = _mapping(bundle.get("annotations"))

    def named(keys: Names) -> Names:
        return Names(*(_text(annotations.get(key)) if key else "" for key in _values(keys)))

    if f"{_CRI}container-type" in annotations:
        return replace(named(_CONTAINERD), runtime="containerd")
    if annotations.get("io.container.manager") == "cri-o":
        return replace(named(_CRIO), runtime="cri-o")
    if annotations.get("io.container.manager") == "libpod":
        return Names(runtime="podman")
    return named(_NERDCTL)


def _bundle_of(state: Mapping[str, Any]) -> Iterator[str]:
    """Yield the place of the bundle that a runtime's state file gives: crun's has it as such, runc's among labels."""
    labels = _mapping(state.get("config")).get("labels")
    for text in (state.get("bundle"), *(labels if isinstance(labels, list) else ())):
        if isinstance(text, str) and text.removeprefix("bundle=").startswith("/"):
            yield text.removeprefix("bundle=")


def _containers(listed: object) -> dict[str, Names]:
    """Return podman's containers, by id."""
    found = {}
    for entry in listed if isinstance(listed, list) else ():
        each = _mapping(entry)
        details: object = None
        with suppress(ValueError, RecursionError):
            details = json.loads(each.get("metadata", "")) if isinstance(each.get("metadata"), str) else None
        names = each.get("names")
        name = _text(names[0]) if isinstance(names, list) and names else ""
        found[_text(each.get("id"))] = Names(name, _text(_mapping(details).get("image-name")))
    return found


def _log_links(names: list[str]) -> dict[str, Names]:
    """Return the containers whose logs kubelet links to, by id: POD_NAMESPACE_CONTAINER-ID.log."""
    matches = (match for name in names if (match := _LOG_LINK.fullmatch(name)))
    return {match[4]: Names(match[3], pod_namespace=match[2], pod_name=match[1]) for match in matches}


def _log_folders(names: list[str]) -> dict[str, Names]:
    """Return the pods that have a folder of logs, by uid: NAMESPACE_POD_UID."""
    matches = (match for name in names if (match := _LOG_FOLDER.fullmatch(name)))
    return {match[3]: Names(pod_namespace=match[1], pod_name=match[2], pod_uid=match[3]) for match in matches}


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: object) -> str:
    """Return a text, cut, without the halves of characters that JSON can have and UTF-8 can't."""
    return value[:MOST_CHARACTERS].encode("utf-8", "replace").decode() if isinstance(value, str) else ""
