"""Quantized models as files: safetensors in the compressed-tensors layout ("pack-quantized").

A layer ``name`` is ``name.weight_packed`` (int32 ``[n, ceil(k / per)]``, codes along k), ``name.weight_scale`` ``[n,
groups]``, ``name.weight_shape``, and, where codes do not count from the middle, ``name.weight_zero_point`` (int32
``[ceil(n / per), groups]``, packed along n). Everything else keeps its name. ``config.json`` says what was done, as
others who read the layout expect it; scales are written in float32.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TesselError, check
from .files_sparse import SPARSE_PARTS, read_sparse, said_of_sparse, sparse_tensors
from .formats import WHOLE_ROW, Format, Quantized, integers
from .kv_model import CACHE_KEY, cache_for, give_cache, read_cache, said_of_cache
from .linear import QuantLinear, pack, unpack
from .sparse import SparseLinear
from .stacks import Stack

__all__ = ["load_quantized", "safetensors", "save_quantized", "write_whole"]

_VERSION = "0.1"
_MODEL, _CONFIG = "model.safetensors", "config.json"
_PARTS = ("weight_packed", "weight_scale", "weight_shape")


def safetensors() -> Any:
    """The package, or an error that says what to install."""
    try:
        import safetensors.torch as files
    except ImportError as e:
        raise TesselError("quantized models are safetensors files: pip install safetensors") from e
    return files


def save_quantized(model: nn.Module, folder: str | Path) -> Path:
    """Write what ``tessel.quantize`` made into a folder, which is made; both files are complete or not there.

    Raises:
        TesselError: a layer is in a format, divided or rotated, that the layout has no words for; layers differ in bits
            or groups in a way that it cannot say.
    """
    files, folder = safetensors(), Path(folder)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    sparse = {n: m for n, m in model.named_modules() if isinstance(m, SparseLinear)}
    check(bool(layers or sparse), lambda: "save_quantized: no layer of this model is quantized")
    stacks = [n for n, m in model.named_modules() if isinstance(m, Stack)]
    check(not stacks, lambda: f"save_quantized: {stacks[0]} holds experts' matrices, for which the layout has no words")
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    inside = {f"{n}.{part}" for n in layers for part in ("words", "scale", "zero", "divisor", "sign")}
    inside |= {f"{n}.{part}" for n in sparse for part in ("values", "mask")}
    for name, value in model.state_dict(keep_vars=False).items():
        if name not in inside and value.data_ptr() not in seen:
            tensors[name] = value.detach().contiguous()
            if value.numel():
                seen.add(value.data_ptr())
    for name, layer in layers.items():
        for key, value in _packed(name, layer).items():
            tensors[f"{name}.{key}"] = value
    for name, two in sparse.items():
        tensors |= {f"{name}.{key}": value for key, value in sparse_tensors(two).items()}
    folder.mkdir(parents=True, exist_ok=True)
    config: Any = getattr(model, "config", None)
    words: dict[str, Any] = json.loads(config.to_json_string()) if hasattr(config, "to_json_string") else {}
    words["quantization_config"] = said = _said(model, layers)
    if sparse:
        said["sparsity_config"] = said_of_sparse(sparse, [*layers, *said["ignore"]])
        said["format"] = said["format"] if layers else "dense"
    if (cache := said_of_cache(model)) is not None:
        words[CACHE_KEY] = cache
    write_whole(folder / _MODEL, lambda path: files.save_file(tensors, path, metadata={"format": "pt"}))
    write_whole(folder / _CONFIG, lambda path: path.write_text(json.dumps(words, indent=1) + "\n", encoding="utf-8"))
    return folder


def write_whole(file: Path, write: Any) -> None:
    """Let ``write`` make a file beside its place, then move it there: complete or not there."""
    part = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        write(part)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def _packed(name: str, layer: QuantLinear) -> dict[str, Tensor]:
    f = layer.format
    plain = f.kind == "int" and f.bits in (4, 8) and not f.minimum and layer.divisor is None and layer.sign is None
    check(
        plain,
        lambda: (
            f"save_quantized: {name} ({layer.extra_repr()}) has no words in the compressed-tensors layout, "
            "which has integers of 4 and 8 bits whose inputs are neither divided nor rotated"
        ),
    )
    out = {
        "weight_packed": layer.words.contiguous(),
        "weight_scale": layer.scale.contiguous(),
        "weight_shape": torch.tensor([layer.out_features, layer.in_features]),
    }
    if layer.zero is not None:
        out["weight_zero_point"] = pack(layer.zero.t().round().long(), f.bits).t().contiguous()
    return out


def _weights(f: Format) -> dict[str, Any]:
    strategy = "channel" if f.group == WHOLE_ROW else "group" if f.group > 0 else "tensor"
    own = {"num_bits": f.bits, "type": "int", "symmetric": f.symmetric, "strategy": strategy, "dynamic": False}
    return own | ({"group_size": f.group} if f.group > 0 else {"group_size": None})


def _said(model: nn.Module, layers: dict[str, QuantLinear]) -> dict[str, Any]:
    groups: dict[tuple[Format, Format | None], list[str]] = {}
    for name, layer in layers.items():
        groups.setdefault((layer.format, layer.activation), []).append(name)
    said: dict[str, Any] = {}
    for i, ((weight, activation), names) in enumerate(groups.items()):
        inputs = None
        if activation is not None:
            inputs = {
                "num_bits": activation.bits,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            }
        said[f"group_{i}"] = {
            "targets": ["Linear"] if len(groups) == 1 else names,
            "weights": _weights(weight),
            "input_activations": inputs,
        }
    whole = [n for n, m in model.named_modules() if type(m) is nn.Linear]
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "version": _VERSION,
        "config_groups": said,
        "ignore": whole,
    }


# ---------------------------------------------------------------- reading


def load_quantized(model: nn.Module, folder: str | Path) -> nn.Module:
    """Put a folder's weights into a model as it was before it was quantized, whose linear layers are replaced in place.

    Args:
        model: of the same architecture; its weights may be on the meta device.
        folder: what ``save_quantized`` or another writer of the layout made.

    Raises:
        TesselError: no such file, a format or method that is unknown, layers with missing, extra or wrong parts.
    """
    files, folder = safetensors(), Path(folder)
    try:
        words = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        said = words["quantization_config"]
        tensors: dict[str, Tensor] = files.load_file(folder / _MODEL)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise TesselError(f"load_quantized: {folder} holds no quantized model: {type(e).__name__}: {e}") from e
    except Exception as e:  # safetensors has an exception type of its own
        raise TesselError(f"load_quantized: {folder / _MODEL} cannot be read: {e}") from e
    check(
        isinstance(said, dict)
        and said.get("quant_method") == "compressed-tensors"
        and (said.get("format") == "pack-quantized" or bool(said.get("sparsity_config"))),
        lambda: (
            f"load_quantized: {folder} is of method {said.get('quant_method')!r}, format {said.get('format')!r}; "
            "compressed-tensors, pack-quantized is what can be read"
        ),
    )
    version = said.get("version", _VERSION)
    check(
        isinstance(version, str) and re.fullmatch(r"0\.\d+(\..*)?", version) is not None,
        lambda: f"load_quantized: {folder} is of version {version!r} of the layout; 0.* is what can be read",
    )
    cache = None if words.get(CACHE_KEY) is None else read_cache(words[CACHE_KEY], str(folder))
    if cache is not None:
        cache_for(model, cache)  # refuses what has no cache before anything is replaced
    names = sorted({n.rpartition(".")[0] for n in tensors if n.endswith((".weight_packed", ".weight_scale"))})
    modules = dict(model.named_modules())
    for name in names:
        layer = modules.get(name)
        check(layer is not None, lambda name=name: f"load_quantized: the model has no layer {name}")  # type: ignore[misc]
        assert layer is not None
        made = _read(name, layer, {p: tensors.pop(f"{name}.{p}", None) for p in (*_PARTS, "weight_zero_point")}, said)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, made)
    sparse = sorted(n.removesuffix(".bitmask") for n in tensors if n.endswith(".bitmask"))
    for name in sparse:
        check(name in modules, lambda name=name: f"load_quantized: the model has no layer {name}")  # type: ignore[misc]
        own = {p: tensors.pop(f"{name}.{p}", None) for p in SPARSE_PARTS}
        parent, _, last = name.rpartition(".")
        two = read_sparse(name, modules[name], own, said.get("sparsity_config") or {})
        setattr(model.get_submodule(parent), last, two)
    left = model.load_state_dict(tensors, strict=False, assign=True)
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    inside = {f"{n}.{p}" for n in names for p in ("words", "scale", "zero", "divisor", "sign")}
    inside |= {f"{n}.{p}" for n in sparse for p in ("values", "mask")}
    missing = [n for n in left.missing_keys if n not in inside and n not in tied]
    wrong = [f"missing: {', '.join(missing[:4])}"] * bool(missing)
    wrong += [f"not in the model: {', '.join(left.unexpected_keys[:4])}"] * bool(left.unexpected_keys)
    check(not wrong, lambda: f"load_quantized: {folder} does not fit the model; {'; '.join(wrong)}")
    if hasattr(model, "tie_weights"):
        model.tie_weights()  # type: ignore[operator]
    if cache is not None:
        give_cache(model, cache)
    return model


def _read(name: str, layer: nn.Module, parts: dict[str, Tensor | None], said: dict[str, Any]) -> QuantLinear:
    absent = [p for p in _PARTS if parts[p] is None]
    check(not absent, lambda: f"load_quantized: {name} has no {' and no '.join(absent)}")
    words, scale, shape = (parts[p] for p in _PARTS)
    assert words is not None and scale is not None and shape is not None
    group = _group_of(name, said)
    weights, inputs = group["weights"], group.get("input_activations")
    bits, symmetric = weights.get("num_bits"), weights.get("symmetric", True)
    check(bits in (4, 8) and weights.get("type", "int") == "int", lambda: f"load_quantized: {name}: weights {weights}")
    n, k = (int(x) for x in shape)
    weight: Any = getattr(layer, "weight", None)
    check(
        type(layer) is nn.Linear and tuple(weight.shape) == (n, k),
        lambda: f"load_quantized: {name} is {n} x {k} in the file, {type(layer).__name__} in the model",
    )
    per, groups = 32 // bits, scale.shape[-1] if scale.dim() else 0
    check(
        words.dtype == torch.int32 and tuple(words.shape) == (n, -(-k // per)) and scale.dim() == 2
        and scale.shape[0] in (1, n) and groups > 0 and k % groups == 0,
        lambda: f"load_quantized: {name}: words {tuple(words.shape)} and scales {tuple(scale.shape)} of {n} x {k}",
    )  # fmt: skip
    zero = parts["weight_zero_point"]
    check(
        (zero is None) == bool(symmetric) or bool(symmetric),
        lambda: f"load_quantized: {name} is asymmetric and has no weight_zero_point",
    )
    check(
        zero is None or not symmetric or not bool(zero.any()),
        lambda: f"load_quantized: {name} is symmetric and has a weight_zero_point that is not zero",
    )
    check(bool(torch.isfinite(scale.float()).all()), lambda: f"load_quantized: {name}: scales that are NaN or infinite")
    codes = unpack(words, bits, k).float()
    offset = 2 ** (bits - 1)
    format = integers(bits, WHOLE_ROW if groups == 1 else k // groups, bool(symmetric))
    if symmetric:
        quantized = Quantized(codes - offset, scale.float(), format)
    else:
        assert zero is not None
        zeros = unpack(zero.t().contiguous(), bits, n).t().float()
        quantized = Quantized(codes, scale.float(), format, zeros)
    activation = None if not inputs else integers(int(inputs["num_bits"]))
    device = scale.device
    own = nn.Linear(k, n, bias=layer.bias is not None, device=device, dtype=weight.dtype)  # type: ignore[arg-type]
    return QuantLinear.of(own, quantized, activation)


def _group_of(name: str, said: dict[str, Any]) -> dict[str, Any]:
    groups = list(said.get("config_groups", {}).values())
    for group in groups:
        if name in group.get("targets", ()) or "Linear" in group.get("targets", ()):
            return group  # type: ignore[no-any-return]
    raise TesselError(f"load_quantized: config_groups say nothing of {name}")
