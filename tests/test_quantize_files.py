"""Quantized models written and read; files that are wrong; the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import tessel
from tessel.cli import main
from tessel.errors import TesselError
from tessel.quant.files import load_quantized, save_quantized
from tessel.quant.linear import QuantLinear, pack

files = pytest.importorskip("safetensors.torch")


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 32, bias=False)
        self.lm_head = nn.Linear(32, 7)
        self.register_buffer("shift", torch.arange(32.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.down(self.up(x).relu()) + self.shift)


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16-g32", "w4a16-g32-asym", "w8a8", "w4a16-channel"])
def test_what_is_written_is_read(scheme: str, tmp_path: Path) -> None:
    model = Two()
    small = tessel.quantize(model, scheme)
    save_quantized(small, tmp_path / "a")
    with torch.device("meta"):
        empty = Two()
    back = load_quantized(empty, tmp_path / "a")
    x = torch.randn(5, 64)
    assert torch.equal(back(x), small(x))
    assert isinstance(back.down, QuantLinear) and type(back.lm_head) is nn.Linear
    held = files.load_file(tmp_path / "a" / "model.safetensors")
    per = 8 if "w4" in scheme else 4
    assert held["up.weight_packed"].shape == (96, 64 // per) and held["up.weight_packed"].dtype == torch.int32
    assert held["up.weight_shape"].tolist() == [96, 64] and "up.bias" in held and "up.weight" not in held
    assert ("up.weight_zero_point" in held) == ("asym" in scheme)


def test_the_layout_is_that_of_others(tmp_path: Path) -> None:
    """A file written by the layout's definition: codes counted from the middle, eight a word, lowest bits first."""
    model = nn.Sequential(nn.Linear(16, 2, bias=False))
    codes = torch.randint(-8, 8, (2, 16))
    scale = torch.rand(2, 2, dtype=torch.bfloat16)
    words = torch.zeros(2, 2, dtype=torch.int64)
    for k in range(16):
        words[:, k // 8] |= (codes[:, k] + 8) << (4 * (k % 8))
    packed = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    tensors = {"0.weight_packed": packed, "0.weight_scale": scale, "0.weight_shape": torch.tensor([2, 16])}
    files.save_file(tensors, tmp_path / "model.safetensors")
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 8}
    said = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    said["config_groups"] = {"group_0": {"targets": ["Linear"], "weights": weights}}  # type: ignore[assignment]
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": said}))
    back = load_quantized(model, tmp_path)
    want = codes.float() * scale.float().repeat_interleave(8, 1)
    assert torch.equal(back[0].weight, want)


def _drop(key: str) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda tensors, said: tensors.pop(key)


def _say(**more: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda tensors, said: said.update(more)


def _put(key: str, value: torch.Tensor) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda tensors, said: tensors.update({key: value})


def _in_group(**more: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda tensors, said: said["config_groups"]["group_0"].update(more)


def _whole(name: str) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    """A layer that is said to be quantized, and is not."""

    def change(tensors: dict[str, Any], said: dict[str, Any]) -> None:
        n, k = tensors[f"{name}.weight_shape"].tolist()
        for part in ("packed", "scale", "shape"):
            del tensors[f"{name}.weight_{part}"]
        tensors[f"{name}.weight"] = torch.ones(n, k)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_drop("up.weight_scale"), "up has no weight_scale"),
        (_drop("up.weight_packed"), "up has no weight_packed"),
        (_drop("up.bias"), "missing: up.bias"),
        (_put("other.weight_scale", torch.ones(1, 1)), "the model has no layer other"),
        (_put("extra", torch.ones(1)), "not in the model: extra"),
        (_put("up.weight_scale", torch.ones(96, 5)), r"scales \(96, 5\) of 96 x 64"),
        (_put("up.weight_scale", torch.full((96, 2), torch.nan)), "NaN or infinite"),
        (_put("up.weight_shape", torch.tensor([96, 60])), "96 x 60 in the file"),
        (_say(format="marlin-24"), "format 'marlin-24'"),
        (_say(quant_method="gptq"), "method 'gptq'"),
        (_say(config_groups={}), "say nothing of"),
        (_say(version="1.0"), r"version .1\.0. of the layout"),
        (_say(version=2), "version 2 of the layout"),
        (_put("up.weight_zero_point", torch.ones(12, 2, dtype=torch.int32)), "symmetric and has a weight_zero_point"),
        (_put("up.weight_g_idx", torch.arange(64)), "up: weight_g_idx does not put 64 channels in 2 equal groups"),
        (_put("up.weight_g_idx", torch.arange(64) / 32), "weight_g_idx does not put 64 channels in 2 equal groups"),
        (_put("up.input_scale", torch.ones(1)), "not in the model: up.input_scale"),
        (_put("up.weight", torch.ones(96, 64)), "not in the model: up.weight"),
        (_put("up.weight_shape", torch.tensor([96])), "a weight_shape of 1 numbers"),
        (_put("up.weight_scale", torch.ones(96, 1)), "1 scales a row of 64 values, in groups of 32 as it says"),
        (_whole("up"), "up is whole in the file, which says that it is not"),
        (_say(config_groups=[]), r"config_groups is \[\]"),
        (_say(config_groups={"group_0": {"targets": ["Linear"]}}), "weights None in config_groups"),
        (_in_group(input_activations={"num_bits": 8, "dynamic": False}), "integers a token, dynamic, can be read"),
        (_in_group(weights={"num_bits": 4, "symmetric": False}), "asymmetric and has no weight_zero_point"),
        (_in_group(weights={"num_bits": 3}), r"weights \{'num_bits': 3\}"),
    ],
)
def test_files_that_do_not_fit(change: Any, words: str, tmp_path: Path) -> None:
    save_quantized(tessel.quantize(Two(), "w4a16-g32"), tmp_path)
    tensors = files.load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    change(tensors, config["quantization_config"])
    files.save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(TesselError, match=words):
        load_quantized(Two(), tmp_path)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(TesselError, match="holds no quantized model"):
        load_quantized(Two(), tmp_path)
    save_quantized(tessel.quantize(Two(), "w8a16"), tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TesselError, match="cannot be read"):
        load_quantized(Two(), tmp_path)


@pytest.mark.parametrize(("scheme", "method"), [("nf4", "rtn"), ("w3a16-g32", "rtn"), ("w4a16-g32", "hadamard")])
def test_what_the_layout_has_no_words_for(scheme: str, method: str, tmp_path: Path) -> None:
    with pytest.raises(TesselError, match="no words in the compressed-tensors layout"):
        save_quantized(tessel.quantize(Two(), scheme, method=method, skip=("lm_head", "down")), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_the_command(tmp_path: Path) -> None:
    source = tmp_path / "mine.py"
    source.write_text(
        "import torch\nfrom torch import nn\n"
        "def make():\n    return nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8)), (torch.randn(4, 64),)\n"
        "def data():\n    for _ in range(3):\n        yield torch.randn(16, 64)\n"
        "def one():\n    return {'input': torch.ones(4, 64)}\n"
        "def nothing():\n    return iter(())\n"
        "def nan():\n    return [torch.full((4, 64), float('nan'))]\n"
        "def spoilt():\n    model, args = make()\n    model[1].weight.data[2, 3] = torch.inf\n    return model, args\n"
    )
    out = tmp_path / "out"
    args = ["quantize", f"{source}:make", "--scheme", "w4a16-g32", "--method", "gptq", "--out", str(out)]
    done = CliRunner().invoke(main, [*args, "--calibration", f"{source}:data"])
    assert done.exit_code == 0, done.output
    assert "w4a16-g32 by gptq" in done.output and (out / "config.json").is_file()
    model = load_quantized(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8)), out)
    assert isinstance(model[0], QuantLinear)
    for more, words in (
        (["--calibration", f"{source}:none"], "no function 'none'"),
        (["--calibration", f"{source}:one"], "gives a dict; a list of calls"),
        (["--calibration", f"{source}:nothing"], "the calibration data is an empty list"),
        (["--calibration", f"{source}:nan"], "NaN or infinite inputs"),
        (["--scheme", "w9"], "unknown scheme"),
    ):
        bad = CliRunner().invoke(main, [*args, *more, "--work", str(tmp_path / "work")])
        assert bad.exit_code == 2 and words in " ".join(bad.output.split()), bad.output
    spoilt = CliRunner().invoke(main, ["quantize", f"{source}:spoilt", "--scheme", "w8a16"])
    assert spoilt.exit_code == 2 and "quantize: 1: quantize: 1 of 256 values are NaN or infinite" in spoilt.output


def test_zero_points_lie_along_rows() -> None:
    zeros = torch.randint(0, 16, (5, 3))
    packed = pack(zeros.t(), 4).t()
    assert packed.shape == (1, 3) and int(packed[0, 0]) & 15 == int(zeros[0, 0])


def test_zero_points_of_another_shape(tmp_path: Path) -> None:
    save_quantized(tessel.quantize(Two(), "w4a16-g32-asym"), tmp_path)
    tensors = files.load_file(tmp_path / "model.safetensors")
    tensors["up.weight_zero_point"] = torch.ones(96, 2, dtype=torch.int32)
    files.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(TesselError, match=r"up: zero points \(96, 2\) of 96 x 64 in 2 groups"):
        load_quantized(Two(), tmp_path)


def test_targets_by_pattern(tmp_path: Path) -> None:
    """As others write them: patterns after ``re:`` in the groups and among what is ignored."""
    small = tessel.quantize(Two(), "w4a16-g32")
    save_quantized(small, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    said = config["quantization_config"]
    said["config_groups"]["group_0"]["targets"], said["ignore"] = ["re:(up|down|lm_.*)$"], ["re:.*head"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    x = torch.randn(2, 64)
    assert torch.equal(load_quantized(Two(), tmp_path)(x), small(x))
    said["ignore"] = []
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(TesselError, match="lm_head is whole in the file"):
        load_quantized(Two(), tmp_path)
