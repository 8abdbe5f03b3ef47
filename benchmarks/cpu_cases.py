"""What ``cpu.py`` measures: models of transformers with random weights, and fused micro-cases.

start = load("Llama decode", torch.float32)
case = start()              # a Case: the weights are shared, a cache is its own
case.fn(*case.args, **case.kwargs)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from common import Size, build
from torch import nn

F = nn.functional

SMALL = Size(layers=4, hidden=768, heads=12, batch=4, seq=256, vocab=8192, mlp=4)
CACHE = 512  # tokens that the cache of a decoding step holds


def _but(**changes: int) -> Size:
    return Size(**{**SMALL.__dict__, **changes})


# Name of the case -> the model in common.MODELS, and its size.
MODELS: dict[str, tuple[str, Size]] = {
    "Llama 4x256": ("Llama", SMALL),
    "Llama decode 1x1": ("Llama", _but(batch=1, seq=CACHE)),
    "GPT-2 4x256": ("GPT-2", SMALL),
    "BERT 4x128": ("BERT", _but(seq=128)),
    "ViT 4x224": ("ViT", _but(image=224)),
    "Mamba 1x256": ("Mamba", _but(batch=1)),
    "Mixtral 1x128": ("Mixtral", _but(batch=1, seq=128)),
}
DECODE = "Llama decode 1x1"
# A training step: the case, and whether dropout is left as the model's class has it.
TRAINING: dict[str, tuple[str, bool]] = {
    "Llama 4x256": ("Llama 4x256", True),  # has no dropout
    "BERT 4x128": ("BERT 4x128", False),
    "BERT 4x128, dropout": ("BERT 4x128", True),
}


@dataclass(frozen=True)
class Case:
    """A callable and the arguments of one call; calling it again gives the same."""

    fn: Callable[..., Any]
    args: tuple[torch.Tensor, ...] = ()
    kwargs: Mapping[str, torch.Tensor] = field(default_factory=dict)


class Decode(nn.Module):
    """One step of decoding: a token at a position, against a cache that holds every token before it.

    The position is set in the cache first, so that every call is the same step.
    """

    def __init__(self, model: nn.Module, length: int, dtype: torch.dtype) -> None:
        from transformers import StaticCache

        super().__init__()
        self.model = model
        config: Any = model.config
        self.cache = StaticCache(config=config, max_cache_len=length)
        wide = config.hidden_size // config.num_attention_heads
        self.cache.early_initialization(1, config.num_key_value_heads, wide, dtype, torch.device("cpu"))
        made = torch.Generator().manual_seed(1)
        for layer in self.cache.layers:
            for held in (layer.keys, layer.values):
                held.copy_(torch.randn(held.shape, generator=made))

    def forward(self, token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Logits [1, 1, vocabulary] for token [1, 1] at position [1]."""
        for layer in self.cache.layers:
            layer.cumulative_length.copy_(position[0])
        return self.model(
            input_ids=token, position_ids=position[None], past_key_values=self.cache, use_cache=True
        ).logits


def _cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.to(dtype) if x.is_floating_point() else x


def load(name: str, dtype: torch.dtype) -> Callable[[], Case]:
    """Build a case: random numbers are drawn in float32 from one seed and then cast, whatever the type."""
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    if name in MICRO or name in BOUND:
        if name in MICRO:
            fn, make = MICRO[name]
            made = make()
        else:
            fn, sized = BOUND[name]
            made = sized(2**27 // (_WIDE * dtype.itemsize))
        args = tuple(_cast(x, dtype) for x in made)
        del made
        return lambda: Case(fn, args)
    kind, size = MODELS[name]
    model, inputs = build(kind, size)
    model = model.to(dtype)
    if dtype is torch.float64 and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # torch's grouped product takes no float64
    if name == DECODE:
        token, position = torch.tensor([[17]]), torch.tensor([CACHE - 1])
        return lambda: Case(Decode(model, CACHE, dtype).eval(), (token, position))
    kwargs = {k: _cast(v, dtype) for k, v in inputs.items()}
    return lambda: Case(model, (), kwargs)


def load_training(name: str, dtype: torch.dtype) -> Callable[[], Case]:
    """The loss of a model in training mode; ``labels`` are the input's own tokens."""
    base, dropout = TRAINING[name]
    made = load(base, dtype)()
    model: Any = made.fn
    model.train()
    if not dropout:
        for m in model.modules():
            if isinstance(m, nn.Dropout):
                m.p = 0.0
            if hasattr(m, "attention_dropout") and not isinstance(m.attention_dropout, nn.Module):
                m.attention_dropout = 0.0
    kwargs = {**made.kwargs, "labels": made.kwargs["input_ids"]}
    return lambda: Case(model, (), kwargs)


def tensor_of(result: Any) -> torch.Tensor:
    """The main result: a tensor, or the loss or logits of a model's output."""
    if isinstance(result, torch.Tensor):
        return result
    return result["loss"] if result.get("loss") is not None else result["logits"]


# ---------------------------------------------------------------- micro-cases


def _norm_chain(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.softmax(F.layer_norm(F.gelu(x) + x, (x.shape[-1],), w), -1)


def _rms(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * w


def _rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _r(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


MICRO: dict[str, tuple[Callable[..., Any], Callable[[], tuple[torch.Tensor, ...]]]] = {
    "gelu-norm-softmax 4096x1024": (_norm_chain, lambda: (_r(4096, 1024), _r(1024))),
    "rms_norm 4096x1024": (_rms, lambda: (_r(4096, 1024), _r(1024))),
    "silu * gate 1024x3072": (lambda a, b: F.silu(a) * b, lambda: (_r(1024, 3072), _r(1024, 3072))),
    "gelu tanh + bias 1024x3072": (
        lambda x, b: F.gelu(x + b, approximate="tanh"),
        lambda: (_r(1024, 3072), _r(3072)),
    ),
    "cross entropy 256x32000": (F.cross_entropy, lambda: (_r(256, 32000), torch.randint(0, 32000, (256,)))),
    "rotary 4x12x256x64": (_rotary, lambda: (_r(4, 12, 256, 64), _r(256, 64), _r(256, 64))),
    "sum over rows 4096x1024": (lambda x: (x * x).sum(0), lambda: (_r(4096, 1024),)),
    "sum over columns 4096x1024": (lambda x: (x * x).sum(1), lambda: (_r(4096, 1024),)),
    "sum of all 4096x1024": (lambda x: (x - 1).abs().sum(), lambda: (_r(4096, 1024),)),
    "transpose and add 2048x2048": (lambda x, y: x.t() + y, lambda: (_r(2048, 2048), _r(2048, 2048))),
    "embedding sum 8192x768": (
        lambda i, w, p: w[i] + p,
        lambda: (torch.randint(0, 8192, (4, 256)), _r(8192, 768), _r(256, 768)),
    ),
    "attention causal 4x12x256x64": (_attention, lambda: tuple(_r(4, 12, 256, 64) for _ in range(3))),
}

# Memory-bound kernels on large arrays of 128 MiB, or of 256 MiB where only one is read, whatever their type: no cache
# holds part of them, not even two last caches of 32 MiB of which each thread has one. Built from the rows of 1024
# elements that 128 MiB are.
_WIDE = 1024
BOUND: dict[str, tuple[Callable[..., Any], Callable[[int], tuple[torch.Tensor, ...]]]] = {
    "relu and add": (lambda a, b: F.relu(a) + b, lambda n: (_r(n, _WIDE), _r(n, _WIDE))),
    "silu * gate": (lambda a, b: F.silu(a) * b, lambda n: (_r(n, _WIDE), _r(n, _WIDE))),
    "rms_norm": (_rms, lambda n: (_r(n, _WIDE), _r(_WIDE))),
    "sum over rows": (lambda x: (x * x).sum(0), lambda n: (_r(2 * n, _WIDE),)),
    "sum over columns": (lambda x: (x * x).sum(1), lambda n: (_r(2 * n, _WIDE),)),
    "sum of all": (lambda x: (x - 1).abs().sum(), lambda n: (_r(2 * n, _WIDE),)),
    "embedding sum": (
        lambda i, w, p: w[i] + p,
        lambda n: (torch.randperm(n).view(-1, 512), _r(n, _WIDE), _r(512, _WIDE)),
    ),
}
