"""Importing foreshock is cheap and leaves the process as it was."""

from __future__ import annotations

from tests.interpreter import NO_EXTENSION, NO_TRITON, run_python


def test_importing_takes_little_time_beyond_torch() -> None:
    """The claim is 100 ms; the guard is five times that, for a busy machine."""
    code = """
        import torch, time
        begun = time.process_time()
        import foreshock
        print(time.process_time() - begun)
        heavy = {"pydantic", "triton", "typer", "rich", "matplotlib", "foreshock.monitor"}
        assert not heavy & set(sys.modules), heavy & set(sys.modules)
    """
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.5


def test_importing_does_not_change_floating_point_mode() -> None:
    """Trap 8: code built with -ffast-math flips the whole process to flush-to-zero when loaded."""
    code = """
        import torch
        tiny = torch.tensor([1e-40], dtype=torch.float32)
        before = (tiny * 1).item(), 5e-324 * 1.0
        import foreshock, foreshock._kernels
        foreshock.ops.health_scan([torch.randn(1000)])
        assert ((tiny * 1).item(), 5e-324 * 1.0) == before and before[0] > 0 and before[1] > 0
    """
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_public_names_are_there_without_extension_and_triton() -> None:
    code = """
        import foreshock as fs
        fs.ops.health_scan, fs.ops.HealthScanner, fs.Monitor, fs.Guard, fs.Verdict, fs.Action
        fs.records.TelemetryWriter, fs.records.read_telemetry, fs.__version__
        assert set(dir(fs)) >= {"Monitor", "Guard", "ops", "records"}
        assert "torch.distributed.checkpoint" not in sys.modules  # half a second
        try:
            fs.nonsense
        except AttributeError as error:
            assert "nonsense" in str(error)
        else:
            raise SystemExit("no error")
    """
    for prelude in ((), (NO_EXTENSION,), (NO_TRITON,), (NO_EXTENSION, NO_TRITON)):
        done = run_python(code, *prelude)
        assert done.returncode == 0, done.stderr
