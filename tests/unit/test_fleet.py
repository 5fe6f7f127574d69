# SPDX-License-Identifier: Apache-2.0
"""Captures of a fleet are found, brought here and kept, whatever others put in their place. No cluster is needed."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pandas as pd
import pyarrow as pa
import pytest

import cwndtrace
from cwndtrace.cli import main
from cwndtrace.errors import CaptureError, CwndtraceError, NotFound
from cwndtrace.fleet import dataset, engine, names, places, unpack
from cwndtrace.fleet.dataset import Dataset
from cwndtrace.fleet.extract import MOST_ROWS, extract, failed
from cwndtrace.fleet.places import Located
from cwndtrace.fleet.work import analysed
from cwndtrace.trace import Trace, load
from tests.unit import frames


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    return frames.two_idle_connections(tmp_path_factory.mktemp("fleet") / "a.cwnd", host="web1")


@pytest.fixture(scope="module")
def made(trace: Trace) -> Path:
    """A capture that tests copy or pack."""
    return trace.path


@pytest.fixture(autouse=True)
def analysed_once(trace: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take that capture as it is loaded already; others, such as its copies, are read."""
    monkeypatch.setattr(
        "cwndtrace.fleet.extract.load", lambda path, **limits: trace if path == trace.path else load(path, **limits)
    )


def pack(capture: Path, target: Path, name: str = "a.cwnd", mode: str = "w") -> Path:
    """Write a tar file of a capture."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(target, mode) as archive:  # type: ignore[call-overload]
        archive.add(capture, name)
    return target


def zstd(capture: Path, target: Path) -> Path:
    with pa.CompressedOutputStream(str(target), "zstd") as stream:
        stream.write(pack(capture, target.with_suffix(".plain")).read_bytes())
    return target


def named(found: list[Located]) -> list[tuple[str, str]]:
    return [(each.name, each.host) for each in found]


# ---- where captures are -----------------------------------------------------------------------------


def test_captures_are_found_at_any_depth(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "host=web%2F1" / "2026" / "a.cwnd")
    shutil.copytree(made, tmp_path / "b" / "no suffix")
    shutil.copytree(made, tmp_path / ".hidden" / "c.cwnd")
    (tmp_path / "empty.cwnd").mkdir()
    (tmp_path / "notes.txt").write_text("no capture")
    pack(made, tmp_path / "host=web2" / "d.cwnd.tar.gz", mode="w:gz")
    found = places.find([str(tmp_path)])
    assert named(found) == [
        ("b/no suffix", ""),
        ("empty.cwnd", ""),
        ("host=web%2F1/2026/a.cwnd", "web/1"),
        ("host=web2/d.cwnd.tar.gz", "web2"),
    ]
    assert [each.packed for each in found] == [False, False, False, True]
    assert named(places.find([str(tmp_path / "host=*")])) == named(found[2:])
    assert named(places.find([str(tmp_path / "host=web2" / "d.cwnd.tar.gz")])) == [("d.cwnd.tar.gz", "web2")]
    assert named(places.find([str(tmp_path / "b" / "no suffix")])) == [("no suffix", "")]


@pytest.mark.parametrize(
    ("path", "host"),
    [
        ("host=a/b.cwnd", "a"), ("x/host=a/y/host=b/z.cwnd", "b"), ("host=a.cwnd", ""), ("b.cwnd", ""),
        ("host=a%2F..%2Fb/c.cwnd", "a/../b"), ("host%3Da/b.cwnd", "a"), ("host%3Da%252Fb/c.cwnd", "a/b"),
    ],
)  # fmt: skip
def test_a_folder_names_the_host(path: str, host: str) -> None:
    assert names.host(path) == host


def test_links_in_a_place_lead_nowhere(made: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    outside = tmp_path / "outside" / "a.cwnd"
    shutil.copytree(made, outside)
    (place / "folder").symlink_to(outside.parent)
    (place / "a.cwnd").symlink_to(outside)
    (place / "b.cwnd.tar").symlink_to(pack(made, tmp_path / "outside" / "b.cwnd.tar"))
    for where in (place, place / "*", place / "folder" / "*", place / "**"):
        if where.name == "*" and where.parent.name == "folder":
            continue  # the user named that folder
        with pytest.raises(NotFound, match="no capture"):
            places.find([str(where)])
    for scheme in ("file", "local"):
        with pytest.raises(NotFound, match="no capture"):
            places.find([f"{scheme}://{place}"])
    (tmp_path / "mine").symlink_to(outside.parent)
    assert named(places.find([str(tmp_path / "mine")])) == [("a.cwnd", ""), ("b.cwnd.tar", "")]


def test_a_folder_that_cannot_be_listed_is_a_row_and_one_that_is_gone_is_none(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(made, tmp_path / "open" / "a.cwnd")
    (tmp_path / "closed").mkdir()
    (tmp_path / "gone").mkdir()
    scandir, lstat = os.scandir, Path.lstat

    def closed(path: Path | int) -> Any:
        # The garbage collector may remove a temporary folder of another test meanwhile, by its descriptor.
        if not isinstance(path, int) and Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    def gone(path: Path) -> os.stat_result:
        if path.name == "gone":
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return lstat(path)

    monkeypatch.setattr(os, "scandir", closed)
    monkeypatch.setattr(Path, "lstat", gone)
    found = places.find([str(tmp_path)])
    assert [(each.name, bool(each.stamp)) for each in found] == [("closed", False), ("open/a.cwnd", True)]
    assert analysed(found[0], MOST_ROWS, None).captures["status"].tolist() == ["failed"]


def test_what_makes_no_sense_as_a_place_is_refused(made: Path, tmp_path: Path) -> None:
    for name in ("x", "y"):
        shutil.copytree(made, tmp_path / name / "a.cwnd")
    with pytest.raises(CwndtraceError, match="would have the same name"):
        places.find([str(tmp_path / "x"), str(tmp_path / "y")])
    assert len(places.find([str(tmp_path / "x"), str(tmp_path / "x")])) == 1
    with pytest.raises(NotFound, match="there is no"):
        places.find([str(tmp_path / "z")])
    with pytest.raises(CwndtraceError, match=r"nosuch://|can't be listed"):
        places.find(["nosuch://bucket"])


@pytest.mark.slow
def test_no_two_captures_have_one_name_in_the_result(
    trace: Trace, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cwndtrace.fleet.extract.load", lambda *_, **__: trace)
    odd = ["a?.cwnd", "a\x1b.cwnd", "a\x07.cwnd", os.fsdecode(b"a\xff.cwnd"), "/".join(["n" * 200] * 6) + "/b.cwnd"]
    for name in (*odd, odd[-1].replace("b.cwnd", "c.cwnd")):
        shutil.copytree(made, tmp_path / "place" / name)
    found = places.find([str(tmp_path / "place")])
    result = Dataset.create(tmp_path / "r", resume=False)
    for each in found:
        result.put(dataset.pack(analysed(each, MOST_ROWS, None)), each.stamp)
    rows = result.read("captures")
    assert len(rows) == len(set(rows["capture"])) == 6
    assert rows["capture"].str.len().max() <= 1000
    assert rows["capture"].map(str.isprintable).all()
    assert "a?.cwnd" in set(rows["capture"])
    # --resume knows them all again.
    assert {key: stamp for key, (_, stamp) in result.known().items()} == {
        names.file(each.name): each.stamp for each in found
    }


def test_too_many_files_are_refused(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        shutil.copytree(made, tmp_path / str(number) / "a.cwnd")
    monkeypatch.setattr(places, "MOST_FILES", 4)
    with pytest.raises(CwndtraceError, match="more than 4 files"):
        places.find([str(tmp_path)])


def test_the_stamp_is_that_of_the_files_and_the_version(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shutil.copytree(made, tmp_path / "a.cwnd")
    stamps = {places.find([str(tmp_path)])[0].stamp}
    assert {places.find([str(tmp_path)])[0].stamp} == stamps
    part = next(path.glob("*/*.parquet"))
    os.utime(part, (1, 1))
    stamps.add(places.find([str(tmp_path)])[0].stamp)
    part.unlink()
    stamps.add(places.find([str(tmp_path)])[0].stamp)
    monkeypatch.setattr(cwndtrace, "__version__", "9")
    stamps.add(places.find([str(tmp_path)])[0].stamp)
    assert len(stamps) == 4


def test_a_capture_of_many_files_takes_little_memory_to_find(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shutil.copytree(made, tmp_path / "a.cwnd")
    monkeypatch.setattr(places, "_MOST_OF_CAPTURE", 7)
    for number in range(20):
        (path / "cwnd_reset" / f"{number}.parquet").touch()
    assert len(places._files(path, iter(range(100)))) == 7
    assert len(places.find([str(tmp_path)])) == 1


@pytest.fixture
def far() -> Iterator[Any]:
    """fsspec's file system in memory."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


def upload(fs: Any, folder: Path, target: str) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            fs.pipe(f"{target}/{file.relative_to(folder)}", file.read_bytes())


@pytest.mark.slow
def test_captures_elsewhere_are_found_and_downloaded(made: Path, tmp_path: Path, far: Any) -> None:
    upload(far, made, "/bucket/host=web9/x/a.cwnd")
    upload(far, made, "/bucket/b/no suffix")
    upload(far, made, "/bucket/.hidden/c.cwnd")
    far.pipe("/bucket/c.cwnd.tar", pack(made, tmp_path / "c.cwnd.tar").read_bytes())
    far.pipe("/bucket/empty.cwnd/notes.txt", b"")
    far.pipe("/other/a.cwnd/meta.json", b"{}")
    found = places.find(["memory://bucket"])
    assert named(found) == [("b/no suffix", ""), ("c.cwnd.tar", ""), ("empty.cwnd", ""), ("host=web9/x/a.cwnd", "web9")]
    rows = [analysed(each, MOST_ROWS, str(tmp_path)).captures.iloc[0] for each in found]
    assert [row["status"] for row in rows] == ["ok", "ok", "failed", "ok"]
    assert rows[2]["reason"].startswith("empty.cwnd isn't a capture")
    assert [row["host"] for row in rows] == ["web1", "web1", "unknown", "web9"]
    assert named(places.find(["memory://bucket/host=*"])) == [("host=web9/x/a.cwnd", "web9")]
    assert named(places.find(["memory://bucket/c.cwnd.tar"])) == [("c.cwnd.tar", "")]
    assert named(places.find(["memory://bucket/host=web9/x/a.cwnd"])) == [("a.cwnd", "web9")]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("cwndtrace-")]


def test_a_listing_without_times_leaves_open_whether_a_capture_changed(
    made: Path, tmp_path: Path, far: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(far, made, "/bucket/a.cwnd")
    far.pipe("/bucket/b.cwnd.tar", pack(made, tmp_path / "b.cwnd.tar").read_bytes())
    assert all(each.stamp for each in places.find(["memory://bucket"]))
    listed = far.find("/bucket", detail=True)
    # As web servers list files.
    bare = {path: {"name": path, "size": None, "type": "file"} for path in listed}
    monkeypatch.setattr(type(far), "find", lambda *_, **__: bare)
    found = places.find(["memory://bucket"])
    assert [(each.name, each.stamp) for each in found] == [("a.cwnd", ""), ("b.cwnd.tar", "")]
    result = Dataset.create(tmp_path / "r", resume=False)
    for each in found:
        result.put(dataset.pack(extract(made, "", each.name)), each.stamp)
    monkeypatch.setattr(engine, "_own", lambda workers, _: contextlib.nullcontext(workers))
    again: list[list[Located]] = []

    def noted(_: Any, left: list[Located], *__: Any) -> list[Any]:
        again.append(left)
        return []

    monkeypatch.setattr(engine, "_outcomes", noted)
    assert (engine.run(found, result, resume=True), again) == (2, [found])


def test_a_name_elsewhere_is_never_taken_for_a_url(made: Path, tmp_path: Path, far: Any) -> None:
    secret = pack(made, tmp_path / "secret.cwnd.tar")
    far.pipe(f"/bucket/x::file://{secret}", b"no archive")
    far.pipe("/bucket/a.cwnd/meta.json", b"{}")
    far.pipe("/bucket/a.cwnd/cwnd_reset/../../../escaped.parquet", b"x")
    for each in places.find(["memory://bucket"]):
        assert analysed(each, MOST_ROWS, str(tmp_path)).captures["status"].tolist() == ["failed"]
    assert not list(tmp_path.rglob("escaped*"))


def test_a_download_that_is_too_large_is_refused(made: Path, tmp_path: Path, far: Any) -> None:
    upload(far, made, "/bucket/a.cwnd")
    (found,) = places.find(["memory://bucket"])
    with pytest.raises(ValueError, match="takes more than"), unpack.opened(found, tmp_path, 1000):
        pass
    assert list(tmp_path.iterdir()) == []


# ---- packed captures --------------------------------------------------------------------------------


def packed(path: Path) -> Located:
    return Located(str(path), path.name, "", True, "")


@pytest.mark.quick(1)
@pytest.mark.parametrize("end", [".cwnd.tar", ".cwnd.tar.gz", ".cwnd.tgz", ".cwnd.tar.zst"])
def test_a_packed_capture_has_the_same_figures(made: Path, tmp_path: Path, end: str) -> None:
    target = tmp_path / f"a{end}"
    zstd(made, target) if end.endswith("zst") else pack(made, target, mode="w:gz" if "gz" in end else "w")
    target.with_suffix(".plain").unlink(missing_ok=True)
    got, wanted = analysed(packed(target), MOST_ROWS, str(tmp_path)), extract(made, "", target.name)
    for name, frame in wanted.named().items():
        # tar files have whole seconds.
        times = ["modified", "ahead_s"] if name == "captures" else []
        pd.testing.assert_frame_equal(got.named()[name].drop(columns=times), frame.drop(columns=times))
    assert abs(got.captures["ahead_s"][0] - wanted.captures["ahead_s"][0]) <= 1
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def member(name: str, content: bytes = b"", **about: Any) -> Callable[[tarfile.TarFile], None]:
    def add(archive: tarfile.TarFile) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        for key, value in about.items():
            setattr(info, key, value)
        archive.addfile(info, io.BytesIO(content))

    return add


HOSTILE: dict[str, tuple[Callable[[tarfile.TarFile], None], str]] = {
    "a name that leads out": (member("a.cwnd/../../escaped", b"x"), "leads out"),
    "an absolute name": (member("/tmp/escaped", b"x"), "leads out"),
    "a deep name": (member("a/b/c/d/e/f", b"x"), "leads out"),
    "a long name": (member(f"a.cwnd/{'n' * 300}", b"x"), "too long"),
    "a header of 3 MB": (member("a.cwnd/x", b"", pax_headers={"comment": "c" * 3_000_000}), "header"),
    "a symbolic link": (member("a.cwnd/x", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "a link"),
    "a hard link": (member("a.cwnd/x", type=tarfile.LNKTYPE, linkname="/etc/passwd"), "a link"),
    "a device": (member("a.cwnd/x", type=tarfile.CHRTYPE, devmajor=1, devminor=3), "a link"),
    "a pipe": (member("a.cwnd/x", type=tarfile.FIFOTYPE), "a link"),
    "the same name twice": (member("a.cwnd/meta.json", b"{}"), "File exists"),
    "a file as a folder": (member("a.cwnd/meta.json/x", b"{}"), "can't be read"),
    "another capture": (member("b.cwnd/meta.json", b"{}"), "holds 2 captures"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_is_a_row_with_its_reason(made: Path, tmp_path: Path, name: str) -> None:
    add, reason = HOSTILE[name]
    target = tmp_path / "place" / "a.cwnd.tar"
    target.parent.mkdir()
    with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as archive:
        archive.add(made, "a.cwnd")
        add(archive)
    found = analysed(packed(target), MOST_ROWS, str(tmp_path))
    row = found.captures.iloc[0]
    assert (row["status"], reason in row["reason"]) == ("failed", True), row["reason"]
    assert str(tmp_path) not in row["reason"]
    assert found.connections.empty
    assert [path.name for path in tmp_path.iterdir()] == ["place"]
    assert not Path("/tmp/escaped").exists()


def test_bombs_stay_within_the_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = tmp_path / "a.cwnd.tar.gz"
    with gzip.open(bomb, "wb", compresslevel=1) as stream:
        for _ in range(64):
            stream.write(bytes(1 << 20))
    with pytest.raises(ValueError, match="takes more than"), unpack.opened(packed(bomb), tmp_path, 1 << 24):
        pass
    many = tmp_path / "b.cwnd.tar"
    with tarfile.open(many, "w") as archive:
        for number in range(30):
            member(f"a.cwnd/{number}")(archive)
    monkeypatch.setattr(unpack, "_MOST_MEMBERS", 20)
    with pytest.raises(ValueError, match="more than 20 files"), unpack.opened(packed(many), tmp_path):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.cwnd.tar.gz", "b.cwnd.tar"]


def test_headers_without_an_end_are_refused(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = pack(made, tmp_path / "a.cwnd.tar")
    monkeypatch.setattr(unpack, "_MOST_READS", 5)
    with pytest.raises(ValueError, match="without an end"), unpack.opened(packed(target), tmp_path):
        pass


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("end", [".cwnd.tar", ".cwnd.tar.gz", ".cwnd.tar.zst"])
def test_a_cut_archive_is_a_row(made: Path, tmp_path: Path, end: str, share: float) -> None:
    target = tmp_path / f"a{end}"
    zstd(made, target) if end.endswith("zst") else pack(made, target, mode="w:gz" if "gz" in end else "w")
    target.write_bytes(target.read_bytes()[: int(target.stat().st_size * share)])
    row = analysed(packed(target), MOST_ROWS, str(tmp_path)).captures.iloc[0]
    assert row["status"] == "failed"
    assert row["reason"].isprintable()


def test_a_packed_capture_beside_its_folder_counts_once(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "a.cwnd")
    pack(made, tmp_path / "a.cwnd.tar")
    assert named(places.find([str(tmp_path)])) == [("a.cwnd", "")]
    shutil.rmtree(tmp_path / "a.cwnd")
    assert named(places.find([str(tmp_path)])) == [("a.cwnd.tar", "")]


def test_a_bug_is_a_row_too(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*_: Any, **__: Any) -> None:
        raise TypeError("a bug\x1b[2J")

    monkeypatch.setattr("cwndtrace.fleet.work.extract", bug)
    reason = analysed(Located(str(made), "a", "", False, ""), MOST_ROWS, None).captures["reason"][0]
    assert "TypeError: a bug" in reason
    assert "report this line" in reason
    assert reason.isprintable()


def test_no_password_of_a_url_gets_into_the_result(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("https://me:secret@127.0.0.1/a.cwnd/meta.json")

    monkeypatch.setattr("cwndtrace.fleet.work.extract", gone)
    reason = analysed(Located(str(made), "a", "", False, ""), MOST_ROWS, None).captures["reason"][0]
    assert "FileNotFoundError: https://127.0.0.1/a.cwnd/meta.json" in reason
    assert "secret" not in reason


# ---- the result -------------------------------------------------------------------------------------


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    "host", ["..", "../../x", "a/b", "\0", "é" * 64, "x" * 300, "host=x", ".", "%2F", "\x1b[31m", "a b"]
)
def test_no_host_leads_out_of_the_result(made: Path, tmp_path: Path, host: str) -> None:
    result = Dataset.create(tmp_path / "r", resume=False)
    found = extract(made, host, "x")
    result.put(dataset.pack(found), "stamp")
    folders = [path for path in tmp_path.rglob("*") if path.is_dir() and path.name.startswith("host=")]
    assert {path.parent.parent for path in folders} == {tmp_path / "r"}
    assert {path.name for path in folders} == {names.folder(found.captures["host"][0])}
    assert len(list((tmp_path / "r").rglob("*.parquet"))) == len(list(tmp_path.rglob("*.parquet"))) == 5
    for name, frame in found.named().items():
        pd.testing.assert_frame_equal(result.read(name), frame)


def test_a_capture_takes_the_place_of_what_is_there_of_it(made: Path, tmp_path: Path) -> None:
    result = Dataset.create(tmp_path / "r", resume=False)
    result.put(dataset.pack(extract(made, "web1", "x")), "1")
    result.put(dataset.pack(extract(made, "web1", "y")), "1")
    assert result.known() == {names.file("x"): ("ok", "1"), names.file("y"): ("ok", "1")}
    result.put(dataset.pack(failed("web2", "x", CaptureError("It is gone.", "Copy it."))), "2")
    assert result.known() == {names.file("x"): ("failed", "2"), names.file("y"): ("ok", "1")}
    assert result.read("captures")[["host", "capture"]].to_numpy().tolist() == [["web1", "y"], ["web2", "x"]]
    assert set(result.read("connections")["capture"]) == {"y"}
    again = Dataset.create(tmp_path / "r", resume=True)
    pd.testing.assert_frame_equal(again.read("captures"), result.read("captures"))
    with pytest.raises(CwndtraceError, match="isn't empty"):
        Dataset.create(tmp_path / "r", resume=False)


@pytest.mark.parametrize("place", ["captures", "connections/host=web1"])
def test_a_result_with_a_link_in_it_is_not_gone_on_with(tmp_path: Path, place: str) -> None:
    """Files below a link would be written and removed wherever it leads to."""
    elsewhere, link = tmp_path / "elsewhere", tmp_path / "r" / place
    elsewhere.mkdir()
    link.parent.mkdir(parents=True)
    link.symlink_to(elsewhere)
    with pytest.raises(CwndtraceError, match="is a link"):
        Dataset.create(tmp_path / "r", resume=True)


def test_a_result_of_another_user_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "captures").mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(CwndtraceError, match="belongs to another user"):
        Dataset.create(tmp_path, resume=True)


def test_the_folders_of_hosts_are_listed_once_for_a_whole_run(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Dataset.create(tmp_path / "r", resume=False).put(dataset.pack(extract(made, "web1", "x")), "1")
    listed, glob = [], Path.glob

    def noted(self: Path, pattern: str) -> Iterator[Path]:
        listed.append(self.name)
        return glob(self, pattern)

    result = Dataset.create(tmp_path / "r", resume=True)
    monkeypatch.setattr(Path, "glob", noted)
    for host, name in (("web2", "x"), ("web3", "y"), ("web4", "z"), ("web1", "z")):
        result.put(dataset.pack(extract(made, host, name)), "2")
    assert sorted(listed) == ["captures", "connections", "devices", "settings", "workloads"]
    monkeypatch.undo()
    assert result.read("captures")[["host", "capture"]].to_numpy().tolist() == [
        ["web1", "z"],
        ["web2", "x"],
        ["web3", "y"],
    ]


def test_a_half_written_capture_is_not_in_the_result(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = Dataset.create(tmp_path / "r", resume=False)
    result.put(dataset.pack(extract(made, "", "x")), "1")
    write = Dataset._write

    def fail(self: Dataset, folder: Path, name: str, raw: bytes) -> None:
        if folder.parent.name == "captures":
            raise OSError(28, "No space left on device")
        write(self, folder, name, raw)

    monkeypatch.setattr(Dataset, "_write", fail)
    with pytest.raises(CwndtraceError, match="r can't be written: No space left on device"):
        result.put(dataset.pack(extract(made, "", "x")), "2")
    assert result.known() == {}
    assert all(result.read(name).empty for name in ("captures", "connections"))
    monkeypatch.undo()
    # What was left of it doesn't come back with the same capture, which has no connection now.
    again = Dataset.create(tmp_path / "r", resume=True)
    again.put(dataset.pack(failed("web1", "x", CaptureError("It is gone.", "Copy it."))), "3")
    assert again.read("captures")["status"].tolist() == ["failed"]
    assert [path.parent.parent.name for path in (tmp_path / "r").rglob("*.parquet")] == ["captures"]


def test_a_damaged_result_is_refused_and_computed_again(made: Path, tmp_path: Path) -> None:
    result = Dataset.create(tmp_path / "r", resume=False)
    result.put(dataset.pack(extract(made, "", "x")), "1")
    next((tmp_path / "r" / "connections").rglob("*.parquet")).write_bytes(b"PAR1")
    with pytest.raises(CaptureError, match="can't be read"):
        result.read("connections")
    next((tmp_path / "r" / "captures").rglob("*.parquet")).write_bytes(b"")
    assert result.known() == {}


def test_a_result_is_opened_lazily_and_reported(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = Dataset.create(tmp_path / "r", resume=False)
    found = extract(made, "", "x")
    result.put(dataset.pack(found), "1")
    result.put(dataset.pack(failed("web2", "y\x1b", CaptureError("It is gone.", "Copy it."))), "2")
    opened = cwndtrace.fleet(tmp_path / "r")
    assert not {"captures", "connections"} & set(vars(opened))
    pd.testing.assert_frame_equal(opened.connections, found.connections)
    assert opened.connections is opened.connections
    assert {name: len(frame) for name, frame in opened.frames().named().items()} == {
        "captures": 2, "connections": 2, "workloads": 1, "devices": 2, "settings": 1
    }  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        main(["fleet", "report", str(tmp_path / "r")])
    out = capsys.readouterr().out
    assert ended.value.code == 0
    assert "It is gone. Copy it." in out
    assert "\x1b" not in out


def test_a_place_with_a_folder_named_captures_is_no_result(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "captures" / "host=web1" / "a.cwnd")
    assert not Dataset.is_one(tmp_path)
    assert named(places.find([str(tmp_path)])) == [("captures/host=web1/a.cwnd", "web1")]


def test_no_result_is_computed_from_a_result(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Dataset.create(tmp_path / "r", resume=False).put(dataset.pack(extract(made, "", "x")), "1")
    with pytest.raises(SystemExit) as ended:
        main(["fleet", "report", str(tmp_path / "r"), "-o", str(tmp_path / "other")])
    assert ended.value.code == 2
    assert "r is a result, and has no captures" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_the_commands_options_reach_the_report(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = Dataset.create(tmp_path / "r", resume=False)
    result.put(dataset.pack(extract(made, "", "x")), "1")
    options = [
        "--json",
        "--by",
        "peer",
        "--prefix",
        "8",
        "--since",
        "2026-11-19T00:00:00",
        "--html",
        str(tmp_path / "p"),
    ]
    with pytest.raises(SystemExit) as ended:
        main(["fleet", "report", str(tmp_path / "r"), *options])
    found = json.loads(capsys.readouterr().out)
    assert ended.value.code == 0
    assert (found["grouped_by"], found["by_peer"][0]["peer"]) == ("peer", "10.0.0.0/8")
    assert (found["since"], found["captures"][0]["side"]) == ("2026-11-19T00:00:00+00:00", "before")
    assert "<h2>Before and after</h2>" in (tmp_path / "p").read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--resume"], "-o DIR"),
        (["--workers", "2", "--scheduler", "tcp://127.0.0.1:1"], "has its own"),
        (["--scheduler", "10.0.0.1"], "is no address of a scheduler"),
        (["--scheduler", "tcp://127.0.0.1:1/x"], "is no address of a scheduler"),
        (["--since", "yesterday"], "--since"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    made: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["fleet", "report", str(made), *arguments])
    assert ended.value.code == 2
    assert says in capsys.readouterr().err


def test_missing_packages_are_named_with_their_cure(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # noqa: ARG005
    with pytest.raises(SystemExit) as ended:
        main(["fleet", "report", str(made)])
    assert ended.value.code == 1
    assert "cwndtrace[fleet]" in capsys.readouterr().err
