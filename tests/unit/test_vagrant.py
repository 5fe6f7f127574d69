# SPDX-License-Identifier: Apache-2.0
"""vagrant/: what its scripts say of bad input. The VM itself is tried by make vagrant-test."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.others import need_user_namespace

ROOT = Path(__file__).resolve().parents[2]
VAGRANT = ROOT / "vagrant"

needs_vagrant = pytest.mark.skipif(shutil.which("vagrant") is None, reason="needs vagrant: tools/setup packages lint")


def run(*command: str | Path, env: dict[str, str], cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """A command with both its streams as one."""
    return subprocess.run(
        command, cwd=cwd, env=os.environ | env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )


def as_root() -> tuple[str, ...]:
    """What goes in front of a command; root of a user namespace is enough for scripts that only ask who they are."""
    if os.geteuid() == 0:
        return ()
    need_user_namespace()
    return (shutil.which("unshare") or "unshare", "--map-root-user")


# ---- the Vagrantfile ----


def vagrant(home: Path, *words: str, **env: str) -> str:
    """What vagrant says, which must fail; without plugins, so that no provider is started."""
    settings = {"VAGRANT_HOME": str(home), "VAGRANT_NO_PLUGINS": "1", "VAGRANT_CHECKPOINT_DISABLE": "1", **env}
    done = run("vagrant", *words, cwd=VAGRANT, env=settings)
    assert done.returncode == 1, done.stdout
    assert ".rb:" not in done.stdout
    return done.stdout


@needs_vagrant
@pytest.mark.parametrize(
    ("setting", "cause", "cure"),
    [
        ({"VAGRANT_CPUS": "many"}, "VAGRANT_CPUS=many is no number from 1 on", "leave it out for "),
        ({"VAGRANT_MEMORY": "64"}, "VAGRANT_MEMORY=64 is no number from 1024 MiB on", "leave it out for 4096 MiB"),
        ({"VAGRANT_JUPYTER_PORT": "80"}, "VAGRANT_JUPYTER_PORT=80 is no number from 1024 on", "leave it out for 8888"),
        ({"VAGRANT_DRIVER": "xen"}, "VAGRANT_DRIVER=xen is no driver", "one of: kvm, qemu"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, setting: dict[str, str], cause: str, cure: str) -> None:
    said = vagrant(tmp_path, "status", **setting)
    assert cause in said
    assert cure in said


@needs_vagrant
def test_no_provider_names_what_to_install(tmp_path: Path) -> None:
    # Without VirtualBox on the PATH; without plugins there is no libvirt.
    without = [f for f in os.environ["PATH"].split(os.pathsep) if shutil.which("VBoxManage", path=f) is None]
    said = vagrant(tmp_path, "up", PATH=os.pathsep.join(without))
    assert "there is no provider here: neither libvirt nor VirtualBox" in said
    assert "apt install vagrant-libvirt libvirt-daemon-system" in said


@pytest.fixture
def virtualbox(tmp_path: Path) -> str:
    """A PATH on which a provider seems to be; none of these tests comes so far that it is asked anything."""
    (tmp_path / "VBoxManage").symlink_to("/bin/false")
    return f"{tmp_path}{os.pathsep}{os.environ['PATH']}"


@needs_vagrant
def test_more_memory_than_is_free(tmp_path: Path, virtualbox: str) -> None:
    said = vagrant(tmp_path, "up", PATH=virtualbox, VAGRANT_MEMORY="99999999")
    assert "the VM needs 99999999 MiB of memory, and only " in said
    assert "set VAGRANT_MEMORY (3072 to build a kernel, 1024 to run one from debs/)" in said


@needs_vagrant
def test_a_box_that_is_not_there(tmp_path: Path, virtualbox: str) -> None:
    said = vagrant(tmp_path, "up", PATH=virtualbox, VAGRANT_BOX="/nowhere/debian.box")
    assert "VAGRANT_BOX=/nowhere/debian.box doesn't exist" in said
    assert "vagrant/box/build --output /nowhere/debian.box" in said


# ---- the box builder ----


def box(*words: str) -> str:
    """What box/build says, which must fail."""
    done = run(*as_root(), VAGRANT / "box/build", *words, env={})
    assert done.returncode == 1, done.stdout
    return done.stdout


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (("--suit", "trixie"), "--suit is no option"),
        (("--suite",), "--suite needs a value"),
        (("--suite", "noble"), "this script makes no box of noble"),
        (("--size", "20MB"), "20MB is no size"),
    ],
)
def test_a_box_from_a_bad_command_line(words: tuple[str, ...], cause: str) -> None:
    assert cause in box(*words)


def test_a_box_without_its_tools_names_packages(tmp_path: Path) -> None:
    for tool in ("sh", "id", "dirname", "mkfs.ext4"):
        found = shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
        if not found:
            pytest.skip(f"needs {tool}: sudo make develop")
        (tmp_path / tool).symlink_to(found)
    done = run(*as_root(), "/bin/sh", VAGRANT / "box/build", env={"PATH": str(tmp_path)})
    assert done.returncode == 1
    assert "apt-get install mmdebstrap fdisk util-linux qemu-utils vagrant\n" in done.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be somebody else: sudo make test")
def test_a_box_without_root() -> None:
    script = (VAGRANT / "box/build").read_text()
    done = subprocess.run(
        ["sh", "-s", "--", "--suite", "bookworm"], input=script, text=True, capture_output=True, user=65534, check=False
    )
    assert done.returncode == 1
    assert "Run: sudo vagrant/box/build --suite bookworm" in done.stderr


# ---- provisioning ----


def sourced(code: str) -> str:
    """What code says that has common.sh, as a step would; it must fail."""
    done = run(
        "sh", "-c", f'. vagrant/provision/common.sh; {code}; echo "went on"', VAGRANT / "provision/kernel.sh", env={}
    )
    assert done.returncode == 1, done.stdout
    return done.stdout


def test_too_little_memory() -> None:
    said = sourced('need_memory 99999999 "building a kernel"')
    assert said.startswith("kernel: building a kernel takes 99999999 MiB of memory, and this VM has ")
    assert "VAGRANT_MEMORY=99999999 vagrant reload --provision" in said


def test_too_little_disk() -> None:
    said = sourced('need_disk 99999999 / "installing a kernel"')
    assert said.startswith("kernel: installing a kernel takes 99999999 MiB in /, and ")
    assert "Make room" in said


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of what kernel.sh uses, with a set-up that installs nothing and an apt that knows no source."""
    copy = tmp_path / "project"
    for folder in ("vagrant/provision", "kernel-patches"):
        shutil.copytree(ROOT / folder, copy / folder)
    for tool in ("project/tools/setup", "bin/apt-cache"):
        (tmp_path / tool).parent.mkdir(exist_ok=True)
    (copy / "tools/setup").symlink_to("/bin/true")
    (tmp_path / "bin/apt-cache").symlink_to("/bin/false")
    return copy


def kernel(project: Path, version: str = "6.12") -> str:
    """What kernel.sh says, which must fail, in that copy."""
    folder = project.parent
    settings = {"KERNEL_VERSION": version, "CACHE": f"{folder}/cache", "STATE": f"{folder}/state"}
    settings |= {"MACHINE": "debian13", "PATH": f"{folder}/bin:{os.environ['PATH']}"}
    done = run(*as_root(), "sh", project / "vagrant/provision/kernel.sh", env=settings, cwd=folder)
    assert done.returncode == 1, done.stdout
    assert not (folder / "state").exists()
    return done.stdout


def test_a_kernel_line_without_a_series(project: Path) -> None:
    said = kernel(project, "6.19")
    assert "no series for Linux 6.19; there are 6.1, 6.12, 7.2." in said
    assert "Try the nearest on your source: --version 7.2 --base PATH" in said
    assert "VAGRANT_KERNEL=6.12 vagrant provision debian13" in said


def stand_in(project: Path) -> None:
    """Put a build that fails into the place of the real one."""
    build = project / "kernel-patches/build"
    # Stands in for a compiler's failure, which would take a kernel's source: the log where the real one puts it.
    build.write_text(
        "#!/bin/sh\n"
        'while [ "$1" != --cache ]; do shift; done\n'
        'mkdir -p "$2/kernels"; seq -f "line %g" 100 >"$2/kernels/6.12-0123456789ab.failed.log"; exit 1\n'
    )


def test_a_build_that_fails_shows_the_end_of_its_log(project: Path) -> None:
    stand_in(project)
    said = kernel(project).splitlines()
    assert "line 100" in said
    assert "line 50" not in said
    assert "vagrant provision debian13. The compiled files are kept" in said[-1]


def test_a_package_that_is_none(project: Path) -> None:
    debs = project / "vagrant/debs"
    debs.mkdir()
    (debs / "linux-image-6.12.1-cwndtrace_6.12.1-1_amd64.deb").write_text("not a package")
    assert "is no Debian package" in kernel(project)


def test_a_package_of_another_line_is_left_alone(project: Path) -> None:
    debs = project / "vagrant/debs"
    debs.mkdir()
    (debs / "linux-image-6.12.1-cwndtrace_6.12.1-1_amd64.deb").write_text("not a package")
    stand_in(project)
    assert "no linux-image-6.1.*-cwndtrace package is in vagrant/debs, so one is built" in kernel(project, "6.1")
