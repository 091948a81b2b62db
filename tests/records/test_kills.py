"""kill -9 at random moments of a process that writes all the files of a run."""

import json

KILL = """
import dataclasses, itertools, json, os, pathlib, random, shutil, signal, time
from foreshock.records import (
    Ledger, MetricsRecorder, TelemetryWriter, read_autopsy, read_ledger, read_metrics,
    read_summary, read_telemetry, verify, write_autopsy, write_summary,
)

KILLS, KILLS_A_RUN, BATCH = 100, 10, 20

@dataclasses.dataclass
class Found:
    step: int
    filling: list

def live(run, step, row, pipe):
    # Writes what a monitor writes, and reports what is durable.
    def report(what, step):
        os.write(pipe, f"{what} {step}\\n".encode())

    ledger = Ledger(run / "ledger.jsonl")
    writer = TelemetryWriter(run / "telemetry.jsonl", ledger=ledger)
    recorder = MetricsRecorder(run, "m", save_interval=3)
    rows = itertools.count(row)
    report("ready", step)
    while True:
        for step in range(step, step + BATCH):
            writer.write("telemetry", step, loss=step / 3, text="x" * 200)
            at = next(rows)
            recorder.record(at, 0, at / 3, 1e-3, **{f"metric_{at // 50}": float("nan")})
        report("saved", row + recorder.saved_records)
        writer.write("rollback_success", step, to_step=step - 5)
        writer.write_to_ledger("forget", scope={"step": step}, filling=[*range(500)])
        step += 1
        if writer.flush():
            report("flushed", step)
        write_summary(run / "summary.json", {
            "total_steps": step, "ledger_head": ledger.head, "filling": [*range(500)]
        })
        report("summary", step)
        write_autopsy(run, 0, "it failed", Found(step, [*range(500)]))
        report("autopsy", step)

def check(run, durable, kills):
    telemetry = read_telemetry(run / "telemetry.jsonl")
    steps = {r["step"]: r for r in telemetry.records if r["event"] == "telemetry"}
    assert steps.keys() >= set(range(durable["flushed"])), "telemetry"
    assert all(r["loss"] == step / 3 for step, r in steps.items())
    assert telemetry.torn_lines <= kills
    told = {r["step"] + 1 for r in telemetry.records if r["event"] == "rollback_success"}
    in_ledger = {r["scope"]["step"] + 1 for r in read_ledger(run / "ledger.jsonl")
                 if r["event"] == "forget"}
    assert durable["flushed"] in {0, *told} & {0, *in_ledger}, "events"
    head = None
    if durable["summary"] or (run / "summary.json").exists():
        summary = read_summary(run / "summary.json")
        assert summary["total_steps"] >= durable["summary"], "summary"
        assert summary["filling"] == [*range(500)]
        head = summary["ledger_head"]
    found = verify(run / "ledger.jsonl", head=head)
    assert found, found.problem
    if durable["autopsy"]:
        autopsy = read_autopsy(run, 0)
        assert autopsy["step"] >= durable["autopsy"], "autopsy"
        assert autopsy["filling"] == [*range(500)]
    for name in ("csv", "json"):  # the array comes first, and the table is made anew from it
        metrics = read_metrics(run / "metrics" / f"training_metrics.{name}")
        rows = [record["step"] for record in metrics.records]
        assert rows == [*range(len(rows))], name
        assert len(rows) >= durable["saved"], name
        assert metrics.torn_lines <= 1
    return max(steps, default=-1) + 1, len(rows), telemetry.torn_lines

moments, where = random.Random(int(sys.argv[2])), pathlib.Path(sys.argv[1])
counted = dict.fromkeys(("torn", "set_aside", "left_over", "flushed", "summary", "saved"), 0)
for number in range(KILLS):
    kills = number % KILLS_A_RUN + 1
    if kills == 1:
        run, step, row = where / str(number), 0, 0
        run.mkdir()
        durable = dict.fromkeys(("flushed", "saved", "summary", "autopsy"), 0)
    reader, pipe = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        live(run, step, row, pipe)
    os.close(pipe)
    with open(reader) as told:
        # In some place of what it does over and over, however slow the machine is.
        lines = [told.readline() for _ in range(moments.randrange(1, 10))]
        time.sleep(moments.uniform(0, 0.01))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), status
        for line in (*lines, *told):
            what, number_of = line.split()
            durable[what] = int(number_of)
    step, row, torn = check(run, durable, kills)
    if kills == KILLS_A_RUN:
        counted["torn"] += torn
        counted["set_aside"] += len([*run.glob("*.torn-*")])
        counted["left_over"] += len([*run.rglob(".foreshock-*.tmp")])
        for what in ("flushed", "summary", "saved"):
            counted[what] += durable[what]
        shutil.rmtree(run)
print(json.dumps(counted))
"""


def test_killed_at_100_random_moments_every_file_is_readable_and_nothing_durable_is_missing(
    tmp_path, start_python
):
    with start_python(KILL, tmp_path, 0) as process:
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    counted = json.loads(output)
    assert min(counted["flushed"], counted["summary"], counted["saved"]) > 100
    assert counted["left_over"] > 0  # or no kill has come while a file was being written
