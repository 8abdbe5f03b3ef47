"""What kernels took when they were compiled offline, as the tests read it: a file of rows by target, a line each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["Row", "write_rows"]

Row = list[int | str | None]


def write_rows(file: Path, what: str, columns: Sequence[str], rows: Mapping[str, Sequence[Row]]) -> None:
    """Write ``rows`` by target; ``what`` was compiled, in words."""
    import triton

    about = f"What Triton {triton.__version__} allocated for {what}, compiled offline, no GPU. columns: "
    texts = []
    for target, of_target in rows.items():
        lines = [json.dumps(row, separators=(",", ":")) for row in of_target]
        texts.append(f"{json.dumps(target)}:[\n" + ",\n".join(lines) + "]")
    head = f'{{"about":{json.dumps(about + ",".join(columns))},\n"targets":{{\n'
    file.write_text(head + ",\n".join(texts) + "\n}}\n")
