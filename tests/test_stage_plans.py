"""Plans with pipeline stages: what stands in the file, the report and the page; what is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tessel.errors import TesselError
from tessel.sharding.captured import Captured, capture_model
from tessel.sharding.html import plan_page
from tessel.sharding.pipeline import microbatch_choices
from tessel.sharding.plan_file import ShardingPlan, parse_plan
from tessel.sharding.planner import Request, make_plan, make_staged_plan
from tessel.sharding.text import plan_text
from tessel.solve.pipeline import bubble, held
from tessel.targets.mesh import Mesh

CONFIGS = Path(__file__).resolve().parents[1] / "examples/configs"
LLAMA = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4,
         "num_hidden_layers": 7, "vocab_size": 512, "max_position_embeddings": 128}  # fmt: skip
GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 64, "n_layer": 3, "n_head": 4,
        "vocab_size": 256, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Captured:
    path = tmp_path_factory.mktemp("config") / "llama.json"
    path.write_text(json.dumps(json.loads((CONFIGS / "llama-3-8b.json").read_text()) | LLAMA))
    return capture_model(f"hf:{path}", batch=16, seq=64, train=True, microbatches=4)


@pytest.fixture(scope="module")
def plan(captured: Captured) -> ShardingPlan:
    asked = Request(train=True, microbatches=4, schedule="1f1b")
    return make_plan(captured, Mesh({"pp": 2, "dp": 2}), "h100", asked)


def test_a_plan_says_its_stages(plan: ShardingPlan) -> None:
    d = parse_plan(plan.text()).data
    p = d["pipeline"]
    assert [s["in_flight"] for s in p["stages"]] == [held("1f1b", 2, 4, s) for s in range(2)]
    works = [s["seconds"] for s in p["stages"]]
    assert d["time"]["bubble"] == pytest.approx((sum(works) - max(works)) / 4)
    assert p["bubble"] == pytest.approx(d["time"]["bubble"] / max(works))
    assert p["bubble"] <= bubble("1f1b", 2, 4) * (1 + 1e-9)
    # seven layers with embedding and head do not cut evenly, and no cut is more than a block off
    assert max(works) < 1.5 * min(works)
    parts = [n["part"] for n in d["nodes"]]
    assert parts == sorted(parts) and set(parts) == {0, 1}
    (sent,) = p["sends"]
    assert sent["shape"] == [4, 64, 256] and sent["bytes"] == 4 * 64 * 256 * 2 / 2  # bf16, over dp
    messages = [c for c in d["collectives"] if c["kind"] == "send"]
    said = [(c["phase"], c["times"], c["bytes"]) for c in messages]
    assert said == [(phase, 4, sent["bytes"]) for phase in ("forward", "backward")]
    assert d["memory"]["total"] == max(s["memory"]["total"] for s in p["stages"])
    assert {i for t in d["tensors"].values() for i in t["parts"]} == {0, 1}
    assert d["certificate"]["gap"] < 0.05
    text = plan_text(plan)
    assert "2 stages over pp, 1f1b, 4 microbatches" in text and "stage 1" in text and "handed from part to part" in text


def test_schedules_and_microbatches_are_chosen(captured: Captured) -> None:
    made = make_staged_plan({4: captured}, Mesh({"pp": 2, "dp": 2}), "h100", Request(train=True)).data["pipeline"]
    tried = {t["what"].partition(",")[0]: t["seconds"] for t in made["tried"]}
    assert set(tried) == {"1f1b", "interleaved of 2 chunks"}
    assert min(tried.values()) == made["tried"][0]["seconds"]
    asked = Request(train=True, microbatches=4, schedule="zb1p")
    d = make_plan(captured, Mesh({"pp": 2, "dp": 2}), "h100", asked).data
    assert d["certificate"]["bound"] < tried["1f1b"]
    assert any(n.startswith("zb1p: gradients of parameters are ") for n in d["provenance"]["notes"])
    assert microbatch_choices(64, 4, 8) == [8, 4] and microbatch_choices(3, 4, 1) == [3]


def test_more_memory_is_never_slower(captured: Captured) -> None:
    mesh, least = Mesh({"pp": 2, "dp": 2}), 26 * 2**20
    times = []
    for memory in (least, 40 * 2**20, 2**30):
        asked = Request(train=True, microbatches=4, schedule="1f1b", memory=memory)
        made = make_plan(captured, mesh, "h100", asked)
        assert all(s["memory"]["total"] <= memory for s in made.data["pipeline"]["stages"])
        times.append(made.step_seconds)
    assert all(a >= b * 0.999 for a, b in pairwise(times))
    with pytest.raises(TesselError, match=r"no cut into 2 stages fits .* more stages"):
        make_plan(captured, mesh, "h100", Request(train=True, microbatches=4, memory=2**20))


def test_a_tied_embedding_is_kept_by_both_stages(tmp_path: Path) -> None:
    path = tmp_path / "gpt2.json"
    path.write_text(json.dumps(GPT2))
    model = capture_model(f"hf:{path}", batch=8, seq=32, train=True, microbatches=4)
    d = make_plan(model, Mesh({"pp": 2}), "h100", Request(train=True, microbatches=4, schedule="1f1b")).data
    assert d["pipeline"]["tied"] == [{"tensor": "transformer.wte.weight", "parts": [0, 1]}]
    assert d["tensors"]["transformer.wte.weight"]["parts"] == [0, 1]
    ties = [c for c in d["collectives"] if c["axis"] == "pp" and c["kind"] == "all-reduce"]
    assert [c["bytes"] for c in ties] == [256 * 64 * 2] * 2 and {c["part"] for c in ties} == {0, 1}
    held_ = [s["memory"]["parameters"] for s in d["pipeline"]["stages"]]
    assert sum(held_) == 2 * (d["model"]["parameters"] + 256 * 64)
    # round a V both uses are on one stage
    v = make_plan(model, Mesh({"pp": 2}), "h100", Request(train=True, microbatches=4, schedule="zbv")).data
    assert v["pipeline"]["tied"] == [] and v["pipeline"]["parts"][-1]["stage"] == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d["pipeline"]["stages"].pop(), "1 stages, the mesh has 2"),
        (lambda d: d["pipeline"].update(chunks=2), "2 parts, 2 stages of 2 chunks hold 4"),
        (lambda d: d["pipeline"]["parts"][1].update(stage=0), "1f1b has part 1 on stage 1, not 0"),
        (lambda d: d["pipeline"].update(schedule="2f2b"), "expected one of gpipe"),
        (lambda d: d["pipeline"].update(axis="xx"), "'xx' is no axis of the mesh"),
        (lambda d: d["nodes"][0].update(part=1), "not in the order of the parts"),
        (lambda d: d["pipeline"]["sends"].clear(), "0 tensors are handed on between 2 parts"),
        (lambda d: d["collectives"][0].update(part=7), "in a part that is none"),
        (lambda d: d["time"].update(bubble=d["time"]["bubble"] + 1), "the terms add up to"),
    ],
)
def test_damaged_stages_are_refused(plan: ShardingPlan, change: Callable[[Any], Any], words: str) -> None:
    data = copy.deepcopy(dict(plan.data))
    change(data)
    with pytest.raises(TesselError, match=words):
        parse_plan(json.dumps(data))


class _Page(HTMLParser):
    """Tags, attributes and texts of a page; every tag that opens is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "line", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag != "rect":
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page(plan: ShardingPlan) -> None:
    page = _Page(plan_page(plan))
    assert page.open == []
    names = [t for t, _ in page.tags]
    assert names.count("svg") == 5 and names.count("h2") == 9  # memory, terms, microbatches, forward and backward
    assert not {"script", "link", "img", "iframe"} & set(names)
    assert not any(k in ("src", "href", "onclick", "onload") for _, attrs in page.tags for k in attrs)
    text = "".join(page.texts)
    for word in (
        "Microbatches by stage",
        "stage 1",
        "Collectives of one device",
        "model.layers.0",
        "send",
        "hands its",
    ):
        assert word in text, word
    forwards = [t for t in page.texts if ": forward of microbatch" in t]
    assert len(forwards) == 2 * 4
    boxes = [a for t, a in page.tags if t == "rect"]
    assert all(float(a["x"] or -1) >= 0 and float(a["x"] or 0) + float(a["width"] or 0) <= 1200 for a in boxes)


def test_a_page_escapes_what_a_model_is_called(plan: ShardingPlan) -> None:
    data = copy.deepcopy(dict(plan.data))
    hostile = '</title><script>alert("x")</script>'
    data["model"]["name"] = data["nodes"][3]["name"] = data["collectives"][0]["why"] = hostile
    data["provenance"]["notes"] = [hostile]
    text = plan_page(ShardingPlan(data))
    assert "<script" not in text and "&lt;script&gt;" in text


def test_a_page_without_stages(captured: Captured) -> None:
    page = _Page(plan_page(make_plan(captured, Mesh({"dp": 2}), "h100", Request(train=True, microbatches=4))))
    assert [t for t, _ in page.tags].count("svg") == 4 and "every device" in "".join(page.texts)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-3-8b", "llama-3-70b"])
def test_llama_3_in_four_stages(name: str) -> None:
    model = capture_model(f"hf:{CONFIGS / name}.json", batch=64, seq=4096, train=True, microbatches=32)
    d = make_plan(model, Mesh({"pp": 4, "tp": 8}), "h100", Request(train=True, microbatches=32)).data
    assert all(s["memory"]["total"] <= d["settings"]["memory_limit"] for s in d["pipeline"]["stages"])
    works = [s["seconds"] for s in d["pipeline"]["stages"]]
    assert max(works) / min(works) < 1.1 and d["certificate"]["gap"] < 0.015
