"""Quantized models as files: safetensors in the compressed-tensors layout ("pack-quantized").

A layer ``name`` is ``name.weight_packed`` (int32 ``[n, ceil(k / per)]``, codes along k), ``name.weight_scale`` ``[n,
groups]``, ``name.weight_shape``, and, where codes do not count from the middle, ``name.weight_zero_point`` (int32
``[ceil(n / per), groups]``, packed along n); where channels of a group do not lie side by side, ``name.weight_g_idx``
(int32 ``[k]``) is the group of each. Experts' matrices are layers of their own (``files_stacks``). Everything else
keeps its name. ``config.json`` says what was done, as others who read the layout expect it; scales are written in
float32.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import TesselError, check
from .experts import inputs_of
from .files_packed import PARTS, PARTS_TOO, has_words, packed_tensors, read_packed, says_quantized, words_of
from .files_sparse import SPARSE_PARTS, read_sparse, said_of_sparse, sparse_tensors
from .files_stacks import load_stacks, names_of_stack, owner_of, stack_tensors
from .formats import Format
from .kv_model import CACHE_KEY, cache_for, give_cache, read_cache, said_of_cache
from .linear import QuantLinear
from .sparse import SparseLinear
from .stacks import Stack, stack_of

__all__ = ["load_quantized", "safetensors", "save_quantized", "write_whole"]

_VERSION = "0.1"
_MODEL, _CONFIG = "model.safetensors", "config.json"


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
    stacks = {n: m for n, m in model.named_modules() if isinstance(m, Stack)}
    check(bool(layers or sparse or stacks), lambda: "save_quantized: no layer of this model is quantized")
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    inside = {f"{n}.{part}" for n in layers for part in ("words", "scale", "zero", "divisor", "sign", "order")}
    inside |= {f"{n}.{part}" for n in sparse for part in ("values", "mask")}
    inside |= {f"{n}.{part}" for n in stacks for part in ("words", "scale", "zero")}
    for name, value in model.state_dict(keep_vars=False).items():
        if name not in inside and value.data_ptr() not in seen:
            tensors[name] = value.detach().contiguous()
            if value.numel():
                seen.add(value.data_ptr())
    for name, layer in layers.items():
        for key, value in _packed(name, layer).items():
            tensors[f"{name}.{key}"] = value
    for name, stack in stacks.items():
        _need_words(name, stack.format, stack.extra_repr())
        owner, own = stack_of(name)
        tensors |= stack_tensors(owner, own, model.get_submodule(owner), stack)
    for name, two in sparse.items():
        tensors |= {f"{name}.{key}": value for key, value in sparse_tensors(two).items()}
    folder.mkdir(parents=True, exist_ok=True)
    config: Any = getattr(model, "config", None)
    words: dict[str, Any] = json.loads(config.to_json_string()) if hasattr(config, "to_json_string") else {}
    words["quantization_config"] = said = _said(model, layers, stacks)
    if sparse:
        said["sparsity_config"] = said_of_sparse(sparse, [*layers, *said["ignore"]])
        said["format"] = said["format"] if layers or stacks else "dense"
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
    _need_words(name, layer.format, layer.extra_repr(), layer.divisor is None and layer.sign is None)
    return packed_tensors(layer.words, layer.scale, layer.zero, layer.format.bits, layer.in_features, layer.order)


def _need_words(name: str, format: Format, what: str, plain: bool = True) -> None:
    check(
        plain and has_words(format),
        lambda: (
            f"save_quantized: {name} ({what}) has no words in the compressed-tensors layout, "
            "which has integers of 4 and 8 bits whose inputs are neither divided nor rotated"
        ),
    )


def _said(model: nn.Module, layers: dict[str, QuantLinear], stacks: dict[str, Stack]) -> dict[str, Any]:
    groups: dict[tuple[Format, Format | None, bool], list[str]] = {}
    for name, layer in layers.items():
        groups.setdefault((layer.format, layer.activation, layer.order is not None), []).append(name)
    for name, stack in stacks.items():
        owner, own = stack_of(name)
        module = model.get_submodule(owner)
        given = stack.format, inputs_of(module), False
        groups.setdefault(given, []).extend(names_of_stack(owner, own, module, stack))
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "version": _VERSION,
        "config_groups": {
            f"group_{i}": words_of(weight, inputs, ["Linear"] if len(groups) == 1 else names, ordered)
            for i, ((weight, inputs, ordered), names) in enumerate(groups.items())
        },
        "ignore": [n for n, m in model.named_modules() if type(m) is nn.Linear],
    }


# ---------------------------------------------------------------- reading


def load_quantized(model: nn.Module, folder: str | Path) -> nn.Module:
    """Put a folder's weights into a model as it was before it was quantized, whose linear layers are replaced in place.

    Args:
        model: of the same architecture; its weights may be on the meta device.
        folder: what ``save_quantized`` or another writer of the layout made.

    Raises:
        TesselError: no such file, a format or method that is unknown, layers with missing, extra or wrong parts, layers
            that are whole and named among the quantized ones.
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
    rounding = []
    for owner, own_names in _experts(names, modules).items():
        names = [n for n in names if n not in own_names]
        rounding.append(load_stacks(owner, modules[owner], own_names, lambda n: tensors.pop(n, None), said))
    for name in names:
        layer = modules.get(name)
        check(layer is not None, lambda name=name: f"load_quantized: the model has no layer {name}")  # type: ignore[misc]
        assert layer is not None
        made = _read(name, layer, {p: tensors.pop(f"{name}.{p}", None) for p in (*PARTS, *PARTS_TOO)}, said)
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
    inside = {f"{n}.{p}" for n in names for p in ("words", "scale", "zero", "divisor", "sign", "order")}
    inside |= {f"{n}.{p}" for n in sparse for p in ("values", "mask")}
    stacks = [n for n, m in model.named_modules() if isinstance(m, Stack)]
    inside |= {f"{n}.{p}" for n in stacks for p in ("words", "scale", "zero")}
    missing = [n for n in left.missing_keys if n not in inside and n not in tied]
    wrong = [f"missing: {', '.join(missing[:4])}"] * bool(missing)
    wrong += [f"not in the model: {', '.join(left.unexpected_keys[:4])}"] * bool(left.unexpected_keys)
    check(not wrong, lambda: f"load_quantized: {folder} does not fit the model; {'; '.join(wrong)}")
    whole = [n for n, m in model.named_modules() if type(m) is nn.Linear and says_quantized(n, said)]
    check(not whole, lambda: f"load_quantized: {folder}: {whole[0]} is whole in the file, which says that it is not")
    if hasattr(model, "tie_weights"):
        model.tie_weights()  # type: ignore[operator]
    for round_inputs in rounding:
        round_inputs()
    if cache is not None:
        give_cache(model, cache)
    return model


def _experts(names: Collection[str], modules: dict[str, nn.Module]) -> dict[str, set[str]]:
    """Layers of experts in a file, by the module that has their stacks."""
    found: dict[str, set[str]] = {}
    for name in names:
        owner = None if name in modules else owner_of(name, modules)
        if owner is not None:
            found.setdefault(owner, set()).add(name)
    return found


def _read(name: str, layer: nn.Module, parts: dict[str, Tensor | None], said: dict[str, Any]) -> QuantLinear:
    if type(layer) is not nn.Linear:
        raise TesselError(f"load_quantized: {name} is a linear layer in the file, {type(layer).__name__} in the model")
    n, k = layer.out_features, layer.in_features
    quantized, activation, order = read_packed(name, parts, said, (n, k))
    own = nn.Linear(k, n, layer.bias is not None, device=quantized.codes.device, dtype=layer.weight.dtype)
    return QuantLinear.of(own, quantized, activation, order=order)
