import logging
import math
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from foreshock.records import MetricsRecorder, curves_figure
from foreshock.records.curves_figure import panel_of


def texts_in_figure(recorder, monkeypatch):
    """All texts of the picture, seen where it is filled."""
    found = []
    fill = curves_figure._fill

    def fill_and_look(figure, *arguments):
        import matplotlib.text

        fill(figure, *arguments)
        found.extend(text.get_text() for text in figure.findobj(matplotlib.text.Text))

    monkeypatch.setattr(curves_figure, "_fill", fill_and_look)
    assert recorder.plot() is not None
    return found


def test_picture_is_a_png_and_an_svg(tmp_path):
    with MetricsRecorder(tmp_path, "m") as recorder:
        for step in range(100):
            recorder.record(step, 0, 1 / (1 + step), 1e-3, accuracy=step / 100, perplexity=2.0)
        path = recorder.plot()
    assert path == tmp_path / "plots" / "training_curves.png"
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    root = ElementTree.parse(path.with_suffix(".svg")).getroot()
    assert root.tag.endswith("svg")


def test_panel_without_data_says_so(tmp_path, monkeypatch):
    with MetricsRecorder(tmp_path, "m") as recorder:
        recorder.record(0, 0, 1.0, 1e-3)
        texts = texts_in_figure(recorder, monkeypatch)
    assert {"no accuracy was recorded", "no perplexity was recorded"} <= {*texts}
    assert "no loss was recorded" not in texts
    assert {"Loss", "Learning rate", "Accuracy", "Perplexity"} <= {*texts}


def test_run_without_records_has_a_picture_that_says_so(tmp_path, monkeypatch):
    with MetricsRecorder(tmp_path, "m") as recorder:
        texts = texts_in_figure(recorder, monkeypatch)
    assert sum(text.startswith("no ") for text in texts) == 4


def test_loss_stands_with_its_parts_and_nonfinite_steps_are_marked(tmp_path, monkeypatch):
    with MetricsRecorder(tmp_path, "m") as recorder:
        for step in range(10):
            loss = math.nan if step == 5 else 1.0
            recorder.record(step, 0, loss, 1e-3, pet_loss=0.5, so8t_loss=0.25)
        texts = texts_in_figure(recorder, monkeypatch)
    assert {"loss", "pet_loss", "so8t_loss", "NaN or infinite"} <= {*texts}


@pytest.mark.parametrize(
    ("metric", "title"),
    [
        ("loss", "Loss"),
        ("pet_loss", "Loss"),
        ("learning_rate", "Learning rate"),
        ("validation_accuracy", "Accuracy"),
        ("perplexity", "Perplexity"),
        ("gloss", None),
        ("loss_scale", None),
        ("grad_norm", None),
    ],
)
def test_panel_follows_from_the_name(metric, title):
    panel = panel_of(metric)
    assert (panel and panel.title) == title


@pytest.mark.parametrize(
    "values",
    [
        [math.nan] * 3,
        [math.inf, 1.0, -math.inf],
        [0.0, 0.0, 0.0],
        [1.7e308, -1.7e308, 1.7e308],
        [5e-324, 1e300, 1.0],
        [-5.0, 3.0, 1e6],
    ],
    ids=str,
)
def test_whatever_the_numbers_are_there_is_a_picture_and_no_warning(tmp_path, caplog, values):
    with MetricsRecorder(tmp_path, "m") as recorder:
        for step, value in enumerate(values):
            recorder.record(step, 0, value, value, accuracy=value, perplexity=value)
        assert recorder.plot() is not None
    assert not caplog.records


@pytest.mark.parametrize("name", ["$x^$", "\N{CJK UNIFIED IDEOGRAPH-4E00} -- \x00 <&>", "x" * 300])
def test_whatever_the_model_is_called_there_is_a_picture_and_no_warning(tmp_path, caplog, name):
    with MetricsRecorder(tmp_path, name) as recorder:
        recorder.record(0, 0, 1.0, 1e-3, **{"$_{_loss": 1.0, "_loss": 2.0, "\x00_loss": 3.0})
        path = recorder.plot()
    ElementTree.parse(path.with_suffix(".svg"))
    assert not caplog.records


def test_steps_run_again_after_a_rollback_are_drawn(tmp_path):
    with MetricsRecorder(tmp_path, "m") as recorder:
        for step in [*range(50), *range(30, 60)]:
            recorder.record(step, 0, 1.0, 1e-3)
        assert recorder.plot() is not None


def test_back_end_of_a_notebook_is_left_alone(tmp_path, run_python):
    script = """
from foreshock.records import MetricsRecorder
with MetricsRecorder(sys.argv[1], "m") as recorder:
    recorder.record(0, 0, 1.0, 1e-3)
    assert "matplotlib" not in sys.modules
    assert recorder.plot()
assert "matplotlib.pyplot" not in sys.modules
"""
    run_python(script, tmp_path)


def test_missing_matplotlib_is_one_warning_that_names_the_extra(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with MetricsRecorder(tmp_path, "m") as recorder:
        recorder.record(0, 0, 1.0, 1e-3)
        assert recorder.plot() is None
        assert recorder.plot() is None
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "foreshock[plots]" in caplog.text
    assert recorder.dropped_records == 0
