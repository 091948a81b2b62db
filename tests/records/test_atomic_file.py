import os
import stat
import threading

import pytest

from foreshock.records import write_atomically


@pytest.mark.parametrize(("given", "written"), [("é\n", "é\n".encode()), (b"\xff", b"\xff")])
def test_text_and_bytes_are_written_as_they_are(tmp_path, given, written):
    path = tmp_path / "missing" / "file"
    write_atomically(path, given)
    assert path.read_bytes() == written
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("failing", ["os.replace", "os.fsync", "os.fchmod"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failure_keeps_the_old_file_and_leaves_no_temporary(tmp_path, monkeypatch, failing, error):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(*_):
        raise error

    monkeypatch.setattr(failing, fail)
    with pytest.raises(type(error)):
        write_atomically(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_contents_are_synced_before_the_rename_and_the_directory_after(tmp_path, monkeypatch):
    steps = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor):
        steps.append("directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def recorded_replace(source, target):
        steps.append("rename")
        assert os.path.getsize(source) == 3
        assert os.path.dirname(source) == os.path.dirname(target)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    write_atomically(tmp_path / "file", "new")
    assert steps == ["file", "rename", "directory"]


def test_reader_sees_the_old_contents_or_the_new_never_a_mixture(tmp_path):
    path = tmp_path / "file"
    versions = [b"a" * 300_000, b"b" * 300_000]
    path.write_bytes(versions[0])
    seen = set()
    is_done = threading.Event()

    def read():
        while not is_done.is_set():
            seen.add(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(40):
        write_atomically(path, versions[number % 2])
    is_done.set()
    reader.join()
    assert seen <= set(versions)


def test_permissions_of_an_existing_file_are_kept(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(0o640)
    write_atomically(path, "new")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_new_file_has_the_permissions_the_user_mask_leaves(tmp_path):
    (tmp_path / "ordinary").write_text("")
    write_atomically(tmp_path / "atomic", "")
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_symbolic_link_is_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "elsewhere" / "file"
    target.write_text("old")
    link = tmp_path / "link"
    link.symlink_to(target)
    write_atomically(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"


@pytest.mark.parametrize(
    ("path", "contents", "error", "message"),
    [
        ("file", 3, TypeError, "text_or_bytes must be str or bytes, not int"),
        ("", "", ValueError, "path must name a file, it is empty"),
        (3, "", TypeError, "path must be str or os.PathLike"),
        (b"file", "", TypeError, "path must be str or os.PathLike"),
        (".", "", IsADirectoryError, "path must name a file, it is a directory"),
    ],
)
def test_bad_arguments_are_named(tmp_path, monkeypatch, path, contents, error, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        write_atomically(path, contents)
    assert os.listdir(tmp_path) == []
