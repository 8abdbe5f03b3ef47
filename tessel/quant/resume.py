"""A work folder: layers that are finished, so that a run which was interrupted goes on where it was.

    work = Work(Path("out/.unfinished"), run_of(model, batches, scheme="w4a16", method="gptq"))
    work.write(name, layer, row); layer, row = work.read(name, whole)

``work.json`` says what the run is: a digest of the weights, one of the calibration data, and the arguments. A run that
differs in any of them is refused. A layer is one safetensors file, written beside its place and moved there: it is
complete or not there.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from torch import Tensor, nn

from ..errors import TesselError, check
from .files import safetensors, write_whole
from .linear import QuantLinear
from .report import LayerReport
from .scheme import Scheme

__all__ = ["Work", "forget", "run_of"]

_FORMAT = 1
_SAID, _BITS = "work.json", "bits.json"
_DIGESTS = {"model": "the model's weights", "calibration": "the calibration data"}


def run_of(model: nn.Module, batches: Sequence[Any] | None, **arguments: Any) -> dict[str, str]:
    """What tells one run from another, as texts by name: digests of weights and data, and the arguments.

    Raises:
        TesselError: weights without numbers (on the meta device).
    """
    own = hashlib.blake2b(digest_size=16)
    for name, t in sorted((*model.named_parameters(), *model.named_buffers()), key=lambda x: x[0]):
        check(t.device.type != "meta", lambda name=name: f"quantize: {name} has no numbers: it is on the meta device")  # type: ignore[misc]
        own.update(name.encode())
        _update(own, t)
    data = hashlib.blake2b(digest_size=16)
    _update(data, batches)
    return {"model": own.hexdigest(), "calibration": data.hexdigest(), **{k: repr(v) for k, v in arguments.items()}}


def _update(digest: Any, x: Any) -> None:
    """Add a value; what is neither a tensor nor a container counts as its ``repr``."""
    if isinstance(x, Tensor):
        digest.update(f"{x.dtype} {tuple(x.shape)}".encode())
        digest.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(x, Mapping):
        for key in x:
            digest.update(f"{key!r}:".encode())
            _update(digest, x[key])
    elif isinstance(x, list | tuple):
        digest.update(f"{type(x).__name__} {len(x)}".encode())
        for item in x:
            _update(digest, item)
    else:
        digest.update(repr(x).encode())


class Work:
    """The finished layers of one run, in a folder that is made if it is not there.

    Args:
        said: what the run is, see ``run_of``.

    Raises:
        TesselError: the folder holds another run (what differs is named), files that are no run's, or a run of an
            unknown version; safetensors is not installed.
    """

    def __init__(self, folder: Path, said: Mapping[str, str]) -> None:
        self.folder, self.files = folder, safetensors()
        check(not folder.exists() or folder.is_dir(), lambda: f"work folder {folder}: is no folder")
        folder.mkdir(parents=True, exist_ok=True)
        held = self._json(_SAID)
        if held is None:
            check(not any(folder.iterdir()), lambda: f"work folder {folder}: holds files of something else")
            self._put_json(_SAID, {"format": _FORMAT, "run": dict(said)})
            return
        version = held.get("format")
        check(version == _FORMAT, lambda: f"work folder {folder}: format {version!r}; {_FORMAT} is what can be read")
        run = held.get("run", {})
        differ = [_differs(name, run.get(name), said.get(name)) for name in said if run.get(name) != said[name]]
        check(
            not differ,
            lambda: f"work folder {folder} holds another run: {'; '.join(differ)}; name another folder or delete it",
        )

    def _json(self, name: str) -> Any:
        path = self.folder / name
        if not path.exists():
            return None
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as e:
            raise TesselError(f"work folder {self.folder}: {name} cannot be read ({e}); delete the folder") from e
        check(isinstance(value, dict), lambda: f"work folder {self.folder}: {name} is no record; delete the folder")
        return value

    def _put_json(self, name: str, value: Any) -> None:
        text = json.dumps(value, indent=1, allow_nan=False) + "\n"
        write_whole(self.folder / name, lambda path: path.write_text(text, encoding="utf-8"))

    def bits(self) -> dict[str, Any] | None:
        """How the budget was spent, if an earlier run came to that; ``put_bits`` keeps it."""
        return self._json(_BITS)  # type: ignore[no-any-return]

    def put_bits(self, value: Mapping[str, Any]) -> None:
        self._put_json(_BITS, dict(value))

    def _path(self, name: str) -> Path:
        return self.folder / f"{quote(name, safe='')}.safetensors"

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._path(name).exists()

    def write(self, name: str, layer: QuantLinear, row: LayerReport) -> None:
        """Keep a finished layer."""
        tensors = {n: t.contiguous() for n, t in layer.named_buffers()}
        said = {"row": json.dumps(asdict(row))}
        write_whole(self._path(name), lambda path: self.files.save_file(tensors, path, metadata=said))

    def read(self, name: str, whole: nn.Module, scheme: Scheme, dtype: torch.dtype) -> tuple[QuantLinear, LayerReport]:
        """A layer that an earlier run has finished.

        Args:
            whole: the layer as it was: its bias and device stay.

        Raises:
            TesselError: the file is damaged, or no layer of this shape.
        """
        path = self._path(name)
        try:
            with self.files.safe_open(path, framework="pt") as f:
                row = LayerReport.from_dict(json.loads(f.metadata()["row"]))
                tensors = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118  (no mapping)
        except Exception as e:  # safetensors has an exception type of its own
            raise TesselError(f"work folder {self.folder}: {path.name} cannot be read ({e}); delete that file") from e
        assert scheme.weight is not None
        n, k = row.shape
        made = QuantLinear(k, n, scheme.weight, scheme.activation, dtype)
        device = next(whole.parameters()).device
        for key in ("words", "scale", "zero", "table", "divisor", "sign", "order"):
            value = tensors.get(key)
            made.register_buffer(key, None if value is None else value.to(device), persistent=key != "table")
        bias: Any = getattr(whole, "bias", None)
        made.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        made.train(whole.training)
        return made, row


def _differs(name: str, then: str | None, now: str | None) -> str:
    return f"{_DIGESTS[name]} differ" if name in _DIGESTS else f"{name} was {then}, now {now}"


def forget(folder: Path) -> None:
    """Delete a work folder: the run is finished, and its result is somewhere else. What is no work folder stays."""
    if (folder / _SAID).is_file():
        shutil.rmtree(folder)
