"""Metrics of processes that are killed, forked, starved of disk, or run for a million steps."""

import json

import pytest

from foreshock.records import read_metrics
from foreshock.records.strict_json import load_json

KILL_TWENTY_TIMES = """
import json, os, random, signal, time
from foreshock.records import MetricsRecorder, read_metrics

def record_for_ever(folder, first, report):
    recorder = MetricsRecorder(folder, "m", save_interval=3)
    os.write(report, b"0\\n")
    step = first
    while True:
        recorder.record(step, 0, step / 3, 1e-3, **{f"metric_{step // 500 % 20}": float("nan")})
        step += 1
        if recorder.saved_records:
            os.write(report, b"%d\\n" % (first + recorder.saved_records))

folder = sys.argv[1]
moments = random.Random(0)
num_reported = num_torn = 0
for kill in range(20):
    first = len(read_metrics(folder + "/metrics/training_metrics.json").records) if kill else 0
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        record_for_ever(folder, first, writer)
    os.close(writer)
    assert os.read(reader, 2) == b"0\\n"
    time.sleep(moments.uniform(0, 0.05))
    os.kill(child, signal.SIGKILL)
    reported = b""
    while block := os.read(reader, 65536):
        reported += block
    os.waitpid(child, 0)
    os.close(reader)
    lines = reported.split(b"\\n")[:-1]
    num_reported = int(lines[-1]) if lines else num_reported
    for name in ("training_metrics.json", "training_metrics.csv"):
        found = read_metrics(folder + "/metrics/" + name)
        steps = [record["step"] for record in found.records]
        assert steps == list(range(len(steps))), name
        assert len(steps) >= num_reported, (name, len(steps), num_reported)
        assert all(record["loss"] == record["step"] / 3 for record in found.records)
        assert found.torn_lines <= 1
        num_torn += found.torn_lines
MetricsRecorder(folder, "m").close()
print(json.dumps([num_reported, len(found.records)]))
"""


def test_kills_at_twenty_moments_leave_readable_files_that_miss_nothing_reported(
    tmp_path, start_python
):
    with start_python(KILL_TWENTY_TIMES, tmp_path) as process:
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    num_reported, num_found = json.loads(output)
    assert num_found >= num_reported > 20
    array = load_json((tmp_path / "metrics" / "training_metrics.json").read_bytes())
    assert len(array) >= num_found  # mended: strict JSON again


STARVE = """
import resource
from foreshock.records import MetricsRecorder
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
recorder = MetricsRecorder(sys.argv[1], "m")
for step in range(1000):
    recorder.record(step, 0, 1.0, 1e-3)
assert recorder.poc_report({"a": ["x" * 200] * 200}, {}, {}) is None
print(recorder.saved_records, recorder.dropped_records)
recorder.close()
"""


def test_disk_that_takes_only_a_part_of_a_write_leaves_whole_files(tmp_path, run_python):
    saved, dropped = map(int, run_python(STARVE, tmp_path).split())
    assert saved > 0
    assert saved + dropped == 1000
    folder = tmp_path / "metrics"
    assert len(load_json((folder / "training_metrics.json").read_bytes())) >= saved
    for name in ("training_metrics.json", "training_metrics.csv"):
        found = read_metrics(folder / name)
        assert found.torn_lines == 0
        assert len(found.records) >= saved
    assert not [*tmp_path.rglob("*.tmp")]


def test_what_waits_is_written_when_the_interpreter_exits(tmp_path, run_python):
    script = """
from foreshock.records import MetricsRecorder
recorder = MetricsRecorder(sys.argv[1], "m", save_interval=1000)
for step in range(7):
    recorder.record(step, 0, 1.0, 1e-3)
"""
    run_python(script, tmp_path)
    assert len(read_metrics(tmp_path / "metrics" / "training_metrics.json").records) == 7


FORK = """
import os, logging, threading
from foreshock.records import MetricsRecorder
logging.disable()
recorder = MetricsRecorder(sys.argv[1], "m", save_interval=1000)
for step in range(5):
    recorder.record(step, 0, 1.0, 1e-3)

# At the moment of the fork another thread holds the lock, and will not be copied.
is_held, may_release = threading.Event(), threading.Event()
def hold():
    with recorder._lock:
        is_held.set()
        may_release.wait()
holder = threading.Thread(target=hold)
holder.start()
is_held.wait()
child = os.fork()
if child == 0:
    recorder.record(99, 0, 1.0, 1e-3)
    assert recorder.dropped_records == 1
    recorder.save()
    recorder.close()
    sys.exit(0)  # an ordinary exit, with all its exit handlers
may_release.set()
holder.join()
_, status = os.waitpid(child, 0)
assert status == 0, status
recorder.record(5, 0, 1.0, 1e-3)
recorder.close()
"""


def test_forked_child_neither_hangs_nor_writes(tmp_path, run_python):
    run_python(FORK, tmp_path)
    for name in ("training_metrics.json", "training_metrics.csv"):
        records = read_metrics(tmp_path / "metrics" / name).records
        assert [record["step"] for record in records] == [*range(6)]


MILLION = """
import json, resource, statistics, time
from foreshock.records import MetricsRecorder

def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

recorder = MetricsRecorder(sys.argv[1], "m", save_interval=100)
before, chunks = peak_mb(), []
for chunk in range(200):
    begun = time.process_time()
    for step in range(5000 * chunk, 5000 * (chunk + 1)):
        recorder.record(step, 0, 1.0, 1e-3)
    chunks.append((time.process_time() - begun) / 5000)
    recorder.record(5000 * (chunk + 1) - 1, 0, 1.0, 1e-3, accuracy=chunk / 200)
added_mb = peak_mb() - before
begun = time.process_time()
picture = recorder.plot()
picture_s = time.process_time() - begun
recorder.close()
print(json.dumps({
    "added_mb": added_mb,
    "growth": statistics.median(chunks[-20:]) / statistics.median(chunks[:20]),
    "picture_s": picture_s,
    "is_drawn": picture is not None,
    "saved": recorder.saved_records,
    "count": recorder.summary()["loss"]["count"],
}))
"""


@pytest.mark.slow
def test_million_records_grow_neither_memory_nor_cost_and_are_drawn_in_seconds(
    tmp_path, start_python
):
    with start_python(MILLION, tmp_path) as process:
        output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    found = json.loads(output)
    assert found["saved"] == found["count"] == 1_000_200
    assert found["added_mb"] < 50
    assert found["growth"] < 3
    assert found["is_drawn"]
    assert found["picture_s"] < 5
