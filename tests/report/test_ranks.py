"""The report of many ranks says what the files of each say, once, and who is unlike the others."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from foreshock.records import SeriesRecorder, TelemetryWriter
from foreshock.report import page, report_data, write_report
from foreshock.report import rank_events as rank_events_module
from foreshock.report.curves import Curves
from foreshock.report.events import MAX_ROWS
from foreshock.report.rank_curves import MAX_LINES, MAX_RANK_CURVES, Differing, RankCurves, _Line
from foreshock.report.rank_events import RankEvents, spell_ranks
from foreshock.report.ranks import MAX_RANK_ROWS
from tests.report.runs import (
    HOSTILE,
    STRUCK_STEP,
    add_autopsy,
    add_layerwise,
    add_other_series,
    rank_folder,
    write_ranks,
    write_run,
)
from tests.report.test_page import Page, colours, contrast, drawing_in, page_of


def rows(run: Path) -> dict[str, dict[str, Any]]:
    return {row["rank"]: row for row in report_data(run)["ranks"]["rows"]}


def drawn(run: Path) -> dict[str, dict[str, Any]]:
    return {curve["name"]: curve for curve in report_data(run)["drawing"]["ranks"]}


# ---- one rank


def test_the_page_of_one_rank_is_the_same_with_and_without_what_is_for_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = add_other_series_to(write_run(tmp_path / "run", name=HOSTILE))
    monkeypatch.setattr(page, "format_utc", lambda time_ns: "now")
    before = write_report(run).read_bytes()
    assert not any(word in before for word in (b"rank-0", b"RankChart", b"told by ranks"))
    data = report_data(run)
    assert data["ranks"] is None
    assert "ranks" not in data["drawing"]
    (run / "rank_00000").mkdir()  # where snapshots of the first rank may be
    (run / "rank_1").mkdir()
    (run / "rank_00001.txt").touch()
    (run / "rank_000002").mkdir()
    monkeypatch.setattr("foreshock.report.data.Ranks", None)
    monkeypatch.setattr("foreshock.report.data.RankEvents", None)
    assert write_report(run).read_bytes() == before


def add_other_series_to(run: Path) -> Path:
    add_autopsy(run, HOSTILE)
    add_other_series(run)
    add_layerwise(run)
    return run


def test_curves_of_what_ranks_share_are_those_of_the_first(tmp_path: Path) -> None:
    run = write_ranks(tmp_path, 3)
    data = report_data(run)
    for rank in (1, 2):
        shutil.rmtree(rank_folder(run, rank))
    alone = report_data(run)
    assert data["drawing"]["curves"] == alone["drawing"]["curves"]
    assert data["numbers"] == alone["numbers"]
    assert data["facts"] == alone["facts"]


# ---- curves


def test_a_number_that_differs_has_a_line_for_each_rank_and_one_that_does_not_has_none(
    tmp_path: Path,
) -> None:
    run = write_ranks(tmp_path, 3)
    curves = drawn(run)
    assert {"alignment by rank", "largest_gradients.head.weight by rank"} <= set(curves)
    assert "train_loss by rank" not in curves
    alignment = curves["alignment by rank"]
    means = {line["rank"]: line["mean"] for line in alignment["lines"]}
    assert means == {r: [pytest.approx(mean)] * 40 for r, mean in enumerate((0.1, 0.2, 0.4))}
    ends = [alignment[key][7] for key in ("low", "mean", "high")]
    assert ends == pytest.approx([0.1, 0.2, 0.4])
    steps = report_data(run)["drawing"]["steps"]
    assert steps[alignment["steps"]] == list(range(40))


def test_of_many_ranks_there_is_a_band_and_the_one_that_is_the_farthest(tmp_path: Path) -> None:
    many = MAX_LINES + 3
    run = write_ranks(tmp_path, many, steps=10)
    for step in range(10, 20):
        for rank in range(many):
            with TelemetryWriter(rank_folder(run, rank) / "telemetry.jsonl") as writer:
                writer.write("telemetry", step, alignment=9.0 if rank == 4 else 0.1 * (rank + 1))
    alignment = drawn(run)["alignment by rank"]
    assert alignment["ranks"] == many
    assert [line["rank"] for line in alignment["lines"]] == [4]
    assert alignment["lines"][0]["mean"] == pytest.approx([0.5] * 10 + [9.0] * 10)
    assert (alignment["low"][15], alignment["high"][15]) == (pytest.approx(0.1), 9.0)
    assert alignment["mean"][0] == pytest.approx(0.6)


def test_series_of_the_ranks_are_compared_too(tmp_path: Path) -> None:
    run = write_ranks(tmp_path, 2)
    for rank in range(2):
        with SeriesRecorder(rank_folder(run, rank)) as series:
            for step in range(3):
                series.record("logits", step, mean=0.5, rms={"layers.0": 1.0 + rank})
    found = [(c["name"], c["source"]) for c in report_data(run)["drawing"]["ranks"]]
    assert ("rms.layers.0 by rank", "monitoring/logits.jsonl") in found
    assert ("mean by rank", "monitoring/logits.jsonl") not in found


def differing(*means: Sequence[float], widths: Sequence[int] = (), name: str = "x") -> Differing:
    """Of ranks with these values at steps 0, 1 and so on times their width."""
    lines = {}
    for rank, values in enumerate(means):
        width = widths[rank] if widths else 1
        steps = tuple(width * i for i in range(len(values)))
        lines[rank] = _Line(width, steps, array("d", values))
    return Differing("telemetry.jsonl", name, lines)


def test_a_rank_that_drifts_off_late_is_the_farthest_though_others_are_further_before() -> None:
    early = [[1.0, 1.1, 1.2, 1.3, 1.4]] * 40
    late = [[1.0, 1.1, 9.0, 1.3, 1.4]] * 12
    found = differing(*zip(*early, *late, strict=True))
    assert found.farthest == 2
    assert found.alone is None  # the others are not the same


def test_one_interval_does_not_decide_who_is_the_farthest() -> None:
    rows = [[1.0, 1.1, 1.2, 1.3, 1.6]] * 30 + [[1e9, 1.1, 1.2, 1.3, 1.4]]
    assert differing(*zip(*rows, strict=True)).farthest == 4


def test_a_rank_is_alone_where_all_others_are_the_same() -> None:
    rows = [[1.0, 1.0, 1.0, 1.0]] * 30 + [[1.0, 1.2, 1.0, 1.0]] * 5
    found = differing(*zip(*rows, strict=True))
    assert (found.alone, found.farthest) == (1, 1)
    hiccup = rows[:30] + rows[-2:]
    assert differing(*zip(*hiccup, strict=True)).alone is None
    taken_in_turn = [[1.0, 1.2, 1.0], [1.2, 1.0, 1.0], [1.0, 1.0, 1.2]] * 5
    assert differing(*zip(*taken_in_turn, strict=True)).alone is None


@pytest.mark.parametrize("means", [(1.0, 2.0), (1.0, 2.0, 3.0)], ids=["two", "ends"])
def test_of_two_that_are_as_far_none_is_said_to_be_off(means: Sequence[float]) -> None:
    found = differing(*([mean] * 9 for mean in means))
    assert found.has_differed
    assert (found.farthest, found.alone) == (None, None)


@pytest.mark.parametrize("ranks", [3, 8, 64])
@pytest.mark.parametrize("kind", ["noise", "shards"])
def test_ranks_that_differ_by_their_nature_are_not_called_alone(ranks: int, kind: str) -> None:
    chance = random.Random(ranks)
    sizes = [chance.lognormvariate(0, 0.7) if kind == "shards" else 1.0 for _ in range(ranks)]
    for _ in range(20):
        means = [[size * chance.gauss(1, 0.1) for _ in range(30)] for size in sizes]
        assert differing(*means).alone is None


def test_one_that_is_not_finite_is_the_farthest_and_huge_ones_do_no_harm() -> None:
    nan = math.nan
    assert differing([1.0] * 4, [1.0] * 4, [nan] * 4, [1.0] * 4).alone == 2
    of_two = differing([1.0] * 4, [nan] * 4)
    assert (of_two.alone, of_two.farthest) == (1, 1)
    assert not differing([nan] * 4, [nan] * 4).has_differed
    huge = differing([1.7e308] * 4, [1.6e308] * 4, [nan] * 4, [nan] * 4, [nan] * 4)
    json.dumps([huge.drawn([]), huge.in_numbers()], allow_nan=False)


def test_a_number_in_longer_intervals_is_compared_in_the_longest_that_are_whole() -> None:
    ramp = [float(i) for i in range(60)]
    coarse = [sum(ramp[4 * i : 4 * i + 4]) / 4 for i in range(15)]
    assert not differing(ramp, coarse, widths=(1, 4)).has_differed
    cut_short = [*coarse[:9], coarse[9] - 1]  # ends inside an interval
    assert not differing(coarse, cut_short, widths=(4, 4)).has_differed
    assert differing(coarse, [*cut_short, coarse[10]], widths=(4, 4)).has_differed


def test_lines_get_shorter_as_ranks_get_more_and_curves_are_limited() -> None:
    def curves(rank: int, names: int) -> Curves:
        made = Curves()
        for step in range(3000):
            made.add("t", step, {f"x{i}": float(rank) for i in range(names)})
        return made

    few, many = RankCurves(2), RankCurves(200)
    for taken in (few, many):
        for rank in range(2):
            taken.add(rank, curves(rank, 1))
    lengths = [len(taken.compared().numbers[0].drawn([])["mean"]) for taken in (few, many)]
    assert 256 < lengths[0] <= 512
    assert lengths[1] <= 40
    crowded = RankCurves(2)
    for rank in range(2):
        crowded.add(rank, curves(rank, MAX_RANK_CURVES + 3))
    compared = crowded.compared()
    assert (len(compared.numbers), compared.left_out) == (MAX_RANK_CURVES, 3)


# ---- events


def test_an_event_that_all_ranks_tell_of_is_shown_once_and_one_of_a_rank_with_its_rank(
    tmp_path: Path,
) -> None:
    data = report_data(write_ranks(tmp_path, 3))
    told = [(row["event"], row["ranks"], row["step"]) for row in data["actions"]["first"]]
    assert told == [("update skipped", "all", STRUCK_STEP), ("snapshot dropped", "1", STRUCK_STEP)]
    assert data["counts"] == {"snapshot_dropped": 1, "snapshot_saved": 1, "update_skipped": 1}
    marks = {lane["lane"]: lane["marks"] for lane in data["drawing"]["lanes"]}
    assert [count for _, count, _ in marks["skipped updates"]] == [1]
    ((_, count, said),) = marks["snapshots"]
    assert (count, said[:14]) == (2, "snapshot saved")  # by all, and dropped by one
    rollbacks = data["actions"]["first"][0]
    assert set(rollbacks) == {"step", "time", "event", "reasons", "offender", "sentence", "ranks"}


def event(step: int, time: int, **more: Any) -> dict[str, Any]:
    return {"event": "update_skipped", "step": step, "time": f"{time:06d}", **more}


def told(events: RankEvents) -> list[tuple[int, str]]:
    actions = events.actions()
    return [(row["step"], row["ranks"]) for row in actions["first"] + actions["last"]]


def test_rows_of_all_ranks_are_in_the_order_of_time() -> None:
    events = RankEvents()
    events.add(event(5, 50))
    events.add(event(9, 90))
    events.begin(1)
    events.add(event(7, 70))
    events.add(event(9, 91))
    events.begin(4)
    events.add(event(5, 49))
    events.add({"event": "risk_level_changed", "step": 6, "time": "3", "level": "WARNING"})
    assert told(events) == [(5, "0, 4"), (7, "1"), (9, "0, 1")]
    assert [row["ranks"] for row in events.risk_changes()["first"]] == ["4"]
    marks = {step: said for step, _, said in events.marks()[0]["marks"]}
    assert marks == {5: "update withheld", 7: "rank 1: update withheld", 9: "update withheld"}


def test_what_happened_twice_on_each_rank_is_shown_twice() -> None:
    events = RankEvents()
    for rank in range(2):
        if rank:
            events.begin(rank)
        for time in (10, 20):
            events.add(event(5, time))
    events.add(event(5, 30))
    assert told(events) == [(5, "all"), (5, "all"), (5, "1")]
    assert events.counts["update_skipped"] == 3


def test_of_many_events_of_many_ranks_the_first_and_last_are_kept_whatever_order_they_come_in() -> (
    None
):
    events = RankEvents()
    times = list(range(1500))
    random.Random(0).shuffle(times)
    for rank in range(3):
        if rank:
            events.begin(rank)
        for time in times[rank::3]:
            events.add(event(time, time))
    actions = events.actions()
    assert [row["step"] for row in actions["first"]] == list(range(MAX_ROWS // 2))
    assert [row["step"] for row in actions["last"]] == list(range(1500 - MAX_ROWS // 2, 1500))
    assert actions["left_out"] == 1500 - MAX_ROWS


def test_events_beyond_those_that_are_compared_are_not_doubled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rank_events_module, "MAX_EVENTS", 10)
    events = RankEvents()
    for rank in range(2):
        if rank:
            events.begin(rank)
        for step in range(15):
            events.add(event(step, step))
    assert events.counts["update_skipped"] == 15
    assert events.omitted == 5
    assert told(events)[9:11] == [(9, "all"), (10, "0")]


@pytest.mark.parametrize(
    ("ranks", "spelt"),
    [([3], "3"), ([0, 1], "0, 1"), ([0, 1, 2, 5, 7, 8, 9], "0 to 2, 5, 7 to 9"), ([], "")],
)
def test_ranks_are_spelt(ranks: list[int], spelt: str) -> None:
    assert spell_ranks(ranks) == spelt


def test_strange_events_do_no_harm(tmp_path: Path) -> None:
    run = write_ranks(tmp_path, 2)
    strange = [
        {"event": "straggler_seen", "step": 1, "rank": "x"},
        {"event": "straggler_seen", "step": 1, "rank": True},
        {"event": "aborted", "step": 1, "offender": {"ranks": [None, -1, 1.5, 10**400]}},
        {"event": ["a"], "reasons": 7, "offender": {"ranks": 3}, "time": 4},
        {"event": "rollback_success", "reasons": 7, "offender": {"ranks": [1]}},
        {"event": "telemetry", "step": 50, "alignment": 10**400},
    ]
    with (rank_folder(run, 1) / "telemetry.jsonl").open("a") as file:
        file.write("".join(json.dumps(record) + "\n" for record in strange))
    page_of(run)
    assert rows(run)["1"]["offender"] == 2
    assert list(rows(run)) == ["0", "1"]


# ---- the table


def test_each_rank_has_a_row_that_says_how_it_was_and_how_often_it_was_named(
    tmp_path: Path,
) -> None:
    run = write_ranks(tmp_path, 3)
    copies = {"kind": "parameter", "name": "w", "nan": 0, "inf": 0, "numel": 4, "ranks": [2]}
    for rank in range(3):
        with TelemetryWriter(rank_folder(run, rank) / "telemetry.jsonl") as writer:
            writer.write("straggler_seen", 41, rank=1, ratio=2.0 + 1e-9 * rank)
            said = {"reasons": ["REPLICAS_DIFFER"], "offender": copies}
            writer.write("rollback_success", 42, to_step=8, **said)
    found = rows(run)
    assert list(found) == ["0", "1", "2"]
    for row in found.values():
        assert (row["records"], row["last_step"], row["state"]) == (40, 39, "")
        assert row["ledger"] == "missing"
    named = {r: (row["offender"], row["slow"], row["differs"]) for r, row in found.items()}
    assert named == {"0": (0, 0, 0), "1": (1, 1, 0), "2": (0, 0, 1)}
    marks = [row["stands_out"] for row in found.values()]
    assert marks == ["", "offender; slow", "copy differs"]


def write_timed(run: Path, seconds: Sequence[float]) -> Path:
    for rank, step_seconds in enumerate(seconds):
        folder = rank_folder(run, rank)
        folder.mkdir(parents=True, exist_ok=True)
        lines = []
        for step in range(10):
            at = round(1000 * step * step_seconds)
            time = f"2026-01-01T00:{at // 60000:02d}:{at // 1000 % 60:02d}.{at % 1000:03d}Z"
            lines.append(json.dumps({"event": "telemetry", "step": step, "time": time, "c": 1.0}))
        (folder / "telemetry.jsonl").write_text("\n".join(lines) + "\n")
    return run


def test_step_times_are_compared_with_those_of_the_others(tmp_path: Path) -> None:
    found = rows(write_timed(tmp_path, [0.5, 0.6, 1.0, 0.4]))
    times = [row["step_seconds"] for row in found.values()]
    assert times == pytest.approx([0.5, 0.6, 1.0, 0.4])
    assert found["2"]["ratio"] == pytest.approx(2)
    assert found["3"]["ratio"] == pytest.approx(2 / 3)
    assert [r for r, row in found.items() if row["stands_out"]] == ["2"]
    assert found["2"]["stands_out"].startswith("long steps")


def test_a_rank_that_alone_has_another_number_stands_out(tmp_path: Path) -> None:
    run = write_ranks(tmp_path, 4)
    for rank in range(4):
        with TelemetryWriter(rank_folder(run, rank) / "telemetry.jsonl") as writer:
            for step in range(40, 60):
                writer.write("telemetry", step, spectral_kappa=11.0 if rank == 3 else 10.0)
    data = report_data(run)
    assert rows(run)["3"]["stands_out"] == "alone in spectral_kappa"
    assert data["drawing"]["ranks"][0]["name"] == "spectral_kappa by rank"  # a main one, first
    number = data["ranks"]["numbers"][0]
    assert (number["alone"], number["lowest"], number["highest"]) == (3, 10.0, 11.0)
    assert number["highest_rank"] == 3


def cut_short(run: Path) -> None:
    file = rank_folder(run, 1) / "telemetry.jsonl"
    text = file.read_text()
    file.write_text(text[: len(text) // 2])


def lose_file(run: Path) -> None:
    (rank_folder(run, 1) / "telemetry.jsonl").unlink()


def lose_folder(run: Path) -> None:
    shutil.rmtree(rank_folder(run, 1))


def keep_none(run: Path) -> None:
    lose_folder(run)
    rank_folder(run, 1).mkdir()


def make_newer(run: Path) -> None:
    file = rank_folder(run, 1) / "telemetry.jsonl"
    file.write_text('{"event": "start", "schema_version": 99}\n')


def fill_with_bytes(run: Path) -> None:
    (rank_folder(run, 1) / "telemetry.jsonl").write_bytes(bytes(range(256)) * 9)


def make_a_directory(run: Path) -> None:
    lose_file(run)
    (rank_folder(run, 1) / "telemetry.jsonl").mkdir()


Break = Callable[[Path], None]
BREAKAGES: dict[str, tuple[Break, str | None]] = {
    "1 line torn; ends before the others, which are at step 39": (
        cut_short,
        "rank_00001/telemetry.jsonl: 1 line skipped",
    ),
    "telemetry.jsonl is missing": (lose_file, "rank_00001/telemetry.jsonl is missing"),
    "nothing is there": (lose_folder, None),
    "keeps no records": (keep_none, None),
    "schema_version 99": (make_newer, "rank_00001/telemetry.jsonl is read no further: path"),
    "lines torn": (fill_with_bytes, "rank_00001/telemetry.jsonl: "),
    "is read no further": (make_a_directory, "rank_00001/telemetry.jsonl is read no further"),
}


@pytest.mark.parametrize("state", BREAKAGES)
def test_a_rank_whose_file_is_missing_or_damaged_is_listed_and_the_others_are_shown(
    tmp_path: Path, state: str
) -> None:
    run = write_ranks(tmp_path, 3)
    break_it, problem = BREAKAGES[state]
    break_it(run)
    data = report_data(run)
    found = rows(run)
    assert state in found["1"]["state"]
    assert (found["0"]["state"], found["2"]["state"]) == ("", "")
    about = [told for told in data["problems"] if told.startswith("rank_00001/")]
    assert bool(about) is (problem is not None)
    assert problem is None or problem in about[0]
    assert "alignment by rank" in drawn(run)
    assert data["actions"]["first"][0]["event"] == "update skipped"
    assert state in " ".join(page_of(run).all("main")[0][1].split())


def test_what_is_told_by_others_is_shown_though_the_first_has_lost_its_file(
    tmp_path: Path,
) -> None:
    run = write_ranks(tmp_path, 3)
    (run / "telemetry.jsonl").unlink()
    assert rows(run)["0"]["state"] == "telemetry.jsonl is missing"
    assert [row["ranks"] for row in report_data(run)["actions"]["first"]] == ["1, 2", "1"]


def test_ranks_that_lost_records_say_so(tmp_path: Path) -> None:
    run = write_ranks(tmp_path, 2)
    file = rank_folder(run, 1) / "summary.json"
    file.write_text(file.read_text().replace('"dropped_records": 0', '"dropped_records": 7'))
    problems = report_data(run)["problems"]
    assert any(p.startswith("rank_00001/summary.json: 7 telemetry records") for p in problems)


def test_ranks_between_that_are_not_there_share_a_row_and_named_ones_have_their_own(
    tmp_path: Path,
) -> None:
    run = write_ranks(tmp_path, 2)
    rank_folder(run, 99999).mkdir()
    with TelemetryWriter(run / "telemetry.jsonl") as writer:
        writer.write("straggler_seen", 41, rank=7, ratio=2.0)
    found = rows(run)
    assert list(found) == ["0", "1", "2 to 6", "7", "8 to 99998", "99999"]
    assert found["7"]["stands_out"] == "slow"
    assert found["2 to 6"]["state"] == found["7"]["state"] == "nothing is there"


def test_of_very_many_ranks_those_that_stand_out_are_among_the_rows(tmp_path: Path) -> None:
    run = write_ranks(tmp_path, 1)
    last = MAX_RANK_ROWS + 20
    for rank in range(1, last + 1):
        folder = rank_folder(run, rank)
        folder.mkdir()
        shutil.copy(run / "telemetry.jsonl", folder)
    with TelemetryWriter(run / "telemetry.jsonl") as writer:
        writer.write("straggler_seen", 41, rank=last, ratio=2.0)
    ranks = report_data(run)["ranks"]
    shown = [row["order"] for row in ranks["rows"]]
    assert shown == sorted(shown)
    assert {1, last} <= set(shown)
    assert (len(shown), ranks["left_out"]) == (MAX_RANK_ROWS, 21)


def test_autopsies_of_all_ranks_are_found_with_their_rank(tmp_path: Path) -> None:
    run = write_ranks(tmp_path, 2)
    add_autopsy(rank_folder(run, 1), "the one that knows")
    add_autopsy(run, "the first")
    add_autopsy(rank_folder(run, 5), "keeps no records")
    told = [(a["rank"], a["file"]) for a in report_data(run)["autopsies"]]
    name = f"autopsy/step_{STRUCK_STEP}.json"
    assert told == [(0, name), (1, f"rank_00001/{name}"), (5, f"rank_00005/{name}")]
    text = " ".join(page_of(run).all("main")[0][1].split())
    assert f"Step {STRUCK_STEP}, rank 1: transient" in text
    assert "nothing is wrong with the one that knows" in text
    assert rows(run)["5"]["state"] == "keeps no records"


# ---- the page


def test_the_page_of_many_ranks_says_what_the_data_say(tmp_path: Path) -> None:
    run = write_ranks(tmp_path, 3)
    found = page_of(run)
    assert drawing_in(found) == json.loads(json.dumps(report_data(run)["drawing"]))
    text = " ".join(found.all("main")[0][1].split())
    for said in ("told by ranks", "snapshot dropped: head.weight has changed", "times the others'"):
        assert said in text, said
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    links = {(attributes["href"] or "")[1:] for attributes, _ in found.all("a")}
    assert len(ids) == len(set(ids))
    assert {"ranks", "rank-curves"} <= set(ids)
    assert "ranks" in links <= set(ids)
    for table in ("What is known of each rank", "Numbers that are not the same on all ranks"):
        assert table in text


def test_columns_and_cells_are_as_many_in_every_table(tmp_path: Path) -> None:
    run = write_ranks(tmp_path, 2)
    with TelemetryWriter(rank_folder(run, 1) / "telemetry.jsonl") as writer:
        for step in range(MAX_ROWS + 9):  # more than the tables show
            writer.write("risk_level_changed", step, level="DANGER", before="STABLE", kappa=2.0)
            writer.write("anomaly_seen", step, would="skip", reasons=["LOSS_SPIKE"])
            writer.flush(5) if step % 99 == 0 else None
    text = write_report(run).read_text()
    assert text.count(" more are left out") == 2
    for table in text.split("<table>")[1:]:
        head, body = table.split("</table>")[0].split("</thead>")
        columns = head.count("<th scope")
        for row in body.split("<tr>")[1:]:
            spanned = sum(int(span) - 1 for span in re.findall('colspan="(\\d+)"', row))
            assert row.count("<td") + row.count("<th") + spanned == columns, row


def test_names_that_are_html_stay_text_in_the_page_of_many_ranks(tmp_path: Path) -> None:
    run = write_ranks(tmp_path, 2, name=HOSTILE)
    add_autopsy(rank_folder(run, 1), HOSTILE)
    with TelemetryWriter(rank_folder(run, 1) / "telemetry.jsonl") as writer:
        writer.write("straggler_seen", 41, rank=HOSTILE, ratio=HOSTILE)
    found = Page(write_report(run).read_text())
    assert not {tag for tag, _ in found.elements} & {"img", "b"}
    assert len(found.all("script")) == 2
    assert HOSTILE in found.all("main")[0][1]


def test_a_run_whose_ranks_agree_says_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    shutil.copytree(run, tmp_path / "copied")
    (tmp_path / "copied").rename(rank_folder(run, 1))
    assert "No number that more than one rank has written differs" in write_report(run).read_text()
    assert report_data(run)["drawing"]["ranks"] == []
    assert rows(run)["1"]["ledger"] == "intact"


@pytest.mark.parametrize("line", range(MAX_LINES + 1))
@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_the_lines_of_ranks_can_be_seen(line: int, theme: int) -> None:
    style = page._FOLDER / "rank_charts.css"
    known = colours(style)
    if line == MAX_LINES:
        assert len({known[f"rank-{i}"][theme] for i in range(MAX_LINES)}) == MAX_LINES
        return
    assert f".rank-{line} {{ stroke: var(--rank-{line}); }}" in style.read_text()
    assert contrast(known[f"rank-{line}"][theme], colours()["card"][theme]) >= 4.5
