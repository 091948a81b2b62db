from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

import foreshock as fs
from foreshock.settings_file import RunSettings


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return write


WHOLE = """
training:
  save_metrics: false
  save_metrics_steps: 25
foreshock:
  monitor:
    telemetry_interval: 5
    spectral_include: ["*weight"]
    spectral:
      window: 100
      thresholds: {instability: 0.01}
  guard:
    mode: recover
    violation_threshold: 1e6
    spike_z: 6
"""


def test_settings_are_typed_and_what_is_left_out_has_its_default(write):
    settings = fs.load_settings(write(WHOLE))
    assert settings.training.save_metrics is False
    assert settings.training.save_metrics_steps == 25
    monitor, guard = settings.foreshock.monitor, settings.foreshock.guard
    assert monitor.telemetry_interval == 5
    assert monitor.spectral_include == ("*weight",)
    assert monitor.spectral.thresholds.instability == 0.01
    assert monitor.spectral_interval == 50
    assert guard == fs.Guard(mode="recover", violation_threshold=1e6, spike_z=6)


def test_settings_go_into_monitor_and_guard(write, tmp_path):
    settings = fs.load_settings(write(WHOLE)).foreshock
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    out_dir = tmp_path / "run"
    with fs.Monitor(model, optimizer, out_dir, settings.guard, **dict(settings.monitor)):
        pass
    config = fs.records.read_summary(out_dir / "config.json")
    assert config["guard"]["mode"] == "recover"
    assert config["monitor"]["spectral"]["window"] == 100


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "training:\n", "foreshock:\n  guard:\n", "\ufefftraining:\n"]
)
def test_empty_file_and_empty_sections_are_all_defaults(write, text):
    assert fs.load_settings(write(text)) == RunSettings()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trainig: {}", "unknown key 'trainig'; did you mean 'training'"),
        ("training: {save_metric: true}", "training: unknown key 'save_metric'; did you mean"),
        ("foreshock: {gaurd: {}}", "foreshock: unknown key 'gaurd'; did you mean 'guard'"),
        ("foreshock: {guard: {mod: skip}}", "foreshock.guard: unknown key 'mod'; .*'mode'"),
        (
            "foreshock: {monitor: {spectral: {thresholds: {dangr: 1}}}}",
            "foreshock.monitor.spectral.thresholds: unknown key 'dangr'; did you mean 'danger'",
        ),
        ("1: 2", "unknown key 1; accepted: training, foreshock"),
    ],
)
def test_unknown_key_is_an_error_that_suggests_the_nearest(write, text, message):
    with pytest.raises(ValueError, match=message) as caught:
        fs.load_settings(write(text))
    assert "run.yaml" in str(caught.value)


@pytest.mark.parametrize("word", ["yes", "no", "on", "off", "true", "False"])
def test_bare_word_that_yaml_makes_a_boolean_of_is_no_number_and_no_text(write, word):
    for text in (
        f"training: {{save_metrics_steps: {word}}}",
        f"foreshock: {{guard: {{mode: {word}}}}}",
        f"foreshock: {{monitor: {{spectral_include: [weight, {word}]}}}}",
    ):
        with pytest.raises(ValueError, match=r"what YAML makes of a bare .*in quotes"):
            fs.load_settings(write(text))
    settings = fs.load_settings(write(f"training: {{save_metrics: {word}}}"))
    assert settings.training.save_metrics is (word in ("yes", "on", "true"))


def test_bare_date_is_no_text(write):
    text = "foreshock: {monitor: {fingerprint_reference: %s}}"
    with pytest.raises(ValueError, match="fingerprint_reference is the date 2026-01-01"):
        fs.load_settings(write(text % "2026-01-01"))
    settings = fs.load_settings(write(text % "'2026-01-01'"))
    assert settings.foreshock.monitor.fingerprint_reference == Path("2026-01-01")


def test_infinity_is_spelt_as_yaml_does(write):
    assert fs.load_settings(write("foreshock: {guard: {spike_z: .inf}}")).foreshock.guard == (
        fs.Guard(spike_z=float("inf"))
    )


@pytest.mark.parametrize("number", ["1e6", "1.0e+6", "1000000", "1_000_000.0"])
def test_number_in_any_spelling_is_a_number(write, number):
    settings = fs.load_settings(write(f"foreshock: {{guard: {{violation_threshold: {number}}}}}"))
    assert settings.foreshock.guard.violation_threshold == 1e6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {save_metrics: perhaps}", "training.save_metrics: .*boolean.*'perhaps'"),
        ("training: {save_metrics_steps: 0}", "training.save_metrics_steps: .*greater than 0.*0"),
        ("training: {save_metrics_steps: 2.5}", "save_metrics_steps: .*integer.*2.5"),
        ("training: {save_metrics_steps: }", "save_metrics_steps: .*None"),
        ("foreshock: {guard: {mode: watch}}", "foreshock.guard.mode: .*'observe'.*'watch'"),
        ("foreshock: {guard: 3}", "foreshock.guard: .*3"),
        ("foreshock: 3", "foreshock: .*it is 3"),
        ("- training", "is a list; accepted: a mapping with training, foreshock"),
        ("training: {", "is not YAML that can be read"),
        ("training: {}\n---\ntraining: {}", "is not YAML that can be read"),
        ("training: !!python/object/apply:os.getcwd []", "is not YAML that can be read"),
        ("training: {save_metrics: yes, save_metrics: no}", "save_metrics stands twice"),
        ("training: {}\nforeshock: {}\ntraining: {}\n", "training stands twice, again in line 3"),
        ("training: &a {}\nforeshock: *b\n", "is not YAML that can be read"),
    ],
)
def test_error_names_file_and_field(write, text, message):
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)) as caught:
        fs.load_settings(write(text))
    assert "run.yaml" in str(caught.value)


def test_file_that_is_not_text_is_named(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"run\.yaml"):
        fs.load_settings(path)
    with pytest.raises(FileNotFoundError):
        fs.load_settings(tmp_path / "other.yaml")
    with pytest.raises(TypeError, match="path is a int"):
        fs.load_settings(3)


def test_missing_pyyaml_is_an_error_that_names_the_extra(write, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ImportError, match=r"foreshock\[yaml\]"):
        fs.load_settings(write(WHOLE))
