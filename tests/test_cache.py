"""The cache of tuned tiles: what is put is got, what is wrong is a miss and a counter, files that travel."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import pickle
import re
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from kernels import Program, fused_kernel, product_kernel

from tessel.autotune import cache as cache_module
from tessel.autotune.cache import Cache, default_cache
from tessel.autotune.entry import MAX_BYTES, Broken, Entry, Key, Times, better, decode, encode, parse_json
from tessel.autotune.key import key_of, version_of
from tessel.autotune.known import legal_tile, lookup, remember
from tessel.autotune.transfer import dump, import_entries, load, merged, read_file, write_file
from tessel.autotune.upkeep import prune, verify
from tessel.autotune.why import why
from tessel.cli import main
from tessel.errors import TesselError
from tessel.solve import tile
from tessel.targets import get_target
from tessel.tiles.kernel import Kernel

H100, H200 = get_target("h100"), get_target("h200")


def gemm(m: int = 4096, n: int = 4096, k: int = 4096, dtype: torch.dtype = torch.bfloat16) -> Kernel:
    return product_kernel(torch.empty(m, k, dtype=dtype, device="meta"), torch.empty(k, n, dtype=dtype, device="meta"))


def made(number: int = 0, *, runs: int = 0, median: float = 1e-4, **key: object) -> Entry:
    """An entry; ``runs`` above 0 makes it a measured one."""
    fields: dict[str, object] = {
        "device": "h100", "units": 132, "arch": "sm_90", "tessel": "0.1.0", "triton": "3.7", "template": "a" * 16,
        "family": "matmul", "dtypes": "bf16", "computation": f"{number:064x}", "strides": "(p/16,1)",
        "shape": "m=64/64",
    }  # fmt: skip
    times = {"warm": Times(median, median * 0.9, median * 1.1, runs)} if runs else {}
    return Entry(Key(**{**fields, **key}), {"BM": 128, "variant": "tma"}, {"total": 2e-4, "fill": 1e-6}, times)  # type: ignore[arg-type]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "tiles"


@pytest.fixture
def own(root: Path) -> Cache:
    return Cache(root)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's own cache, elsewhere."""
    monkeypatch.setenv("TESSEL_CACHE_DIR", str(tmp_path / "home"))
    yield tmp_path / "home" / "tiles"


def only_file(root: Path) -> Path:
    (path,) = root.iterdir()
    return path


# ---------------------------------------------------------------- get and put


def test_what_is_put_is_got(own: Cache, root: Path) -> None:
    entry = made(runs=20)
    assert own.get(entry.key) is None and not root.exists()  # looking makes nothing
    assert own.put(entry) and own.get(entry.key) == entry and Cache(root).get(entry.key) == entry
    assert stat.S_IMODE(root.stat().st_mode) == 0o700 and stat.S_IMODE(only_file(root).stat().st_mode) == 0o600
    assert own.stats() == {"hit": 1, "miss": 1, "put": 1}
    assert own.get(made(1).key) is None
    assert pickle.loads(pickle.dumps(entry)) == entry


def test_a_file_is_magic_length_json_and_checksum(own: Cache, root: Path) -> None:
    own.put(made())
    data = only_file(root).read_bytes()
    length = int.from_bytes(data[8:12], "big")
    assert data[:8] == b"TESSEL1\n" and len(data) == 12 + length + 32
    assert json.loads(data[12 : 12 + length])["key"]["device"] == "h100"


def test_a_measurement_replaces_a_prediction_and_never_the_reverse(own: Cache, root: Path) -> None:
    guess, real = made(), made(runs=5)
    own.put(guess)
    assert own.get(guess.key) == guess
    own.put(real)
    assert own.get(guess.key) == real and len(own.files()) == 1
    assert own.put(guess) and own.get(guess.key) == real
    again = made(runs=3, median=3e-4)
    assert own.put(again) and own.get(guess.key) == again  # the newer measurement
    # a predictor that looked before the measurement came, and writes after it
    stem = only_file(root).name.removesuffix(".measured")
    (root / f"{stem}.predicted").write_bytes(encode(guess))
    (root / f"{stem}.predicted").chmod(0o600)
    assert own.get(guess.key) == again and own.entries() == [again]


def test_a_tile_is_checked_at_every_hit(own: Cache) -> None:
    kernel = gemm()
    knobs = tile(kernel, H100).knobs
    assert remember(kernel, H100, knobs, predicted={"total": 1e-3}, cache=own)
    hit = lookup(kernel, H100, cache=own)
    assert hit is not None and hit.knobs == knobs and hit.entry.kind == "predicted"
    assert lookup(kernel, H100, cache=own, legal=lambda k: "no") is None
    assert lookup(kernel, H200, cache=own) is None
    big = {**knobs, "BM": 256, "BN": 256, "BK": 256, "num_stages": 5}
    remember(kernel, H100, big, cache=own)
    assert lookup(kernel, H100, cache=own) is None
    remember(kernel, H100, {**knobs, "BM": "x"}, cache=own)  # a word where the template wants a number
    assert lookup(kernel, H100, cache=own) is None
    assert own.stats()["illegal"] == 3

    def broken(knobs: object) -> str:
        raise KeyError("BQ")

    remember(kernel, H100, knobs, cache=own)
    assert lookup(kernel, H100, cache=own, legal=broken) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"BM": 48}, "BM=48 is none of"),
        ({"BQ": 16}, "no knob 'BQ'"),
        ({"BM": 256, "BN": 256, "BK": 128}, "bytes of shared memory, h100 has 232448"),
        ({}, None),
    ],
)
def test_default_legality_is_the_templates(change: dict[str, int], words: str | None) -> None:
    kernel = gemm()
    said = legal_tile(kernel, H100, {**tile(kernel, H100).knobs, **change})
    assert said is None if words is None else words in str(said)
    x = fused_kernel(*(torch.empty(64, 64, device="meta") for _ in range(3)))
    limits = dataclasses.replace(H100.limits, threads_per_block=64)  # type: ignore[type-var]
    small = dataclasses.replace(H100, limits=limits)
    assert "8 warps are more than 64 threads" in str(legal_tile(x, small, {"XB": 256, "num_warps": 8, "num_stages": 1}))


def test_another_driver_is_a_recheck_and_no_miss(own: Cache) -> None:
    kernel = gemm()
    times = {"warm": Times(1e-3, 9e-4, 2e-3, 20)}
    knobs = tile(kernel, H100).knobs
    remember(kernel, H100, knobs, measured=times, here={"driver": "550.1", "tolerance": 1e-2}, cache=own)
    same = lookup(kernel, H100, here={"driver": "550.1"}, cache=own)
    assert same is not None and same.recheck == () and same.entry.provenance["torch"]
    hit = lookup(kernel, H100, here={"driver": "560.0", "torch": "9.9", "clock_hz": 1e9}, cache=own)
    assert hit is not None
    assert hit.recheck == ("driver: 550.1 -> 560.0", f"torch: {version_of('torch')} -> 9.9")  # no clock was kept


def test_nearest_shapes_first(own: Cache) -> None:
    for m in (512, 2048, 4096, 16384):
        kernel = gemm(m)
        remember(kernel, H100, tile(kernel, H100).knobs, cache=own)
    remember(gemm(8192), H200, {"BM": 64}, cache=own)
    remember(gemm(8192, dtype=torch.float16), H100, {"BM": 64}, cache=own)
    near = own.nearest(key_of(gemm(8192), H100))
    shapes = [e.key.shape.split()[0] for e in near]
    assert set(shapes[:2]) == {"m=4096/128", "m=16384/128"} and shapes[2:] == ["m=2048/128"]
    assert own.nearest(key_of(gemm(4096), H100), limit=1)[0].key.shape.startswith("m=2048")


def test_find_or_make_makes_once_a_process(own: Cache) -> None:
    entry, count, barrier = made(runs=1), [], threading.Barrier(8)

    def make() -> Entry:
        count.append(1)
        return entry

    def work() -> None:
        barrier.wait()
        assert own.find_or_make(entry.key, make) == entry

    threads = [threading.Thread(target=work) for _ in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(count) == 1
    assert own.find_or_make(made(1).key, lambda: None) is None


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("how", "counter"),
    [
        ("flip", "corrupt"), ("cut", "corrupt"), ("empty", "corrupt"), ("longer", "corrupt"), ("huge", "too_large"),
        ("link", "symlink"), ("pipe", "not_a_file"), ("folder", "not_a_file"), ("open", "foreign"),
        ("another key", "wrong_key"), ("another kind", "wrong_key"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_a_miss_and_a_counter(own: Cache, root: Path, tmp_path: Path, how: str, counter: str) -> None:
    entry = made()
    own.put(entry)
    path = only_file(root)
    data = path.read_bytes()
    changed = {
        "flip": data[:40] + bytes([data[40] ^ 1]) + data[41:],
        "cut": data[:-1],
        "empty": b"",
        "longer": data + b" ",
        "huge": b"x" * (MAX_BYTES + 1),
        "another key": encode(made(7)),
        "another kind": encode(made(runs=1)),
    }
    if how in changed:
        path.write_bytes(changed[how])
    elif how == "open":
        path.chmod(0o666)
    else:
        path.unlink()
        if how == "link":
            (tmp_path / "target").write_bytes(data)
            path.symlink_to(tmp_path / "target")
        elif how == "pipe":
            os.mkfifo(path)
        else:
            path.mkdir()
    fresh = Cache(root)
    assert fresh.get(entry.key) is None
    assert fresh.stats() == {counter: 1, "miss": 1}
    assert list(verify(fresh).broken) == [path.name]
    if how == "folder":
        assert not fresh.put(entry) and fresh.get(entry.key) == entry  # from memory
        assert fresh.stats()["not_written"] == 1
    else:
        assert fresh.put(entry) and Cache(root).get(entry.key) == entry  # written anew


@pytest.mark.parametrize("how", ["open", "group", "file", "link", "link above", "everybody above", "foreign"])
def test_a_doubtful_directory_is_not_used(
    root: Path, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = made()
    Cache(root).put(entry)
    words = "symlink"
    if how in ("open", "group"):
        root.chmod(0o777 if how == "open" else 0o770)
        words = "open to other users"
    elif how == "file":
        root.rename(tmp_path / "away")
        root.write_text("")
        words = "not a directory"
    elif how == "link":
        root.rename(tmp_path / "away")
        root.symlink_to(tmp_path / "away")
    elif how == "link above":
        (tmp_path / "link").symlink_to(tmp_path)
        root = tmp_path / "link" / "tiles"
    elif how == "everybody above":
        tmp_path.chmod(0o777)
        words = "may be written to by everybody"
    else:
        monkeypatch.setattr(os, "getuid", lambda: 12345)
        words = "belongs to another user"
    own = Cache(root)
    with pytest.warns(UserWarning, match=f"tuned tiles are not kept: .*{words}") as seen:
        assert own.get(entry.key) is None and not own.put(entry)
        assert own.get(entry.key) == entry and own.nearest(entry.key) == own.entries() == []  # memory alone
    assert len(seen) == 1 and own.stats()["unsafe_directory"] >= 4
    with pytest.raises(TesselError, match=words):
        import_entries(own, [entry])
    tmp_path.chmod(0o700)


def test_a_directory_swapped_while_it_is_in_use(own: Cache, root: Path, tmp_path: Path) -> None:
    entry = made()
    own.put(entry)
    root.rename(tmp_path / "away")
    assert own.get(made(1).key) is None and own.put(made(1)) and own.entries() == [made(1)]
    root.chmod(0o777)
    with pytest.warns(UserWarning, match="open to other users"):
        assert own.entries() == []
    root.chmod(0o700)
    assert own.entries() == [made(1)]


@pytest.mark.parametrize("call", ["open", "write", "rename"])
def test_a_disk_that_fails(own: Cache, root: Path, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old = made(runs=1)
    own.put(old)
    left = root / ".new-1-dead"
    left.write_bytes(b"x")
    os.utime(left, (0, 0))
    real = getattr(os, call)

    def full(*args: object, **kwargs: object) -> object:
        if call == "open" and not str(args[0]).startswith(".new-"):
            return real(*args, **kwargs)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache_module.os, call, full)
    assert not own.put(made(1, runs=2)) and own.get(made(1).key) == made(1, runs=2)
    monkeypatch.undo()
    assert own.get(old.key) == old and len(own.files()) == 1  # nothing half written; the dead writer's file is gone
    assert own.stats()["not_written"] == 1


def test_an_entry_that_is_no_plain_data_is_not_kept(own: Cache) -> None:
    for bad in ({"BM": float("nan")}, {"BM": object()}, {"BM": -1}, {"BM": True}, {"": 1}, {}, {"BM": "a b"}):
        assert not own.put(dataclasses.replace(made(), knobs=bad))
    assert not own.put(dataclasses.replace(made(), predicted={"total": float("inf")}))
    assert not own.put(dataclasses.replace(made(), provenance={"driver": "x" * 10_000}))
    assert own.stats() == {"not_written": 9} and own.get(made().key) is None


def test_without_a_home_nothing_is_kept_and_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(cache_module, "cache_dir", nobody)
    assert lookup(gemm(), H100) is None
    with pytest.raises(TesselError, match="set TESSEL_CACHE_DIR"):
        default_cache()


# ---------------------------------------------------------------- bytes


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b'{"a": 1, "a": 2}', "a name stands twice"),
        (b"[NaN]", "NaN is no number"),
        (b"[" * 50 + b"]" * 50, "nested 50 deep"),
        (b'{"a":' * 9000 + b"1" + b"}" * 9000, "nested 9000 deep"),
        (b"[1" + b"0" * 5000 + b"]", "no JSON"),
        (b"\xff", "no JSON"),
        (b"{", "no JSON"),
        (b" " * (MAX_BYTES + 1), "more than"),
    ],
)
def test_odd_json(text: bytes, words: str) -> None:
    with pytest.raises(Broken, match=words):
        parse_json(text)


def test_brackets_in_strings_are_no_nesting() -> None:
    assert parse_json(rb'{"a": "[[[[[[[[[[[[\"[[[["}') == {"a": '[[[[[[[[[[[["[[[['}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"file": "../../etc/passwd"}, "entry: unknown field 'file'"),
        ({"knobs": None}, "knobs: expected names and values"),
        ({"knobs": {"BM": 1.5}}, "knobs.BM: expected a whole number"),
        ({"knobs": {"../x": 1}}, "is no name"),
        ({"knobs": {f"k{i}": 1 for i in range(65)}}, "65 names, the limit is 64"),
        ({"measured": {"hot": {"median": 1, "low": 1, "high": 1, "runs": 1}}}, "modes are warm and cold"),
        ({"measured": {"warm": {"median": 2, "low": 1, "high": 1, "runs": 1}}}, "the median is not between"),
        ({"measured": {"warm": {"median": 1, "low": 1, "high": 1}}}, "missing field 'runs'"),
        ({"predicted": {"total": -1}}, "expected seconds"),
        ({"predicted": {"total": 1e999}}, "expected seconds"),
        ({"provenance": {"driver": [1]}}, "expected text or a number"),
        ({"provenance": {"driver": "a\x1b[31m"}}, "printable"),
    ],
)
def test_every_field_is_checked(change: dict[str, object], words: str) -> None:
    line = json.dumps({**made(runs=1).plain(), **change})
    with pytest.raises(Broken, match=re.escape(words)):
        from tessel.autotune.entry import entry_from

        entry_from(json.loads(line))


def test_decode_of_any_prefix_and_any_flip_is_refused() -> None:
    data = encode(made(runs=3))
    for i in range(len(data)):
        with pytest.raises(Broken):
            decode(data[:i])
        with pytest.raises(Broken):
            decode(data[:i] + bytes([data[i] ^ 0x20]) + data[i + 1 :])


# ---------------------------------------------------------------- files that travel


def test_export_and_import(own: Cache, tmp_path: Path) -> None:
    entries = [made(i, runs=i % 3) for i in range(10)]
    for e in reversed(entries):
        own.put(e)
    data = dump(own.entries())
    assert data == dump(reversed(entries)) and data.count(b"\n") == 12
    write_file(tmp_path / "out", data)
    there = Cache(tmp_path / "there")
    done = import_entries(there, read_file(tmp_path / "out"))
    assert (done.new, done.replaced, done.kept) == (10, 0, 0) and there.entries() == own.entries()
    again = import_entries(there, read_file(tmp_path / "out"))
    assert (again.new, again.replaced, again.kept) == (0, 0, 10)


def test_merge_takes_the_better_whatever_the_order() -> None:
    a = [made(1), made(2, runs=5), made(3, runs=5, median=2.0)]
    b = [made(1, runs=1), made(2), made(3, runs=5, median=1.0), made(4)]
    both = merged([*a, *b])
    assert dump(both) == dump(merged([*b, *a])) and set(both) == {b[0], a[1], b[2], b[3]}
    assert better(made(runs=9, median=9.0), made(runs=3)).measured["warm"].runs == 9


def sealed(lines: list[bytes]) -> bytes:
    """Lines with a right checksum."""
    import hashlib

    body = b"".join(line + b"\n" for line in lines)
    return body + b'{"sha256":"%s"}\n' % hashlib.sha256(body).hexdigest().encode()


HEAD = b'{"entries":1,"format":1,"kind":"tessel tiles"}'
GOOD = dump([made()]).splitlines()[1]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (dump([made()])[:-40], "truncated"),
        (dump([made()])[:100], "truncated"),
        (dump([made()])[:-1], "truncated"),
        (dump([made()]) + b"x\n", "truncated, or longer"),
        (dump([made()]).replace(b"h100", b"h200"), "the checksum is wrong"),
        (sealed([HEAD.replace(b'format":1', b'format":2'), GOOD]), "newer Tessel (format 2, this one reads 1)"),
        (sealed([HEAD.replace(b'format":1', b'format":"1"'), GOOD]), "first line"),
        (sealed([HEAD.replace(b'entries":1', b'entries":99999999999'), GOOD]), "number of entries"),
        (sealed([HEAD.replace(b'entries":1', b'entries":-1'), GOOD]), "number of entries"),
        (sealed([HEAD.replace(b'entries":1', b'entries":true'), GOOD]), "number of entries"),
        (sealed([HEAD, GOOD.replace(b'"knobs"', b'"../../knobs"')]), "line 2: entry: "),
        (sealed([HEAD, GOOD.replace(b"0" * 64, b"../" * 21 + b"x")]), "line 2: key.computation is no digest"),
        (sealed([HEAD, b"[" * 5000 + b"]" * 5000]), "line 2: nested 5000 deep"),
        (sealed([HEAD, GOOD[:-1] + b',"x":"' + b"y" * MAX_BYTES + b'"}']), "line 2: more than"),
        (sealed([HEAD.replace(b'entries":1', b'entries":2'), GOOD, GOOD]), "a key stands twice"),
        (b"[" * 100_000, "not an export"),
        (b"\x80\x04pickle", "not an export"),
        (b"", "not an export"),
    ],
)  # fmt: skip
def test_a_bad_import_writes_nothing(data: bytes, words: str, home: Path, tmp_path: Path) -> None:
    file = tmp_path / "in"
    file.write_bytes(data)
    result = run("import", str(file))
    assert result.exit_code == 2 and words in result.output and str(file) in result.output
    assert "Traceback" not in result.output and len(result.output.strip().splitlines()) == 1 and not home.exists()
    with pytest.raises(TesselError):
        load(data, "it")


def test_a_huge_import_is_not_read_whole(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "in"
    with file.open("wb") as f:
        f.truncate(2**40)
    result = run("import", str(file))
    assert result.exit_code == 2 and "more than 64 MiB" in result.output and not home.exists()


@pytest.mark.parametrize("how", ["pipe", "folder", "zeros", "none"])
def test_an_import_that_is_no_file(home: Path, tmp_path: Path, how: str) -> None:
    path = Path("/dev/zero") if how == "zeros" else tmp_path / "in"
    if how == "pipe":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    for args in (("import", str(path)), ("merge", str(path), str(path))):
        result = run(*args)
        assert result.exit_code == 2 and str(path) in result.output and not home.exists()
        assert len(result.output.strip().splitlines()) == 1


# ---------------------------------------------------------------- upkeep


def test_verify_and_prune(root: Path) -> None:
    now = 1_000_000_000.0
    own = Cache(root, clock=lambda: now)
    for i in range(6):
        own.put(made(i, runs=i % 2, tessel="0.0.1" if i == 5 else "0.1.0"))
    names = {own.inspect(n)[0].key.computation[-1]: n for n in own.files()}  # type: ignore[union-attr]
    for i in range(6):
        os.utime(root / names[str(i)], (0, now - 86400 * (i + 1)))
    (root / names["0"]).write_bytes(b"x")
    (root / "README").write_text("mine")
    for name, age in ((".new-1-a", 7200), (".new-1-b", 10)):
        (root / name).write_bytes(b"x")
        os.utime(root / name, (0, now - age))
    checked = verify(own)
    assert len(checked.sound) == 5
    assert checked.broken == {
        names["0"]: "corrupt",
        "README": "no entry",
        ".new-1-a": "leftover",
        ".new-1-b": "leftover",
    }
    done = prune(own, older_than=86400 * 4.5)
    assert set(done.removed) == {names["0"], "README", ".new-1-a", names["4"], names["5"]} and done.left == 3
    assert set(own.files()) == {names["1"], names["2"], names["3"], ".new-1-b"}
    size = own.size(names["3"])
    done = prune(own, max_bytes=size + 10)  # predictions first, then the oldest
    assert set(done.removed) == {names["2"], names["3"]} and done.left == 1 and done.bytes_left <= size + 10
    assert names["1"] in own.files()
    past = Cache(root, clock=lambda: 0.0)  # a clock set back makes nothing old
    assert not prune(past, older_than=1).removed and past.get(made(1).key) == made(1, runs=1)
    assert set(prune(own, versions=True).removed) == {names["1"]}  # not today's template


# ---------------------------------------------------------------- why


def test_why_names_the_first_difference(own: Cache) -> None:
    kernel = gemm()
    assert str(why(kernel, H100, own)) == "miss: the cache is empty"
    knobs = tile(kernel, H100).knobs
    remember(kernel, H100, knobs, cache=own)
    assert str(why(kernel, H100, own)) == "hit (predicted)"
    answer = why(kernel, H200, own)
    assert (
        answer.field == "device"
        and "device: wanted h200; the nearest entry" in str(answer)
        and "has h100" in str(answer)
    )
    assert why(gemm(100), H100, own).field == "shape"
    assert why(gemm(dtype=torch.float16), H100, own).field == "dtypes"
    p = Program("pointwise", x0=64)
    o = p.param((64,), torch.float32, out=True)
    p.store(o, ("x0",), p.op("cast", 1.0, dtype=torch.float32))
    assert why(p.kernel(), H100, own).field == "template"  # every family has its own text
    remember(kernel, H100, {**knobs, "BM": 17}, cache=own)
    assert "the tile kept is not legal: matmul template: BM=17 is none of" in str(why(kernel, H100, own))


# ---------------------------------------------------------------- command line


def run(*args: str) -> Result:
    return CliRunner().invoke(main, ["cache", *args])


def test_cli(home: Path, tmp_path: Path) -> None:
    assert "no entries" in run("ls").output
    for i in range(3):
        default_cache().put(made(i, runs=i))
    result = run("ls")
    assert result.exit_code == 0 and result.output.count("h100") == 3 and "100.0 µs" in result.output
    key = made(2).key.digest[:8]
    shown = run("show", key)
    assert shown.exit_code == 0 and json.loads(shown.output)["kind"] == "measured"
    for bad, words in (("zz", "no entry whose key starts with 'zz'"), ("", "no entry whose key")):
        result = run("show", bad)
        assert result.exit_code == 2 and words in result.output
    out = tmp_path / "out"
    assert run("export", str(out)).exit_code == 0 and out.read_bytes() == dump(default_cache().entries())
    merge = run("merge", str(out), str(out), "--out", str(tmp_path / "both"))
    assert merge.exit_code == 0 and (tmp_path / "both").read_bytes() == out.read_bytes()
    assert run("merge", str(out)).exit_code == 2
    assert "0 entries new, 0 replaced, 3 kept" in run("import", str(out)).output
    assert run("verify").exit_code == 0
    (home / "odd\x1b[31m").write_text("")
    result = run("verify")
    assert result.exit_code == 1 and "odd?[31m: no entry" in result.output
    assert "1 files removed" in run("prune").output
    assert run("prune", "--max-size", "x").exit_code == 2
    assert "0 entries left" in run("prune", "--max-size", "0").output
    assert run("export", str(tmp_path / "none" / "x")).exit_code == 2
    assert run("import", str(tmp_path / "none")).exit_code == 2
    home.chmod(0o777)
    result = run("ls")
    assert result.exit_code == 2 and "open to other users" in result.output


MODEL = """
import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = torch.nn.Linear(64, 256, dtype=torch.bfloat16, device="meta")
    def forward(self, x):
        return torch.softmax(torch.relu(self.a(x)), -1)
def net(batch=32): return Net(), (torch.empty(batch, 64, dtype=torch.bfloat16, device="meta"),)
def bad(): raise ValueError("no such thing")
def refuses():
    def f(x):
        raise RuntimeError("not today")
    return f, (torch.empty(3),)
"""


def test_cli_why(home: Path, tmp_path: Path) -> None:
    from tessel.autotune.kernels import kernels_of
    from tessel.models import load_model

    file = tmp_path / "my_model.py"
    file.write_text(MODEL)
    result = run("why", f"{file}:net", "--target", "h100")
    assert result.exit_code == 0 and "miss: the cache is empty" in result.output, result.output
    torch._dynamo.reset()
    found = kernels_of(*load_model(f"{file}:net"))
    assert {f.kernel.family for f in found} == {"matmul", "reduction"} and "my_model.py:8" in found[0].places[0]
    for f in found:
        remember(f.kernel, H100, tile(f.kernel, H100).knobs)
    torch._dynamo.reset()
    assert "2 of 2 kernels hit for h100" in run("why", f"{file}:net", "--target", "h100").output
    torch._dynamo.reset()
    other = run("why", f"{file}:net", "--target", "h100", "--batch", "64").output
    assert "0 of 2 kernels hit" in other and other.count("miss: shape: wanted") == 2
    for spec, words in (
        ("bad", r"ValueError: no such thing \(.*my_model.py:10\)"),
        ("refuses", r"not today.*my_model.py:13\)"),
    ):
        torch._dynamo.reset()
        result = run("why", f"{file}:{spec}", "--target", "h100")
        assert result.exit_code == 2 and re.search(words, result.output), result.output
        assert len(result.output.strip().splitlines()) == 1
    assert "has no tuned tiles" in run("why", f"{file}:net", "--target", "cpu").output
    assert "unknown target" in run("why", f"{file}:net", "--target", "h10").output
