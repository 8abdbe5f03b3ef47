"""Models by name: ``file.py:function``, ``package.module:function``, ``hf:<model type>`` and ``hf:config.json``.

The function returns ``(module, args)`` or ``(module, args, kwargs)``. ``hf:`` builds the transformers class of a
type and downloads nothing. To run, a type gives a model of small widths with random weights. On ``device="meta"``,
which is what a target that is not there needs, it is the default config at full size, without weights. A
``config.json`` always counts as it is.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .errors import TesselError, check, did_you_mean, nearest

__all__ = ["Loaded", "load_batches", "load_model"]

Loaded = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}
_SHORT |= {"f32": "float32", "f16": "float16", "f64": "float64"}


def load_model(
    spec: str,
    batch: int | None = None,
    seq: int | None = None,
    dtype: str | torch.dtype | None = None,
    layers: int | None = None,
    device: str | None = None,
) -> Loaded:
    """The model that ``spec`` names, with inputs for one call: ``(module, args, kwargs)``.

    For ``hf:`` the defaults are batch 1, float32, the CPU; 16 tokens and 2 layers for a small model, else 2048
    tokens (or what the config allows) and all its layers. Weights and inputs are the same on every call. A function
    gets those of the five that the caller gave, by name, and must have a parameter for each; ``device="meta"`` is
    for ``hf:`` alone, since a function says itself what its tensors are.

    Raises:
        TesselError: the spec has no such form, names nothing, or what it names raises or returns something
            else; the message is one line.
    """
    given = {"batch": batch, "seq": seq, "dtype": dtype, "layers": layers, "device": device}
    for name in ("batch", "seq", "layers"):
        value = given[name]
        if value is not None and not (isinstance(value, int) and value >= 1):
            raise TesselError(f"{name}: expected a whole number of at least 1, got {value!r}")
    if dtype is not None:
        given["dtype"] = _dtype(dtype)
    if spec.startswith("hf:") and len(spec) > 3:
        return _hf(spec[3:], **given)  # type: ignore[arg-type]
    where, colon, name = spec.rpartition(":")
    if not (colon and where and name):
        raise TesselError(
            f"model {spec!r}: expected file.py:function, package.module:function, hf:<model type> or hf:config.json"
        )
    options = {k: v for k, v in given.items() if v is not None and (k, v) != ("device", "meta")}
    module = _from_file(where) if where.endswith(".py") or "/" in where else _from_import(where)
    return _call(spec, module, name, options)


def load_batches(spec: str) -> list[Any]:
    """What ``file.py:function`` or ``module:function`` yields, called without arguments: calibration data.

    Raises:
        TesselError: there is no such function, or it raised.
    """
    where, colon, name = spec.rpartition(":")
    check(bool(colon and where and name), lambda: f"calibration {spec!r}: expected file.py:function")
    module = _from_file(where) if where.endswith(".py") else _from_import(where)
    make = getattr(module, name, None)
    check(callable(make), lambda: f"calibration {spec!r}: no function {name!r}")
    assert make is not None
    try:
        given = make()
        if isinstance(given, Mapping | str):
            raise TesselError(f"calibration {spec!r} gives a {type(given).__name__}; a list of calls: return [batch]")
        return list(given)
    except TesselError:
        raise
    except Exception as e:
        raise TesselError(f"calibration {spec!r} raised {_one_line(e, getattr(module, '__file__', None))}") from e


def _dtype(x: str | torch.dtype) -> torch.dtype:
    if isinstance(x, torch.dtype):
        return x
    name = _SHORT.get(x, x)
    check(name in _DTYPES, lambda: f"dtype: unknown {x!r}; {did_you_mean(x, [*_DTYPES, *_SHORT])}")
    return _DTYPES[name]


def _from_file(where: str) -> ModuleType:
    path = Path(where)
    check(path.is_file(), lambda: f"model file {where!r} does not exist")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise TesselError(f"model file {where!r} is not Python source (its name must end in .py)")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent.resolve()))  # as `python file.py` does, for its neighbours
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as e:
        raise TesselError(f"model file {where!r} raised {_one_line(e, where)}") from e
    finally:
        sys.path.pop(0)
    return module


def _from_import(where: str) -> ModuleType:
    try:
        return importlib.import_module(where)
    except ModuleNotFoundError as e:
        if e.name and (where == e.name or where.startswith(e.name + ".")):
            raise TesselError(f"there is no module {e.name!r} to import for {where!r}") from e
        raise TesselError(f"module {where!r} raised {_one_line(e, where.rpartition('.')[2] + '.py')}") from e
    except (Exception, SystemExit) as e:
        raise TesselError(f"module {where!r} raised {_one_line(e, where.rpartition('.')[2] + '.py')}") from e


def _call(spec: str, module: ModuleType, name: str, options: Mapping[str, Any]) -> Loaded:
    make = getattr(module, name, None)
    if make is None:
        names = [n for n, v in vars(module).items() if inspect.isfunction(v)]
        close = nearest(name, names)
        raise TesselError(f"model {spec!r}: no function {name!r}" + (f"; did you mean {close!r}?" if close else ""))
    check(callable(make), lambda: f"model {spec!r}: {name!r} is a {type(make).__name__}, not a function")
    try:
        parameters = dict(inspect.signature(make).parameters)
    except (TypeError, ValueError):  # some built-ins have none
        parameters = {}
    for option in options:
        if option not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            raise TesselError(f"model {spec!r}: {option} was given, but {name!r} has no parameter of that name")
    try:
        result = make(**options)
    except (Exception, SystemExit) as e:
        raise TesselError(f"model {spec!r} raised {_one_line(e, getattr(module, '__file__', None))}") from e
    ok = isinstance(result, tuple) and len(result) in (2, 3) and callable(result[0])
    ok = ok and isinstance(result[1], tuple | list)
    ok = ok and (len(result) == 2 or isinstance(result[2], Mapping))
    if not ok:
        what = f"a tuple of {len(result)}" if isinstance(result, tuple) else f"a {type(result).__name__}"
        raise TesselError(
            f"model {spec!r}: expected (module, args tuple) or (module, args tuple, kwargs dict), got {what}"
        )
    return result[0], tuple(result[1]), dict(result[2]) if len(result) == 3 else {}


def _one_line(e: BaseException, file: str | None = None) -> str:
    """``Type: message (file:line)`` without newlines; the line is the last one inside ``file``."""
    frames = traceback.extract_tb(e.__traceback__)
    if file is not None:
        frames = [f for f in frames if Path(f.filename).name == Path(file).name] or frames  # type: ignore[assignment]
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames and file is not None else ""
    if isinstance(e, SyntaxError) and e.filename:
        place = f" ({e.filename}:{e.lineno})"
        return f"{type(e).__name__}: {e.msg}{place}"
    return f"{type(e).__name__}: {' '.join(str(e).split())[:300]}{place}"


# ---------------------------------------------------------------------------------------------------
# transformers

# Small values for the fields that set a model's size. A config gets those that it has.
_SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "d_ff": 128,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "num_attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "d_kv": 16,
    "vocab_size": 256,
    "projection_dim": 32,
    "image_size": 32,
    "patch_size": 8,
    "max_source_positions": 32,
    "num_mel_bins": 16,
    "sliding_window": 64,
    # mixture of experts, latent attention
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    # state-space models
    "state_size": 8,
    "time_step_rank": 8,
    # token ids must lie in the vocabulary
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "use_cache": False,
}
_CONFIG_BYTES = 2**20
_LAYERS = ("num_hidden_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")
# The first table that knows a model type names its class; the base model is the last resort.
_HEADS = (
    "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "SPEECH_SEQ_2_SEQ",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "MASKED_LM",
    "CAUSAL_LM",
    "IMAGE_CLASSIFICATION",
)


def _hf(
    name: str,
    batch: int | None,
    seq: int | None,
    dtype: torch.dtype | None,
    layers: int | None,
    device: str | None,
) -> Loaded:
    try:
        import transformers
    except ImportError as e:
        raise TesselError("hf: models need transformers: pip install 'tessel[hf]'") from e
    given = _given(name) if name.endswith(".json") else None
    config_class = _config_class(given["model_type"] if given else name)
    small = given is None and device != "meta"
    kind = "a small one" if small else "it"
    try:
        # made on the CPU and moved, so that every device gets the same numbers; meta tensors have none
        with torch.random.fork_rng(devices=[]), torch.device("meta" if device == "meta" else "cpu"):
            torch.manual_seed(0)
            if small:
                config = _small(config_class, layers or 2, seq or 16)
            else:
                config = config_class() if given is None else config_class.from_dict(given)
                config = _cut(config, layers) if layers else config
                config.use_cache = False  # one pass over all tokens: a cache of keys would be an output, not used
            if _class_name(config.model_type) is None and "text_config" in config.sub_configs:
                config = config.get_text_config()  # of a model that also reads images, the language part
            class_name = _class_name(config.model_type)
            check(class_name, lambda: f"hf:{name}: transformers has no class with inputs known here")
            module = getattr(transformers, str(class_name))(config).eval()
            module = module.to(dtype=dtype or torch.float32)
            seq = seq or (16 if small else _tokens(config))
            kwargs = _inputs(module, config, batch or 1, seq, dtype or torch.float32)
    except TesselError:
        raise
    except Exception as e:
        raise TesselError(f"hf:{name}: cannot build {kind} ({_one_line(e)}); name a function that does") from e
    if device is not None:
        module = module.to(device)
        kwargs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    return module, (), kwargs


def _tokens(config: Any) -> int:
    """2048, or as many as every part of the model has positions for."""
    limits = ("max_position_embeddings", "max_target_positions", "n_positions")
    parts = (config, config.get_text_config())
    return min([2048, *(n for c in parts for f in limits if isinstance(n := getattr(c, f, None), int) and n > 0)])


def _config_class(model_type: str) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    if model_type not in CONFIG_MAPPING_NAMES:
        close = nearest(model_type, CONFIG_MAPPING_NAMES)
        raise TesselError(
            f"unknown transformers model type {model_type!r} ({len(CONFIG_MAPPING_NAMES)} are known)"
            + (f"; did you mean {close!r}?" if close else "")
        )
    return CONFIG_MAPPING[model_type]


def _given(name: str) -> dict[str, Any]:
    """A config file as names and values. Code that it names (``auto_map``) is never fetched or run."""
    path = Path(name)
    try:
        check(path.stat().st_size <= _CONFIG_BYTES, lambda: f"hf:{name}: more than {_CONFIG_BYTES >> 20} MiB")
        given = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise TesselError(f"hf:{name}: cannot read the file: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise TesselError(f"hf:{name}: no JSON: {e}") from e
    ok = isinstance(given, dict) and isinstance(given.get("model_type"), str)
    check(ok, lambda: f"hf:{name}: a transformers config has a model_type, this has none")
    return {k: v for k, v in given.items() if k != "auto_map"}


def _cut(config: Any, layers: int) -> Any:
    """The config with fewer layers; its parts (text, vision) too."""
    values = config.to_dict()
    for field in (*_LAYERS, "n_layer", "n_layers"):
        if isinstance(values.get(field), int):
            values[field] = min(values[field], layers)
    for field in ("layer_types", "mlp_layer_types"):  # one word a layer
        if isinstance(values.get(field), list):
            values[field] = values[field][:layers]
    for part in config.sub_configs:
        inner = getattr(config, part, None)
        if hasattr(inner, "to_dict"):
            values[part] = _cut(inner, layers).to_dict()
    return type(config).from_dict(values)


def _small(config_class: Any, layers: int, seq: int) -> Any:
    """A config with small widths; its parts (text, vision) too."""
    default = config_class()
    names = set(default.to_dict()) | set(default.attribute_map)
    wanted = {**_SMALL, **dict.fromkeys(_LAYERS, layers)}
    # a field may have a second name (GPT-2: n_embd is hidden_size); a value under both would clash
    values = {k: v for k, v in wanted.items() if k in names and default.attribute_map.get(k) not in wanted}
    if "max_position_embeddings" in names:
        values["max_position_embeddings"] = max(64, seq)
    if "qk_rope_head_dim" in names:  # there the head size follows from its parts
        values.pop("head_dim", None)
        values["num_key_value_heads"] = values["num_attention_heads"]
    for part, part_class in default.sub_configs.items():
        if getattr(part_class, "model_type", ""):  # AutoConfig has none: that part keeps its default
            values[part] = _small(part_class, layers, seq).to_dict()
    return config_class(**values)


def _class_name(model_type: str) -> str | None:
    """The transformers class for a model type, None when only a multimodal one exists."""
    from transformers.models.auto import modeling_auto

    def names(task: str) -> dict[str, Any]:
        return getattr(modeling_auto, f"MODEL_{task}MAPPING_NAMES", {})

    tables = [names(f"FOR_{head}_") for head in _HEADS] + [names("")]
    if model_type in names("FOR_IMAGE_TEXT_TO_TEXT_"):
        tables = tables[:1]  # pictures woven into text: only CLIP and its like have inputs known here
    for table in tables:
        found = table.get(model_type)
        if found:
            return found if isinstance(found, str) else found[0]
    return None


def _inputs(module: torch.nn.Module, config: Any, batch: int, seq: int, dtype: torch.dtype) -> dict[str, Any]:
    """Random inputs for one call, by the names that the model's ``forward`` takes."""
    takes = inspect.signature(module.forward).parameters
    vocab = getattr(config.get_text_config(), "vocab_size", 256)
    vision = getattr(config, "vision_config", config)

    def ids() -> torch.Tensor:
        return torch.randint(3, vocab, (batch, seq))

    def image() -> torch.Tensor:
        size = vision.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return torch.randn(batch, vision.num_channels, height, width, dtype=dtype)

    kwargs: dict[str, Any] = {}
    if "input_features" in takes:  # speech: two frames become one position
        kwargs["input_features"] = torch.randn(batch, config.num_mel_bins, 2 * config.max_source_positions, dtype=dtype)
    elif "input_ids" in takes:
        kwargs["input_ids"] = ids()
    if "pixel_values" in takes and hasattr(vision, "image_size"):
        kwargs["pixel_values"] = image()
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in takes:
        kwargs["decoder_input_ids"] = ids()
    check(
        kwargs,
        lambda: f"hf:{config.model_type}: no inputs known for {', '.join(takes)}; name a function that has them",
    )
    return kwargs
