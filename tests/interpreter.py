"""Runs code in an interpreter of its own, where imports and the environment start afresh."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

NO_EXTENSION = "sys.modules['foreshock._kernels'] = None"
NO_TRITON = "sys.modules['triton'] = None"


def run_python(code: str, *prelude: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs code after some lines of prelude, with the given switches of foreshock and no others."""
    lines = ["import sys", *prelude, textwrap.dedent(code)]
    kept = {k: v for k, v in os.environ.items() if not k.startswith("FORESHOCK_")}
    return subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        capture_output=True,
        text=True,
        env=kept | env,
        timeout=300,
        check=False,
    )
