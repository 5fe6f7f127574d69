# SPDX-License-Identifier: Apache-2.0
"""The files in contrib and docs/containers.md ask for the same privileges, each with its reason."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from cwndtrace import privileges
from cwndtrace.cli import preflight
from cwndtrace.kernel import host

ROOT = Path(__file__).resolve().parents[2]
MANIFEST = ROOT / "contrib/kubernetes/daemonset.yaml"
PAGE = (ROOT / "docs/containers.md").read_text(encoding="utf-8")


@pytest.fixture
def documents() -> dict[str, Any]:
    """The documents of the manifest, by kind."""
    return {document["kind"]: document for document in yaml.safe_load_all(MANIFEST.read_text(encoding="utf-8"))}


def test_the_manifest_is_one_namespace_with_an_account_and_a_daemonset(documents: dict[str, Any]) -> None:
    assert list(documents) == ["Namespace", "ServiceAccount", "DaemonSet"]
    name = documents["Namespace"]["metadata"]["name"]
    assert {documents[kind]["metadata"]["namespace"] for kind in ("ServiceAccount", "DaemonSet")} == {name}
    spec = documents["DaemonSet"]["spec"]
    assert spec["selector"]["matchLabels"].items() <= spec["template"]["metadata"]["labels"].items()
    assert spec["template"]["spec"]["serviceAccountName"] == documents["ServiceAccount"]["metadata"]["name"]
    assert documents["ServiceAccount"]["automountServiceAccountToken"] is False


def test_the_pod_has_the_privileges_that_the_page_lists(documents: dict[str, Any]) -> None:
    pod = documents["DaemonSet"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    context = container["securityContext"]
    documented = re.findall(r"--cap-add=(\w+)", re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)[1])
    assert context["capabilities"] == {"drop": ["ALL"], "add": documented}
    assert set(documented) == set(re.findall(r"^\| `--cap-add=(\w+)`", PAGE, re.MULTILINE))
    assert {getattr(privileges, name) for name in documented} == privileges.LOOKING
    assert (pod["hostPID"], pod["hostNetwork"], context["readOnlyRootFilesystem"]) == (True, True, True)
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_each_capability_is_a_line_below_its_reason(documents: dict[str, Any]) -> None:
    lines = [line.strip() for line in MANIFEST.read_text(encoding="utf-8").splitlines()]
    (container,) = documents["DaemonSet"]["spec"]["template"]["spec"]["containers"]
    for name in container["securityContext"]["capabilities"]["add"]:
        assert lines[lines.index(f"- {name}") - 1].startswith("# ")


def test_the_options_of_warnings_are_on_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "in_container", lambda: True)
    monkeypatch.setattr(host, "lacking_root", lambda: "forbidden")
    monkeypatch.setattr(host, "in_first_cgroup_namespace", lambda: False)
    remedies = []
    for sees, held in ((False, frozenset[int]()), (True, frozenset[int]()), (True, privileges.LOOKING)):
        monkeypatch.setattr(host, "sees_all_processes", lambda sees=sees: sees)
        monkeypatch.setattr(privileges, "held", lambda held=held: held)
        remedies += [remedy for _, remedy in preflight.container()]
    options = set(re.findall(r"--[\w-]+=\w+|\w+=\w+|-v \S+|hostPID: true", " ".join(remedies)))
    assert len(options) > 6
    assert [option for option in sorted(options) if option not in PAGE] == []
