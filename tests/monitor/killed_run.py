"""Runs that are killed at random moments, over and over, and taken up again: a process of its own,
so that forks are cheap and nothing else is in it. Arguments: a directory, the number of kills, a
seed. Prints what came of it as JSON."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
import types
from pathlib import Path
from typing import Any

import torch

import foreshock as fs
from foreshock.guard import incoming_file, snapshot_file
from foreshock.guard.parts import SnapshotFolder
from tests.monitor import training as t

EPOCHS = 12


def write_slowly(descriptor: int, page: Any) -> int:
    """As for a large model: some part of a file is being written nearly all the time."""
    time.sleep(1e-4)
    return _WRITE(descriptor, page)


_WRITE = os.write


def make() -> t.Run:
    return t.make_run(
        epochs=EPOCHS,
        has_average=True,
        scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, EPOCHS * 6),
    )


def digest(run: t.Run) -> str:
    state = t.state_of(run)
    whole = hashlib.sha256()
    for path in sorted(state):
        value = state[path]
        whole.update(path.encode())
        is_tensor = isinstance(value, torch.Tensor)
        whole.update(t.bits(value) if is_tensor else repr(value).encode())
    return whole.hexdigest()


def live(folder: Path, ready: int) -> None:
    """One process's life: takes the run up, and on to its end if it is let."""
    run = make()
    guard = fs.Guard(
        mode="recover", snapshot_interval=2, clean_steps=1, persist_dir=folder / "snapshots"
    )
    with fs.Monitor(
        run.model, run.optimizer, folder / f"run-{os.getpid()}", guard, state=run.state,
        spectral_enabled=False,
    ) as monitor:  # fmt: skip
        begun = monitor.resume()
        os.write(ready, f"{-1 if begun is None else begun}\n".encode())
        t.train(run, monitor)
    (folder / "end").write_text(digest(run))


def fork(folder: Path) -> tuple[int, int]:
    """The new process, and the step that it goes on from."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            live(folder, writer)
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    with open(reader) as told:
        return pid, int(told.readline())


def is_whole(file: Path) -> bool:
    try:
        snapshot_file.check(file)
    except snapshot_file.DamagedFile:
        return False
    return True


def main(where: Path, kills: int, seed: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    incoming_file._WRITE_BYTES = 256  # type: ignore[misc]
    incoming_file.os = types.SimpleNamespace(**vars(os) | {"write": write_slowly})  # type: ignore[assignment]
    rng = random.Random(seed)
    expected = digest(t.train(make()))
    found: dict[str, Any] = {
        "kills": 0, "ends": 0, "wrong_ends": 0, "went_back": 0, "unreadable": 0, "leftovers": 0,
        "resumed": 0,
    }  # fmt: skip
    folder, before = where / "0", -1
    folder.mkdir(parents=True)
    while found["kills"] < kills or not found["ends"]:
        pid, begun = fork(folder)
        found["resumed"] += begun >= 0
        found["went_back"] += begun < before
        before = begun
        if found["kills"] < kills:
            time.sleep(rng.uniform(0, 0.25))
            os.kill(pid, signal.SIGKILL)
            found["kills"] += 1
        _, status = os.waitpid(pid, 0)
        snapshots = SnapshotFolder(folder / "snapshots")
        # Whatever has the name of a snapshot is one.
        found["unreadable"] += sum(not is_whole(snapshots.file(s)) for s in snapshots.steps())
        found["leftovers"] += len(list((folder / "snapshots").glob(".step_*")))
        if os.WIFEXITED(status):
            found["ends"] += 1
            is_right = os.WEXITSTATUS(status) == 0 and (folder / "end").read_text() == expected
            found["wrong_ends"] += not is_right
            shutil.rmtree(folder)
            folder, before = where / str(found["ends"]), -1
            folder.mkdir()
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
