# SPDX-License-Identifier: Apache-2.0
"""The scripts of vagrant/ report bad input with a remedy; make vagrant-test tests the VM itself."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.harness.users import need_user_namespace

ROOT = Path(__file__).resolve().parents[2]
VAGRANT = ROOT / "vagrant"

needs_vagrant = pytest.mark.skipif(shutil.which("vagrant") is None, reason="needs vagrant: tools/setup packages lint")


def run(*command: str | Path, env: dict[str, str], cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a command with stdout and stderr as one stream."""
    return subprocess.run(
        command, cwd=cwd, env=os.environ | env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )


def as_root() -> tuple[str, ...]:
    """Return a command prefix that gives root; that of a user namespace is enough for scripts that check the uid."""
    if os.geteuid() == 0:
        return ()
    need_user_namespace()
    return (shutil.which("unshare") or "unshare", "--map-root-user")


# ---- the Vagrantfile ----


def vagrant(home: Path, *arguments: str, **env: str) -> str:
    """Return the output of a vagrant command that must fail; without plugins, so that no provider is started."""
    settings = {"VAGRANT_HOME": str(home), "VAGRANT_NO_PLUGINS": "1", "VAGRANT_CHECKPOINT_DISABLE": "1", **env}
    settings["VAGRANT_DOTFILE_PATH"] = str(home / "dotfiles")  # the checkout may be another user's
    result = run("vagrant", *arguments, cwd=VAGRANT, env=settings)
    assert result.returncode == 1, result.stdout
    assert ".rb:" not in result.stdout
    return result.stdout


@pytest.mark.slow
@needs_vagrant
@pytest.mark.parametrize(
    ("setting", "cause", "cure"),
    [
        ({"VAGRANT_CPUS": "many"}, "VAGRANT_CPUS=many is no number from 1 on", "leave it out for "),
        ({"VAGRANT_MEMORY": "64"}, "VAGRANT_MEMORY=64 is no number from 1024 MiB on", "leave it out for 4096 MiB"),
        ({"VAGRANT_JUPYTER_PORT": "80"}, "VAGRANT_JUPYTER_PORT=80 is no number from 1024 on", "leave it out for 8888"),
        ({"VAGRANT_DRIVER": "xen"}, "VAGRANT_DRIVER=xen is no driver", "one of: kvm, qemu"),
        ({"VAGRANT_ARCH": "riscv64"}, "VAGRANT_ARCH=riscv64 is no architecture", "one of: x86_64, arm64"),
    ],
)
def test_invalid_settings_are_refused_with_a_remedy(
    tmp_path: Path, setting: dict[str, str], cause: str, cure: str
) -> None:
    output = vagrant(tmp_path, "status", **setting)
    assert cause in output
    assert cure in output


@needs_vagrant
def test_without_a_provider_the_packages_to_install_are_named(tmp_path: Path) -> None:
    # VirtualBox isn't on this PATH, and without plugins there is no libvirt.
    without = [f for f in os.environ["PATH"].split(os.pathsep) if shutil.which("VBoxManage", path=f) is None]
    output = vagrant(tmp_path, "up", PATH=os.pathsep.join(without))
    assert "there is no provider here: neither libvirt nor VirtualBox" in output
    assert "apt install vagrant-libvirt libvirt-daemon-system" in output


@pytest.fixture
def virtualbox(tmp_path: Path) -> str:
    """A PATH with a fake provider, which is never called because the tests fail before that."""
    (tmp_path / "VBoxManage").symlink_to("/bin/false")
    return f"{tmp_path}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.slow
@needs_vagrant
def test_more_memory_than_is_free_is_refused(tmp_path: Path, virtualbox: str) -> None:
    output = vagrant(tmp_path, "up", PATH=virtualbox, VAGRANT_MEMORY="99999999")
    assert "the VM needs 99999999 MiB of memory, and only " in output
    assert "set VAGRANT_MEMORY (3072 to build a kernel, 1024 to run one from debs/)" in output


@pytest.mark.slow
@needs_vagrant
def test_a_missing_box_is_refused(tmp_path: Path, virtualbox: str) -> None:
    output = vagrant(tmp_path, "up", PATH=virtualbox, VAGRANT_BOX="/nowhere/debian.box")
    assert "VAGRANT_BOX=/nowhere/debian.box doesn't exist" in output
    assert "vagrant/box/build --output /nowhere/debian.box" in output


@pytest.mark.slow
@needs_vagrant
def test_arm64_needs_a_box_of_the_users(tmp_path: Path, virtualbox: str) -> None:
    output = vagrant(tmp_path, "up", PATH=virtualbox, VAGRANT_ARCH="arm64")
    assert "no public box for arm64 is named here" in output
    assert "VAGRANT_BOX=" in output


# ---- the box builder ----


def box(*arguments: str) -> str:
    """Return the output of box/build, which must fail."""
    result = run(*as_root(), VAGRANT / "box/build", *arguments, env={})
    assert result.returncode == 1, result.stdout
    return result.stdout


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (("--suit", "trixie"), "--suit is no option"),
        (("--suite",), "--suite needs a value"),
        (("--suite", "noble"), "this script makes no box of noble"),
        (("--size", "20MB"), "20MB is no size"),
    ],
)
def test_box_build_refuses_invalid_options(arguments: tuple[str, ...], cause: str) -> None:
    assert cause in box(*arguments)


def test_box_build_names_the_packages_of_missing_tools(tmp_path: Path) -> None:
    for tool in ("sh", "id", "dirname", "mkfs.ext4"):
        found = shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
        if not found:
            pytest.skip(f"needs {tool}: sudo make develop")
        (tmp_path / tool).symlink_to(found)
    result = run(*as_root(), "/bin/sh", VAGRANT / "box/build", env={"PATH": str(tmp_path)})
    assert result.returncode == 1
    assert "apt-get install mmdebstrap fdisk util-linux qemu-utils vagrant\n" in result.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user: sudo make test")
def test_box_build_without_root_says_how_to_run_it() -> None:
    script = (VAGRANT / "box/build").read_text()
    result = subprocess.run(
        ["sh", "-s", "--", "--suite", "bookworm"], input=script, text=True, capture_output=True, user=65534, check=False
    )
    assert result.returncode == 1
    assert "Run: sudo vagrant/box/build --suite bookworm" in result.stderr


# ---- provisioning -------


def sourced(code: str) -> str:
    """Return the output of shell code that sources common.sh as a step of provisioning does; it must fail."""
    result = run(
        "sh", "-c", f'. vagrant/provision/common.sh; {code}; echo "went on"', VAGRANT / "provision/kernel.sh", env={}
    )
    assert result.returncode == 1, result.stdout
    return result.stdout


def test_too_little_memory_is_refused_with_a_remedy() -> None:
    output = sourced('need_memory 99999999 "building a kernel"')
    assert output.startswith("kernel: building a kernel takes 99999999 MiB of memory, and this VM has ")
    assert "VAGRANT_MEMORY=99999999 vagrant reload --provision" in output


def test_too_little_disk_space_is_refused_with_a_remedy() -> None:
    output = sourced('need_disk 99999999 / "installing a kernel"')
    assert output.startswith("kernel: installing a kernel takes 99999999 MiB in /, and ")
    assert "Make room" in output


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the files that kernel.sh uses; its tools/setup installs nothing, and its apt has no sources."""
    copy = tmp_path / "project"
    for folder in ("vagrant/provision", "kernel-patches"):
        shutil.copytree(ROOT / folder, copy / folder)
    for tool in ("project/tools/setup", "bin/apt-cache"):
        (tmp_path / tool).parent.mkdir(exist_ok=True)
    (copy / "tools/setup").symlink_to("/bin/true")
    (tmp_path / "bin/apt-cache").symlink_to("/bin/false")
    return copy


def kernel(project: Path, version: str = "6.12") -> str:
    """Return the output of kernel.sh in that copy; it must fail."""
    folder = project.parent
    settings = {"KERNEL_VERSION": version, "CACHE": f"{folder}/cache", "STATE": f"{folder}/state"}
    settings |= {"MACHINE": "debian13", "PATH": f"{folder}/bin:{os.environ['PATH']}"}
    result = run(*as_root(), "sh", project / "vagrant/provision/kernel.sh", env=settings, cwd=folder)
    assert result.returncode == 1, result.stdout
    assert not (folder / "state").exists()
    return result.stdout


def replace_build(project: Path, code: int = 1) -> None:
    """Replace kernel-patches/build by a script that fails with this exit code."""
    build = project / "kernel-patches/build"
    # A real failure of the compiler would need a kernel's source. The log is where the real script writes it.
    build.write_text(
        "#!/bin/sh\n"
        'while [ "$1" != --cache ]; do shift; done\n'
        f'mkdir -p "$2/kernels"; seq -f "line %g" 100 >"$2/kernels/6.12-0123456789ab.failed.log"; exit {code}\n'
    )


def test_a_kernel_line_without_patches_is_refused(project: Path) -> None:
    replace_build(project, 2)
    output = kernel(project, "6.19")
    assert "this Debian has no linux-source-6.19, so kernel-patches/build looks for it in other ones" in output
    assert "there is no source of Linux 6.19, or no patches that fit it (see above)." in output
    assert "VAGRANT_KERNEL=6.12 vagrant provision debian13" in output
    assert "line 100" not in output


def test_a_build_that_fails_shows_the_end_of_its_log(project: Path) -> None:
    replace_build(project)
    output = kernel(project).splitlines()
    assert "line 100" in output
    assert "line 50" not in output
    assert "vagrant provision debian13. The compiled files are kept" in output[-1]


def test_a_file_that_is_no_package_is_refused(project: Path) -> None:
    debs = project / "vagrant/debs"
    debs.mkdir()
    (debs / "linux-image-6.12.1-cwndtrace_6.12.1-1_amd64.deb").write_text("not a package")
    assert "is no Debian package" in kernel(project)


def test_a_package_of_another_kernel_line_is_ignored(project: Path) -> None:
    debs = project / "vagrant/debs"
    debs.mkdir()
    (debs / "linux-image-6.12.1-cwndtrace_6.12.1-1_amd64.deb").write_text("not a package")
    replace_build(project)
    assert "no linux-image-6.1.*-cwndtrace package is in vagrant/debs, so one is built" in kernel(project, "6.1")
