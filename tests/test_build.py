"""Builds: a model into a folder and back, with the same numbers; folders that are damaged, foreign or for others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import tessel
from tessel.build import build
from tessel.cli import main
from tessel.cli.model import parse_options
from tessel.errors import TesselError
from tessel.models import load_model


class Net(nn.Module):
    """A parameter, a buffer that a call changes, a constant and a nest of results."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 7)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> Any:
        self.calls += 1
        y = torch.softmax(self.linear(x), -1) * torch.tensor([1.0, 2, 3, 4, 5, 6, 7])
        return {"y": y if scale is None else y * scale, "rest": (x.sum(0), [self.calls * 2])}


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def built(net: Net, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "net"
    build(net, (torch.randn(3, 12),), {"scale": torch.randn(7)}, target="triton-interpret", out=folder)
    return folder


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(built, tmp_path / "copy"))


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(3, 12), torch.randn(7)


@pytest.mark.parametrize("target", ["cpu", "triton-interpret"])
def test_a_build_gives_the_models_results(net: Net, tmp_path: Path, target: str) -> None:
    x, scale = inputs()
    net.calls.zero_()
    build(net, (x,), {"scale": scale}, target=target, out=tmp_path / "b")
    assert net.calls.item() == 0  # building runs nothing
    fn = tessel.load(tmp_path / "b")
    x, scale = inputs()
    for n in (1, 2):
        got = fn(x, scale=scale)
        want = net(x, scale=scale)
        torch.testing.assert_close(got, want)
        assert fn.weights["calls"].item() == n
    assert not got["y"].requires_grad
    assert fn.report.kernels
    assert "kernels" in str(fn.report)


@pytest.mark.parametrize("name", ["llama", "vit"])
def test_models_of_transformers(name: str, tmp_path: Path) -> None:
    module, args, kwargs = load_model(f"hf:{name}")
    build(module, args, kwargs, target="cpu", out=tmp_path / "b")
    got = tessel.load(tmp_path / "b")(*args, **kwargs)
    with torch.no_grad():
        want = module(*args, **kwargs)
    assert type(got) is type(want)
    torch.testing.assert_close(got.logits, want.logits)


def test_without_weights_they_are_given_when_it_is_loaded(tmp_path: Path) -> None:
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = tmp_path / "config.json"
    sizes = small | {"num_key_value_heads": 1, "vocab_size": 61, "max_position_embeddings": 16, "use_cache": False}
    config.write_text(json.dumps({"model_type": "llama", **sizes}))
    spec = f"hf:{config}"
    meta, args, kwargs = load_model(spec, device="meta", seq=9)
    folder = tmp_path / "b"
    build(meta, args, kwargs, target="cpu", out=folder)
    assert not (folder / "weights.pt").exists() or "constant" in (folder / "manifest.json").read_text()
    with pytest.raises(TesselError, match=r"no weights for .*state_dict"):
        tessel.load(folder)
    module, args, kwargs = load_model(spec, seq=9)
    weights = {**module.state_dict(), **dict(module.named_buffers())}
    got = tessel.load(folder, weights=weights)(*args, **kwargs)
    with torch.no_grad():
        torch.testing.assert_close(got.logits, module(*args, **kwargs).logits)
    name = next(n for n in weights if weights[n].dim() == 2)
    with pytest.raises(TesselError, match=rf"{name} is torch.float32 \(1, 2\), built for torch.float32"):
        tessel.load(folder, weights=weights | {name: torch.zeros(1, 2)})


def test_a_function_is_built_too(tmp_path: Path) -> None:
    def gated(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(x) * y

    x, y = torch.randn(5, 6), torch.randn(5, 6)
    build(gated, (x, y), target="cpu", out=tmp_path / "b")
    torch.testing.assert_close(tessel.load(tmp_path / "b")(x, y), gated(x, y))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(4, 12)}, r"shape \(4, 12\), built for \(3, 12\)"),
        ({"x": torch.zeros(3, 12, 1)}, "3 dimensions"),
        ({"x": torch.zeros(3, 12, dtype=torch.float64)}, "dtype torch.float64, built for torch.float32"),
        ({"x": torch.zeros(3, 12, device="meta")}, "device meta, built for cpu"),
        ({"x": 3.0}, "expected a tensor, got 3.0"),
        ({"scale": None}, "scale: expected a tensor, got None"),
    ],
)
def test_calls_that_it_was_not_built_for(built: Path, change: dict[str, Any], words: str) -> None:
    x, scale = inputs()
    fn = tessel.load(built)
    with pytest.raises(TesselError, match=words):
        fn(change.get("x", x), scale=change.get("scale", scale))


def test_calls_of_another_form(built: Path) -> None:
    x, scale = inputs()
    fn = tessel.load(built)
    with pytest.raises(
        TesselError, match="called with 2 positional arguments, built for 1 positional arguments and scale"
    ):
        fn(x, scale)


# ---------------------------------------------------------------- bad folders


def test_any_changed_file_is_refused(built: Path, copy: Path) -> None:
    files = [p for p in copy.rglob("*") if p.is_file() and p.name != "manifest.json"]
    assert {"graph.tir", "host.py", "weights.pt", "report.html"} <= {p.name for p in files}
    for path in files:
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(TesselError, match=f"{path.name} was changed or is damaged"):
            tessel.load(copy)
        path.unlink()
        with pytest.raises(TesselError, match=f"{path.name} is missing"):
            tessel.load(copy)
        path.write_bytes(data)
    tessel.load(copy)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "damaged"),
        ("{}", "damaged"),
        ('{"format": 1}', "damaged"),
        ("[" * 100_000, "damaged"),
        ("null", "damaged"),
    ],
)
def test_manifests_that_are_none(copy: Path, text: str, words: str) -> None:
    (copy / "manifest.json").write_text(text)
    with pytest.raises(TesselError, match=words):
        tessel.load(copy)


def test_other_versions_and_paths_that_lead_out(copy: Path, tmp_path: Path) -> None:
    file = copy / "manifest.json"
    good = json.loads(file.read_text())
    (tmp_path / "secret").write_text("x")
    for change, words in (
        ({"format": 99}, "format 99, this Tessel reads 1"),
        ({"sha256": {**good["sha256"], "../secret": "0"}}, "../secret is missing"),
        ({"target": "h1000"}, "unknown target 'h1000'"),
        ({"sha256": {}}, "graph.tir is missing"),
    ):
        file.write_text(json.dumps({**good, **change}))
        with pytest.raises(TesselError, match=words):
            tessel.load(copy)
    with pytest.raises(TesselError, match="no build of Tessel"):
        tessel.load(tmp_path)


def test_only_a_build_is_replaced(net: Net, built: Path, tmp_path: Path) -> None:
    args, kwargs = (torch.randn(3, 12),), {"scale": torch.randn(7)}
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(TesselError, match=r"holds 'thesis.txt' and is no build"):
        build(net, args, kwargs, target="cpu", out=folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(TesselError, match="is no folder"):
        build(net, args, kwargs, target="cpu", out=tmp_path / "file")
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(TesselError, match="is no folder"):
        build(net, args, kwargs, target="cpu", out=tmp_path / "link")
    assert [p.name for p in folder.iterdir()] == ["thesis.txt"]
    (folder / "thesis.txt").unlink()
    build(net, args, kwargs, target="cpu", out=folder)
    build(net, args, kwargs, target="triton-interpret", out=folder)
    assert tessel.load(folder).report.target == "triton-interpret"
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]  # nothing temporary is left


def test_what_cannot_be_exported_or_kept(tmp_path: Path) -> None:
    def branch(x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x

    with pytest.raises(TesselError, match="cannot export the model as one graph"):
        build(branch, (torch.randn(3),), target="cpu", out=tmp_path / "b")
    with pytest.raises(TesselError, match="name the device"):
        build(nn.ReLU(), (torch.randn(3),), target="cuda", out=tmp_path / "b")
    assert not (tmp_path / "b").exists()


# ---------------------------------------------------------------- the command


def run(*args: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, list(args))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_kernels_for_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    folder = tmp_path / "b"
    code, out = run("compile", "hf:gpt2", "--layers", "1", "--seq", "64", "--target", "h100", "--out", str(folder))
    assert code == 0, out
    manifest = json.loads((folder / "manifest.json").read_text())
    names = {n for n, knobs in manifest["tiles"].items() if set(knobs) != {"SPLIT"}}  # which makes two kernels of one
    assert names and {f"{n}.py" for n in names} | {f"{n}.cubin" for n in names} == {
        p.name for p in (folder / "kernels").iterdir()
    }
    assert all((folder / "kernels" / f"{n}.cubin").read_bytes()[:4] == b"\x7fELF" for n in names)
    assert out.count("fits") == len(names) and "predicted / compiled / limit" in out
    if not torch.cuda.is_available():
        with pytest.raises(TesselError, match="built for h100, and torch finds no GPU here"):
            tessel.load(folder)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["hf:gpt2", "--target", "h1000"], "unknown target 'h1000'"),
        (["hf:gpt9", "--target", "cpu"], "gpt9"),
        (["hf:gpt2", "--target", "cpu", "--option", "fussion=false"], "did you mean 'fusion'"),
        (["hf:gpt2", "--target", "cpu", "--option", "fusion"], "expected name=value"),
        (["{folder}/raises.py:make", "--target", "cpu"], "raised ValueError: not today"),
    ],
)
def test_refused_in_one_line(tmp_path: Path, args: list[str], words: str) -> None:
    (tmp_path / "raises.py").write_text("def make():\n    raise ValueError('not today')\n")
    args = [a.replace("{folder}", str(tmp_path)) for a in args]
    code, out = run("compile", *args, "--out", str(tmp_path / "b"))
    assert code == 2 and words in out and len(out.strip().splitlines()) == 1
    assert not (tmp_path / "b").exists()


def test_option_texts() -> None:
    assert parse_options(("a=1", "b=none", "c=x=y")) == {"a": 1, "b": None, "c": "x=y"}
    with pytest.raises(TesselError, match="twice"):
        parse_options(("a=1", "a=2"))
