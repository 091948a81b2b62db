"""The place of this room in the house: floor 0, without torch, without other rooms."""

import ast
import sys
from pathlib import Path

import foreshock.records

ROOM = Path(foreshock.records.__file__).parent


def imported_modules(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield node.module


# Imported when a key or a picture is asked for, and not before.
OPTIONAL = {
    "curves_canvas.py": "matplotlib",
    "curves_figure.py": "matplotlib",
    "curves_panel.py": "matplotlib",
    "series_picture.py": "matplotlib",
    "ledger_signature.py": "cryptography",
    "ledger_seals.py": "cryptography",
}


def test_records_import_the_standard_library_and_themselves_only():
    files = list(ROOM.rglob("*.py"))
    assert files
    for file in files:
        for module in imported_modules(file):
            is_own = module.startswith("foreshock.records")
            package = module.split(".")[0]
            is_optional = package == OPTIONAL.get(file.name)
            assert is_own or is_optional or package in sys.stdlib_module_names, (file, module)


def test_records_work_without_the_rest_of_the_package_and_without_torch(tmp_path, run_python):
    script = """
from foreshock.records import Ledger, TelemetryWriter, read_telemetry, verify, write_summary
with TelemetryWriter(sys.argv[1] + "/telemetry.jsonl") as writer:
    writer.write("telemetry", 1, loss=0.5)
write_summary(sys.argv[1] + "/summary.json", {})
with Ledger(sys.argv[1] + "/ledger.jsonl", hmac_key=bytes(16)) as ledger:
    ledger.append("forget")
assert verify(sys.argv[1] + "/ledger.jsonl", hmac_key=bytes(16))
assert not {"torch", "cryptography"} & sys.modules.keys()
print(len(read_telemetry(sys.argv[1] + "/telemetry.jsonl").records))
"""
    assert run_python(script, tmp_path) == "2\n"
