import json

import pytest

from foreshock.records.line_file import LineFile


def test_lines_are_appended_to_what_is_there(tmp_path):
    path = tmp_path / "missing" / "directories" / "lines"
    for line in (b"one", b"two"):
        file = LineFile(path)
        file.append(line)
        file.close()
    assert path.read_bytes() == b"one\ntwo\n"


def test_each_line_is_one_write(tmp_path, monkeypatch):
    file = LineFile(tmp_path / "lines")
    writes = []
    # Nothing reaches the file here: what counts is what is handed over at once.
    monkeypatch.setattr(
        "foreshock.records.line_file.os.write", lambda fd, data: writes.append(data) or len(data)
    )
    file.append(b"x" * 10_000)
    file.append(b"y")
    monkeypatch.undo()
    file.close()
    assert writes == [b"x" * 10_000 + b"\n", b"y\n"]


@pytest.mark.parametrize("tail", [b"torn", b"\x00\x00"])
def test_line_after_a_torn_one_is_whole(tmp_path, tail):
    path = tmp_path / "lines"
    path.write_bytes(b"whole\n" + tail)
    file = LineFile(path)
    file.append(b"next")
    file.close()
    assert path.read_bytes() == b"whole\n" + tail + b"\nnext\n"


FILL_THE_DISK = """
import resource
from pathlib import Path
from foreshock.records.line_file import LineFile

# A write that crosses the limit is cut short, and the next one fails: as on a full disk.
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
file = LineFile(Path(sys.argv[1]))
failed = 0
for number in range(20):
    if number == 15:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    try:
        file.append(b'{"number": %d, "text": "%s"}' % (number, b"x" * 100))
    except OSError:
        failed += 1
file.close()
print(failed)
"""


def test_full_disk_tears_one_line_and_later_lines_are_whole(tmp_path, run_python):
    path = tmp_path / "lines"
    failed = int(run_python(FILL_THE_DISK, path))
    assert failed > 1
    # The torn line starts like a whole one, and ends before its closing brace.
    whole = [line for line in path.read_bytes().splitlines() if line.endswith(b"}")]
    assert len(path.read_bytes().splitlines()) == len(whole) + 1
    assert [json.loads(line)["number"] for line in whole] == [*range(15 - failed), *range(15, 20)]
