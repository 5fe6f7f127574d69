# SPDX-License-Identifier: Apache-2.0
"""What the path of a cgroup says by itself: a systemd unit or slice, a container's id, a pod's uid.

The shapes are those of systemd (systemd.unit(5)), of runc's two cgroup drivers (libcontainer/cgroups), and of kubelet
(pkg/kubelet/cm). Whoever may make a cgroup chooses its name, so a path is a claim; ``runtimes`` checks it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

_RUNTIMES: Final = {
    "cri-containerd": "containerd",
    "crio": "cri-o",
    "docker": "docker",
    "libpod": "podman",
    "nerdctl": "containerd",
}
_CONTAINER: Final = re.compile(rf"(?:({'|'.join(_RUNTIMES)})-)?([0-9a-f]{{64}})(?:\.scope)?")
_POD: Final = re.compile(
    r"(?:.*-)?pod([0-9a-f]{8}(?:[-_][0-9a-f]{4}){3}[-_][0-9a-f]{12}|[0-9a-f]{32})(?:\.slice)?", re.ASCII
)
_UNITS: Final = (".service", ".scope", ".socket", ".mount", ".swap")
SHARED: Final = frozenset({"/", "/init.scope"})
"""The cgroups of which nothing follows. A socket that systemd made for a service stays in systemd's own."""


@dataclass(frozen=True)
class Place:
    """A cgroup's path and what it says. Texts are empty where it doesn't say it.

    ``kind`` is ``container``, ``pod`` (a pod's cgroup, not a container's), ``unit``, ``slice`` or ``cgroup`` (none of
    these). ``own`` is the path of the container's or the pod's own cgroup, of which ``path`` may be a descendant.
    ``runtime`` is docker, podman, containerd or cri-o.
    """

    path: str
    kind: str
    own: str = ""
    unit: str = ""
    container_id: str = ""
    runtime: str = ""
    pod_uid: str = ""

    @property
    def users(self) -> bool:
        """Return whether a user other than root, or a container, may have made this cgroup and chosen its name."""
        above = self.own.split("/")[1:-1]
        return any(part.startswith(("user@", "user-")) or _CONTAINER.fullmatch(part) for part in above)


def parse(path: str) -> Place:
    """Return what a path, as in /proc/PID/cgroup, says. The innermost container counts, and its pod."""
    parts = path.split("/")
    for at in range(len(parts) - 1, 0, -1):
        if match := _CONTAINER.fullmatch(parts[at]):
            runtime = _RUNTIMES.get(match[1], "") or {"docker": "docker"}.get(parts[at - 1], "")
            own = "/".join(parts[: at + 1])
            return Place(path, "container", own, "", match[2], runtime, _pod(parts[:at])[1])
    at, uid = _pod(parts)
    if uid:
        return Place(path, "pod", "/".join(parts[: at + 1]), pod_uid=uid)
    for at in range(len(parts) - 1, 0, -1):
        if parts[at].endswith(_UNITS):
            return Place(path, "unit", unit=parts[at])
    for at in range(len(parts) - 1, 0, -1):
        if parts[at].endswith(".slice"):
            return Place(path, "slice", unit=parts[at])
    return Place(path, "cgroup")


def _pod(parts: list[str]) -> tuple[int, str]:
    """Return the index of the innermost pod and its uid; an empty uid where there is none."""
    for at in range(len(parts) - 1, 0, -1):
        match = _POD.fullmatch(parts[at])
        # A pod of Kubernetes has an ancestor of this name; a user's slice may be called podman-something.
        if match and any("kubepods" in part for part in parts[1 : at + 1]):
            return at, match[1].replace("_", "-")
    return 0, ""


def of_process(lines: str) -> str:
    """Return the path that says most about a process, from the text of its /proc/PID/cgroup.

    A container's path counts in any hierarchy, because on a host with cgroup v1 a runtime need not make one in v2.
    Otherwise it is the path in v2 and, where that is the top, in systemd's own hierarchy of v1.
    """
    paths: dict[str, str] = {}
    for line in lines.splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if path.startswith("/"):
            paths[controllers] = path
    best = paths.get("", "")
    if best and parse(best).kind in ("container", "pod"):
        return best
    contained = [path for path in paths.values() if parse(path).kind in ("container", "pod")]
    if contained:
        return contained[0]
    return best if best not in SHARED and best else paths.get("name=systemd", "") or best or "/"
