"""The report: table, JSON and picture of a hand-built calibration."""

import json
from pathlib import Path

import pytest
from expecttest import assert_expected_inline as expect

from mbq_ao.calibration.report import CalibrationReport, FitReport, GroupReport

SETTINGS = {"precision": "w3a16", "group_size": 64, "recipe": "best", "loss": "mae"}


def group(block: str, linears: list[str], loss: float, r: float | None = 0.25) -> GroupReport:
    return GroupReport(
        block=block,
        producer="input_layernorm",
        linears=linears,
        fold="weight",
        alpha=0.5,
        losses=[2.0, loss],
        loss_rtn=2.0,
        loss=loss,
        sensitivity=r,
        sensitivity_raw=r,
    )


@pytest.fixture
def report() -> CalibrationReport:
    return CalibrationReport(
        settings=dict(SETTINGS),
        groups=[
            group("layers.0", ["attn.q_proj", "attn.k_proj"], 1.0),
            group("layers.0", ["mlp.up_proj"], 1.5, r=0.5),
            group("layers.1", ["attn.q_proj", "attn.k_proj"], 2.0, r=0.125),
        ],
        not_scaled=["layers.1.mlp.up_proj"],
        not_quantized=[f"layers.1.experts.{i}" for i in range(10)],
        logits_error=2e-6,
        num_linears=5,
        nbytes_before=40_000_000,
        nbytes_after=10_000_000,
        seconds=12.3,
    )


def test_table(report: CalibrationReport) -> None:
    expect(
        str(report),
        """\
block     linears        folded into      alpha      r  loss RTN  loss  gain
--------  -------------  ---------------  -----  -----  --------  ----  ----
layers.0  q_proj k_proj  input_layernorm   0.50  0.250         2     1   50%
          up_proj        input_layernorm   0.50  0.500         2   1.5   25%
layers.1  q_proj k_proj  input_layernorm   0.50  0.125         2     2    0%
5 linears: 40.0 MB -> 10.0 MB (4.0x smaller), calibrated in 12 s
search loss 25% below plain rounding on average; logits moved by 2.0e-06 (relative) through folding alone
rounded without a scale: layers.1.mlp.up_proj
not quantized: layers.1.experts.0, layers.1.experts.1, layers.1.experts.2, layers.1.experts.3, \
layers.1.experts.4, layers.1.experts.5, layers.1.experts.6, layers.1.experts.7 and 2 more""",
    )


def test_records_and_json(report: CalibrationReport, tmp_path: Path) -> None:
    text = report.to_json(tmp_path / "report.json")
    assert (tmp_path / "report.json").read_text().strip() == text
    assert json.loads(text)["groups"] == report.records()
    assert report.records()[1]["linears"] == ["mlp.up_proj"]


def test_plot(report: CalibrationReport, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="NEEDS MATPLOTLIB: the report's picture is not tested")
    figure = report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    sensitivity, gain = figure.axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in sensitivity.lines}
    assert lines["at the output of q_proj, k_proj"] == [[0, 0.25], [1, 0.125]]
    gains = {line.get_label(): line.get_xydata().tolist() for line in gain.lines}
    assert gains["q_proj, k_proj"] == [[0, 0.5], [1, 1.0]]
    assert gains["up_proj"] == [[0, 0.75]]


def test_plot_of_scales_that_make_things_worse(report: CalibrationReport) -> None:
    pytest.importorskip("matplotlib", reason="NEEDS MATPLOTLIB: the report's picture is not tested")
    report.groups[0].loss = 5.0
    _, gain = report.plot().axes
    assert gain.get_ylim()[1] > 2.5
    assert "-150%" in str(report)
    assert "search loss 42% above plain rounding on average" in report.summary()


@pytest.mark.filterwarnings("error")
def test_a_report_without_groups(report: CalibrationReport) -> None:
    report.groups = []
    assert str(report).startswith("5 linears: 40.0 MB")
    pytest.importorskip("matplotlib", reason="NEEDS MATPLOTLIB: the report's picture is not tested")
    report.plot()


def test_plot_without_balance(report: CalibrationReport) -> None:
    pytest.importorskip("matplotlib", reason="NEEDS MATPLOTLIB: the report's picture is not tested")
    for record in report.groups:
        record.sensitivity = record.sensitivity_raw = None
    (gain,) = report.plot().axes
    assert gain.get_title("left") == "What calibration leaves of the rounding error"
    assert " 0.50  -  " in str(report)


def test_fits(report: CalibrationReport, tmp_path: Path) -> None:
    """Of weights fitted to their inputs, beside groups and without."""
    down, o = FitReport("layers.0", ["mlp.down_proj"], 8.0, 2.0, None), FitReport("layers.1", ["o"], 4.0, 3.0, 0.5, 0.2)
    report.fits = [down, o]
    lines = str(report).splitlines()
    assert lines[4].split() == ["down_proj", "-", "-", "-", "8", "2", "75%"]
    assert lines[6].split() == ["o", "-", "-", "0.500", "4", "3", "25%"]
    assert "2 weights fitted to their inputs: on these their error is 50% below plain rounding's on average" in lines
    assert report.fitted == ["layers.0.mlp.down_proj", "layers.1.o"] and len(report.records()) == 5
    report.to_json(tmp_path / "report.json")
    assert CalibrationReport.from_json(tmp_path / "report.json") == report
    report.groups = []
    pytest.importorskip("matplotlib", reason="NEEDS MATPLOTLIB: the report's picture is not tested")
    _, gain = report.plot().axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in gain.lines}
    assert drawn["down_proj"] == [[0, 0.25]] and drawn["o"] == [[1, 0.75]]
