"""What the benchmarks share: the models, captures that stop before anything runs, the machine in words, tables."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

REPO = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
if str(REPO) not in sys.path:
    sys.path.insert(0, str(REPO))

Case = tuple[torch.nn.Module, dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Size:
    """How large a model is built.

    Attributes:
        layers, hidden, heads: of the model; the feed-forward is four times as wide (Llama: 8/3, Mixtral: 2).
        mlp: how many times as wide the feed-forward is, for every model; None leaves the above.
        batch, seq: of the input; a picture has as many patches as a square of 16 x 16 pixels each gives.
        vocab: number of tokens.
        image: pixels a side.
    """

    layers: int = 1
    hidden: int = 256
    heads: int = 8
    batch: int = 4
    seq: int = 128
    vocab: int = 1024
    image: int = 128
    mlp: int | None = None

    def wide(self, usual: int) -> int:
        """Width of the feed-forward: ``mlp`` times the hidden size, else the ``usual``."""
        return usual if self.mlp is None else self.hidden * self.mlp


def llama(s: Size) -> Case:
    from transformers import LlamaConfig, LlamaForCausalLM

    return _decoder(LlamaForCausalLM, LlamaConfig, s, intermediate_size=s.wide(s.hidden * 8 // 3 // 16 * 16))


def mixtral(s: Size) -> Case:
    from transformers import MixtralConfig, MixtralForCausalLM

    more = {"intermediate_size": s.wide(s.hidden * 2), "num_local_experts": 8, "num_experts_per_tok": 2}
    return _decoder(MixtralForCausalLM, MixtralConfig, s, **more)


def qwen3_next(s: Size) -> Case:
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    more = {
        "intermediate_size": s.wide(s.hidden * 2),
        "head_dim": s.hidden // s.heads,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    }
    return _decoder(Qwen3NextForCausalLM, Qwen3NextConfig, s, **more)


def _decoder(model: Any, config: Any, s: Size, **more: Any) -> Case:
    made = config(
        vocab_size=s.vocab,
        hidden_size=s.hidden,
        num_hidden_layers=s.layers,
        num_attention_heads=s.heads,
        num_key_value_heads=s.heads // 2,
        max_position_embeddings=max(s.seq, 128),
        use_cache=False,
        **more,
    )
    return model(made).eval(), {"input_ids": torch.randint(3, s.vocab, (s.batch, s.seq))}


def gpt2(s: Size) -> Case:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=s.vocab,
        n_embd=s.hidden,
        n_layer=s.layers,
        n_head=s.heads,
        n_positions=max(s.seq, 128),
        n_inner=s.wide(4 * s.hidden),
        use_cache=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPT2LMHeadModel(config).eval(), {"input_ids": torch.randint(3, s.vocab, (s.batch, s.seq))}


def bert(s: Size) -> Case:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=s.vocab,
        hidden_size=s.hidden,
        num_hidden_layers=s.layers,
        num_attention_heads=s.heads,
        intermediate_size=s.wide(4 * s.hidden),
        max_position_embeddings=max(s.seq, 128),
    )
    return BertForMaskedLM(config).eval(), {"input_ids": torch.randint(3, s.vocab, (s.batch, s.seq))}


def vit(s: Size) -> Case:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=s.hidden,
        num_hidden_layers=s.layers,
        num_attention_heads=s.heads,
        intermediate_size=s.wide(4 * s.hidden),
        image_size=s.image,
        patch_size=16,
        num_labels=100,
    )
    return ViTForImageClassification(config).eval(), {"pixel_values": torch.randn(s.batch, 3, s.image, s.image)}


def mamba(s: Size) -> Case:
    """Without the optional kernels: a loop over the tokens in plain torch."""
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=s.vocab, hidden_size=s.hidden, num_hidden_layers=s.layers, use_cache=False)
    return MambaForCausalLM(config).eval(), {"input_ids": torch.randint(3, s.vocab, (s.batch, s.seq))}


MODELS: dict[str, Callable[[Size], Case]] = {
    "Llama": llama,
    "BERT": bert,
    "ViT": vit,
    "GPT-2": gpt2,
    "Mixtral": mixtral,
    "Mamba": mamba,
    "qwen3_next": qwen3_next,
}


def build(name: str, size: Size) -> Case:
    """The model of that name with the same random weights on every call, and its keyword inputs."""
    torch.manual_seed(0)
    return MODELS[name](size)


class Done(Exception):
    """A capture has what it wanted; raised to stop before code is generated or run."""


def stopped_by_done(e: BaseException | None) -> bool:
    """Whether an exception, or what caused it, is ``Done``: torch wraps what a backend raises."""
    seen = 0
    while e is not None and seen < 20:
        if isinstance(e, Done) or "Done:" in str(e) or str(e).strip() == "Done":
            return True
        e, seen = e.__cause__ or e.__context__, seen + 1
    return False


def captured(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The one inference graph of a model as ``tessel.compile`` would import it; nothing runs."""
    from tessel.frontend.capture import aot

    found: list[Any] = []

    def keep(imported: Any, info: Any) -> Any:
        found.append(imported)
        raise Done("captured")

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=lambda gm, inputs: aot(gm, inputs, keep), dynamic=False, fullgraph=True)
    try:
        with torch.no_grad():
            compiled(*args, **kwargs)
    except Exception as e:
        if not stopped_by_done(e):
            raise
    torch._dynamo.reset()
    (imported,) = found
    return imported


def machine() -> dict[str, Any]:
    """This machine and its software, in words that name no person, host or path."""
    import transformers
    import triton

    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "date": today(),
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as f:
            names = [line.partition(":")[2].strip() for line in f if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def write_result(name: str, data: Mapping[str, Any]) -> Path:
    """``benchmarks/results/<name>-<date>.json`` with the machine beside the data."""
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}-{today()}.json"
    file.write_text(json.dumps({"machine": machine(), **data}, indent=1) + "\n", encoding="utf-8")
    return file


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A markdown table; all columns but the first are aligned to the right."""
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, r))} |" for r in rows)])


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, least and largest of repeated measurements, and all of them."""
    ordered = sorted(values)
    return {
        "median": round(statistics.median(ordered), 4),
        "min": round(ordered[0], 4),
        "max": round(ordered[-1], 4),
        "all": [round(v, 4) for v in values],
    }
