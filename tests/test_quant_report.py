"""The report of a quantized model: text, JSON, a page; predicted speed, and layers that stay whole for it."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import tessel
from tessel.cli import main
from tessel.errors import TesselError
from tessel.quant.formats import FORMATS, integers
from tessel.quant.report import LayerReport, QuantReport
from tessel.quant.scheme import scheme
from tessel.quant.speed import multiplied_as, packed_kernels, seconds
from tessel.solve import problem_of
from tessel.targets import get_target
from tessel.tiles.lower import lower

BF16 = torch.bfloat16


class Page(HTMLParser):
    """Tags that are open and closed, and how often each begins."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.count: dict[str, int] = {}
        self.text = ""
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        assert not any(k in ("src", "href") for k, _ in attrs), "the page needs something from elsewhere"
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


class Named(nn.Module):
    """A layer with channels that stick out, one that no data reaches, one whose name is HTML."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.idle = nn.Linear(256, 128), nn.Linear(128, 128), nn.Linear(48, 256)
        self.add_module("<b>bold</b>", nn.Linear(128, 256))
        self.first.weight.data[:, 5] *= 40

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.get_submodule("<b>bold</b>")(self.second(self.first(x)))


@pytest.fixture(scope="module")
def report() -> QuantReport:
    torch.manual_seed(0)
    model = Named()
    data = [torch.randn(50, 256)]
    small = tessel.quantize(model, None, data, budget="8bits", method="gptq", shards=2)
    return small.quantization  # type: ignore[return-value]


def test_text(report: QuantReport) -> None:
    said = str(report)
    assert "8bits by gptq" in said and "5: x" in said and "budget 8bits: " in said and "could not have" in said
    assert "the calibration data never reaches it" in said or report.bits.choices["idle"] == "whole"


def test_json_is_plain_and_complete(report: QuantReport) -> None:
    said = json.loads(report.to_json())
    assert said["format"] == 1 and said["before"] == report.before and said["after"] == report.after
    rows = [LayerReport.from_dict(x) for x in said["layers"]]
    assert [r.name for r in rows] == [x.name for x in report.layers]
    assert rows[0].kurtosis == pytest.approx(report.layers[0].kurtosis) and rows[0].outliers[0][0] == 5
    assert said["bits"]["choices"] == report.bits.choices and len(said["bits"]["frontier"]) > 5
    assert "Infinity" not in report.to_json() and "NaN" not in report.to_json()


def test_the_page_shows_every_layer_and_escapes_names(report: QuantReport) -> None:
    page = Page(report.to_html())
    assert "<b>bold</b>" in page.text
    assert "<b>bold" not in report.to_html()
    layers, points = len(report.layers), len(report.bits.frontier)
    assert page.count["rect"] == 3 * layers, "a bar for SQNR, two for bytes"
    assert page.count["circle"] == points + 1 and page.count["svg"] == 3
    assert page.count["tr"] >= layers + len(report.whole) + 2


def test_kurtosis_tells_outliers() -> None:
    g = torch.Generator().manual_seed(0)
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(2)))
    for layer in model:
        layer.weight.data = torch.randn(256, 256, generator=g)
    model[1].weight.data[::16, ::16] *= 30
    rows = tessel.quantize(model, "w4a16-g64").quantization.layers
    assert rows[0].kurtosis == pytest.approx(3.0, abs=0.1) and rows[1].kurtosis > 20
    assert rows[0].sqnr == pytest.approx(rows[0].expected, abs=0.3) and rows[1].sqnr < rows[1].expected - 1


# ---------------------------------------------------------------- predicted speed


@pytest.mark.parametrize("target", ["a100", "h100", "b200", "mi300x"])
def test_decoding_is_bound_by_bytes(target: str) -> None:
    """One row: fewer bits save no more time than bytes. On an H100 they do save some; where unpacking takes longer than
    bytes do, the prediction says that, and layers stay whole."""
    device = get_target(target)
    whole, eight, four = (seconds(8192, 8192, 1, BF16, f, device) for f in (None, integers(8), integers(4, 128)))
    assert whole / eight < 2.0 and whole / four < 16 / 4.25
    if target == "h100":
        assert whole > 1.5 * max(eight, four)


def test_many_rows_are_bound_by_products() -> None:
    """4096 rows: unpacking costs time and saves none."""
    device = get_target("h100")
    assert seconds(8192, 8192, 4096, BF16, integers(4, 128), device) > seconds(8192, 8192, 4096, BF16, None, device)


def test_words_count_with_their_share() -> None:
    """Eight codes of a word and 128 of a scale: half a byte and a thirty-second of four for one element."""
    (node,) = packed_kernels(1024, 1024, 64, BF16, integers(4, 128))
    problem = problem_of(lower(node), get_target("h100"))
    assert problem.b_bytes == pytest.approx(0.5 + 4 / 128) and problem.b_ops >= 4 and problem.a_ops == 0
    assert problem.a_bytes == 2


def test_a_layer_that_would_be_slower_stays_whole() -> None:
    model = nn.Sequential(nn.Linear(4096, 4096, bias=False, dtype=BF16))
    fast = tessel.quantize(model, "w4a16", target="h100", rows=1)
    slow = tessel.quantize(model, "w4a16", target="h100", rows=4096)
    (row,) = fast.quantization.layers
    assert row.speed.after < row.speed.before and "predicted on h100, 1 rows" in str(fast.quantization)
    (whole,) = slow.quantization.whole
    assert type(slow[0]) is nn.Linear and slow.quantization.before == slow.quantization.after
    assert "left whole: 4096 rows are predicted to take" in whole.how and "on h100" in whole.how
    assert Page(fast.quantization.to_html()).count["rect"] == 5


@pytest.mark.parametrize("name", ["e4m3-row", "mxfp4", "nf4", "nvfp4"])
def test_tables_are_priced_too(name: str) -> None:
    assert 0 < seconds(4096, 4096, 16, BF16, FORMATS[name], get_target("h100")) < 1e-2


def test_targets_without_a_model_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TESSEL_CACHE_DIR", str(tmp_path))
    model = nn.Sequential(nn.Linear(64, 64))
    for target, words in (
        ("cpu", "tessel targets --show cpu"),
        ("triton-interpret", "has no time model"),
        ("h10", "h100"),
    ):
        seconds.cache_clear()
        with pytest.raises(TesselError, match=words):
            tessel.quantize(model, "w8a16", target=target)


def test_what_rounded_inputs_are_multiplied_as() -> None:
    small, whole = "inputs are rounded to float8 and multiplied as bfloat16", "inputs are rounded to int8"
    for name, target, words in (
        ("fp8", "h100", f"{small}: no kernel multiplies small floats, which h100 could"),
        ("mxfp8", "a100", f"{small}: no kernel multiplies small floats"),
        ("w8a8", "h100", f"{whole} and multiplied as bfloat16 on h100: no kernel for GPUs multiplies integers"),
        ("w8a8", None, ""),
    ):
        inputs = scheme(name).activation
        assert inputs is not None
        said = multiplied_as(inputs, BF16, None if target is None else get_target(target))
        assert said.startswith(words) and bool(said) == bool(words), said
    report = tessel.quantize(nn.Sequential(nn.Linear(64, 32, dtype=BF16)), "nvfp4").quantization
    words = "inputs are rounded to float4 and multiplied as bfloat16: no kernel multiplies small floats"
    assert report.inputs == words and words in str(report) and words in Page(report.to_html()).text
    assert not tessel.quantize(nn.Sequential(nn.Linear(128, 32)), "w4a16").quantization.inputs


# ---------------------------------------------------------------- the command


def test_the_command_writes_both(tmp_path: Path) -> None:
    source = tmp_path / "mine.py"
    source.write_text(
        "import torch\nfrom torch import nn\n"
        "def make():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 64)), (torch.randn(4, 128),)\n"
    )
    out, html, text = tmp_path / "out", tmp_path / "report.html", tmp_path / "report.json"
    args = ["quantize", f"{source}:make", "--budget", "5bits", "--out", str(out), "--html", str(html)]
    done = CliRunner().invoke(main, [*args, "--json", str(text), "--measure", "--scheme", "w4a16"])
    assert done.exit_code == 0, done.output
    said = json.loads(text.read_text())
    assert said["measured"]["before_ms"] > 0 and said["measured"]["sqnr"] > 10
    assert set(said["bits"]["choices"].values()) <= {
        f"w{b}-{g}" for b in (4, 8) for g in ("g32", "g64", "g128", "channel")
    }
    assert "measured on cpu: " in done.output and Page(html.read_text()).count["svg"] >= 2
    back = tessel.quant.files.load_quantized(nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 64)), out)
    x = torch.randn(3, 128)
    assert back(x).shape == (3, 64) and math.isfinite(float(back(x).sum()))
    for more, words in (
        (["--widths", "4,x"], "expected whole numbers"),
        (["--budget", "1bits"], "bits a weight is the least"),
        (["--target", "h10"], "did you mean"),
    ):
        bad = CliRunner().invoke(main, [*args, *more])
        assert bad.exit_code == 2 and words in bad.output, bad.output
    neither = CliRunner().invoke(main, ["quantize", f"{source}:make"])
    assert neither.exit_code == 2 and "name a scheme" in neither.output
