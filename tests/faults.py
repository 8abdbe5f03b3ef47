"""All that can go wrong with a cache of tuned tiles, done to one: ``make test-faults`` prints what came of it.

    python tests/faults.py [--quick] [CASE ...]

A cache may be lost. It must never give a wrong entry, never crash who asks, and never make a process tune one
kernel twice. Exit status 1 if it did. Cases that need a mount or root say what they did instead where they have
none: nothing is counted that was not done.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from kernels import product_kernel

from tessel.autotune.cache import Cache
from tessel.autotune.entry import MAX_BYTES, Entry, Key, Times, decode, encode
from tessel.autotune.key import key_of
from tessel.autotune.known import legal_tile, lookup, remember
from tessel.autotune.transfer import dump, load
from tessel.autotune.upkeep import prune, verify
from tessel.errors import TesselError
from tessel.solve import tile
from tessel.targets import get_target

KEYS = 32
NOBODY = 65534
QUICK = {"killed writers": 15, "corrupt files": 800, "corrupt exports": 200, "tuned at once": 3, "planted links": 3}
FULL = {
    "killed writers": 200,
    "corrupt files": 10_000,
    "corrupt exports": 2_000,
    "tuned at once": 40,
    "planted links": 50,
}


@dataclasses.dataclass
class Figures:
    """What came of one case: what was ``done`` how often; reads, and wrong ones; crashes; how often one process
    tuned one kernel at most; what else was counted."""

    done: str = ""
    reads: int = 0
    wrong: int = 0
    crashes: int = 0
    tuned: int = 0
    seen: Counter[str] = dataclasses.field(default_factory=Counter)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.wrong and not self.crashes and self.tuned <= 1

    def expect(self, right: bool, what: str) -> None:
        """Count what must be true; anything else is shown."""
        if not right:
            self.wrong += 1
            print(f"wrong: {what}", file=sys.stderr)

    def read(self, entry: Entry | None, number: int | None = None) -> Entry | None:
        """Count a read: right are a miss, and an entry that was written under the key asked for."""
        self.reads += 1
        if entry is not None:
            self.expect(whole(entry) and number in (None, number_of(entry)), f"read {number}, got {entry.plain()}")
        return entry


# ---------------------------------------------------------------- entries that tell whether they are whole


def key(number: int) -> Key:
    computation = hashlib.sha256(b"%d" % number).hexdigest()
    return Key(
        "h100", 132, "sm_90", "0.1.0", "3.7", "a" * 16, "matmul", "bf16", computation, "(p/16,1)", f"m={number + 1}"
    )


def made(number: int, version: int = 0, runs: int = 0, size: int = 0) -> Entry:
    """An entry whose parts follow from one another. ``size`` makes it that many bytes larger."""
    times = {"warm": Times(1e-4, 9e-5, 2e-4, runs)} if runs else {}
    pad = {f"pad{i}": mark(number, version, i) * 60 for i in range(size // 3840)}
    knobs = {"BM": number, "version": version, "mark": "m" + mark(number, version)[:20]}
    return Entry(key(number), knobs, {"total": float(version)}, times, {"mark": mark(number, version), **pad})


def mark(number: int, version: int, i: int = 0) -> str:
    return hashlib.sha256(f"{number} {version} {i}".encode()).hexdigest()


def number_of(entry: Entry) -> int:
    return int(entry.knobs["BM"])


def whole(entry: Entry) -> bool:
    """Whether an entry is one that ``made`` gave."""
    number, version = number_of(entry), int(entry.knobs["version"])
    runs = entry.measured["warm"].runs if entry.measured else 0
    pads = sum(n.startswith("pad") for n in entry.provenance)
    return entry == made(number, version, runs, pads * 3840)


# ---------------------------------------------------------------- processes


def forked(work: Callable[[], None]) -> int:
    """Run something in a child; its process id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    signal.alarm(300)  # a child that hangs dies, and counts as a crash
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(code)


def wait(pid: int) -> int:
    """A child's exit status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def in_child(here: Path, work: Callable[[Figures], None]) -> Figures:
    """The figures that ``work`` fills in, in a process of its own, which may change what it may do."""

    def run(file: Any) -> None:
        out = Figures()
        work(out)
        json.dump(vars(out), file)
        file.flush()

    with (here / "figures").open("w+") as file:
        if wait(forked(lambda: run(file))):
            return Figures("stopped", crashes=1)
        file.seek(0)
        out = Figures(**json.load(file))
        out.seen = Counter(out.seen)
        return out


class Log:
    """A file that processes append short lines to, each at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)

    def add(self, *words: object) -> None:
        os.write(self.fd, (" ".join(map(str, words)) + "\n").encode())

    def lines(self) -> list[str]:
        return self.path.read_text().splitlines()

    def most(self) -> int:
        """How often the same line stands there at most."""
        return max(Counter(self.lines()).values(), default=0)


@contextmanager
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="tessel-faults-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


# ---------------------------------------------------------------- cases


def killed_writers(rounds: int, here: Path) -> Figures:
    """Four processes write, tune and delete, until SIGKILL takes them at any moment; another reads all the while."""
    out, rng, root, log = Figures(), random.Random(1), here / "tiles", Log(here / "log")

    def write(seed: int) -> None:
        own, mine = Cache(root), random.Random(seed)
        while True:
            number = mine.randrange(KEYS)
            entry = made(number, mine.randrange(1000), mine.randrange(2) * 9, mine.choice([0, 40_000]))

            def tune(number: int = number, entry: Entry = entry) -> Entry:
                log.add(os.getpid(), number)
                return entry

            got = own.find_or_make(key(number), tune)
            assert got is not None and whole(got) and number_of(got) == number
            own.put(entry)
            if mine.random() < 0.2:
                name = mine.choice(own.files() or [""])
                if not name.startswith(".new-"):
                    own.remove(name)

    reader = Cache(root)
    for number in range(rounds):
        pids = [forked(lambda seed=number * 4 + i: write(seed)) for i in range(4)]
        until = time.monotonic() + rng.uniform(0.005, 0.06)
        while time.monotonic() < until:
            n = rng.randrange(KEYS)
            out.read(reader.get(key(n)), n)
        rng.shuffle(pids)
        for pid in pids:
            time.sleep(rng.uniform(0, 0.002))
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            status = wait(pid)
            out.crashes += status != -signal.SIGKILL
            out.seen["kills"] += status == -signal.SIGKILL
    checked = verify(Cache(root))
    out.seen["half-written files left"] = len(checked.broken)
    out.expect(set(checked.broken.values()) <= {"leftover"}, f"files that are no entries: {checked.broken}")
    for n in range(KEYS):
        out.read(reader.get(key(n)), n)
    out.expect(not reader.stats().get("corrupt"), "an entry was seen before it was whole")
    swept = Cache(root, clock=lambda: time.time() + 7200).sweep()  # two hours later
    out.expect(swept == len(checked.broken) and not verify(Cache(root)).broken, "leftovers are not swept")
    out.tuned = log.most()
    out.seen["tunings"] = len(log.lines())
    out.seen += Counter({k: v for k, v in reader.stats().items() if k != "miss"})
    out.done = f"4 writers killed {rounds} times"
    return out


def corrupted(data: bytes, other: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Some bytes of a file changed, as disks, crashes and people do it."""
    how = rng.choice(["bit", "byte", "cut", "longer", "zeros", "moved", "spliced", "noise", "length", "empty", "huge"])
    at, size = rng.randrange(len(data)), rng.randrange(1, 512)
    if how == "bit":
        return how, data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if how == "byte":
        return how, data[:at] + rng.randbytes(1) + data[at + 1 :]
    if how == "cut":
        return how, data[:at]
    if how == "longer":
        return how, data + rng.randbytes(size)
    if how == "zeros":
        return how, data[:at] + b"\0" * len(data[at : at + size]) + data[at + size :]
    if how == "moved":
        return how, data[at:] + data[:at]
    if how == "spliced":
        return how, data[:at] + other[at:]
    if how == "noise":
        return how, rng.randbytes(len(data))
    if how == "length":
        return how, data[:8] + rng.randbytes(4) + data[12:]
    return how, b"" if how == "empty" else data + b"\0" * MAX_BYTES


ODD = (
    None,
    True,
    -1,
    2**40,
    1.5,
    "",
    "../../etc/passwd",
    "x" * 5000,
    "a\x1b[2J",
    [],
    {},
    [[]],
    {"BM": {}},
    256,
    17,
    "tma",
)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """An entry with one value exchanged and a right checksum: what somebody who knows the format would plant."""
    length = struct.unpack_from(">I", data, 8)[0]
    value = json.loads(data[12 : 12 + length])
    at, place = value, rng.choice(list(value))
    while isinstance(at[place], dict) and at[place] and rng.random() < 0.9:
        at, place = at[place], rng.choice(list(at[place]))
    if rng.random() < 0.1:
        del at[place]
    else:
        at[place if rng.random() < 0.9 else "odd"] = rng.choice(ODD)
    text = json.dumps(value).encode()
    body = data[:8] + struct.pack(">I", len(text)) + text
    return body + hashlib.sha256(body).digest()


def corrupt_files(count: int, here: Path) -> Figures:
    """Files are corrupted one by one; each time somebody asks for the entry, tunes it if it must, and asks again.
    One in five is sound by its checksum, and only its values are not."""
    out, rng, root = Figures(), random.Random(2), here / "tiles"
    kernels = [product_kernel(*_operands(m)) for m in (256, 512, 1024, 2048, 4096)]
    target = get_target("h100")
    knobs = [tile(k, target).knobs for k in kernels]
    first = Cache(root)
    for k, good in zip(kernels, knobs):
        remember(k, target, good, predicted={"total": 1e-3}, cache=first)
    for n in range(KEYS):
        first.put(made(n, runs=n % 2))
    names = {first.inspect(n)[0].key: n for n in first.files()}  # type: ignore[union-attr]
    sound = {n: (root / n).read_bytes() for n in names.values()}
    for _ in range(count):
        plant = rng.random() < 0.2
        which = rng.randrange(len(kernels))
        number = rng.randrange(KEYS)
        name = names[key_of(kernels[which], target) if plant else key(number)]
        data = sound[name]
        how, bad = "planted", mutated(data, rng)
        if not plant:
            how, bad = corrupted(data, sound[rng.choice(list(sound))], rng)
        (root / name).write_bytes(bad)
        own, tunings = Cache(root), 0
        try:
            if plant:
                hit = lookup(kernels[which], target, cache=own)
                out.reads += 1
                illegal = hit is not None and legal_tile(kernels[which], target, hit.knobs)
                out.expect(not illegal, f"a planted tile is used: {illegal}")
                if hit is not None:
                    out.seen["planted, a legal tile"] += 1
                (root / name).write_bytes(data)
                out.seen["planted"] += 1
                out.seen += Counter({f"planted, {k}": n for k, n in own.stats().items() if k not in ("hit", "miss")})
                continue
            entry = decode(data)

            def tune(entry: Entry = entry) -> Entry:
                nonlocal tunings
                tunings += 1
                return entry

            same = bad == data
            got = out.read(own.find_or_make(key(number), tune), number)
            out.expect(got == entry and tunings == (not same), f"{how}: {tunings} tunings, {own.stats()}")
            again = Cache(root)
            out.read(again.find_or_make(key(number), tune), number)
            out.tuned = max(out.tuned, tunings)
            out.seen += Counter({k: n for k, n in own.stats().items() if k not in ("hit", "miss", "put")})
        except Exception:
            traceback.print_exc()
            out.crashes += 1
    out.done = f"{count:,} corruptions"
    return out


def _operands(m: int) -> tuple[torch.Tensor, torch.Tensor]:
    kind = {"dtype": torch.bfloat16, "device": "meta"}
    return torch.empty(m, 1024, **kind), torch.empty(1024, 512, **kind)  # type: ignore[call-overload]


def corrupt_exports(count: int, here: Path) -> Figures:
    """An exported file is corrupted: it is taken whole and as it was, or not at all."""
    out, rng = Figures(), random.Random(3)
    entries = [made(n, runs=n % 3) for n in range(20)]
    good, other = dump(entries), dump([made(n, 1) for n in range(20, 45)])
    for _ in range(count):
        how, bad = corrupted(good, other, rng)
        out.reads += 1
        try:
            taken = load(bad, "it")
        except TesselError:
            out.seen["refused"] += 1
        except Exception:
            traceback.print_exc()
            out.crashes += 1
        else:
            out.expect(bad == good and sorted(map(number_of, taken)) == list(range(20)), f"{how} was taken")
            out.seen["not changed after all"] += 1
    out.done = f"{count:,} corruptions"
    return out


def tuned_at_once(rounds: int, here: Path) -> Figures:
    """Eight processes need the same kernel at the same moment, one of them dying at it; then eight more do."""
    out, rng, log = Figures(), random.Random(4), Log(here / "log")
    again = Log(here / "again")

    def started(work: Callable[[int, tuple[int, int]], None]) -> list[int]:
        """Eight processes, let go at once by the end of a pipe that all of them read."""
        pipe = os.pipe()
        pids = [forked(lambda i=i: work(i, pipe)) for i in range(8)]
        for end in pipe:
            os.close(end)
        return pids

    for number in range(rounds):
        root = here / f"tiles{number}"

        def work(seed: int, log: Log, pipe: tuple[int, int], root: Path = root, number: int = number) -> None:
            own = Cache(root)
            os.close(pipe[1])
            os.read(pipe[0], 1)  # until all are there

            def tune() -> Entry:
                log.add(os.getpid(), number)
                time.sleep(random.Random(seed).uniform(0, 0.02))
                return made(number, seed, seed % 2)

            for _ in range(3):
                got = own.find_or_make(key(number), tune)
                assert got is not None and whole(got) and number_of(got) == number

        pids = started(lambda i, pipe: work(i, log, pipe))
        victim = pids.pop(rng.randrange(8))
        time.sleep(rng.uniform(0, 0.02))
        os.kill(victim, signal.SIGKILL)
        wait(victim)
        out.crashes += sum(wait(pid) != 0 for pid in pids)
        out.crashes += sum(wait(pid) != 0 for pid in started(lambda i, pipe: work(i, again, pipe)))
        out.read(Cache(root).get(key(number)), number)
        out.expect(len(Cache(root).entries()) == 1, "not one entry")
    out.tuned = log.most()
    out.seen["tunings"] = len(log.lines())
    out.seen["tunings by those that came later"] = len(again.lines())
    out.expect(not again.lines(), "tuned again though it was there")
    out.done = f"8 processes, {rounds} times"
    return out


def full_disk(rounds: int, here: Path) -> Figures:
    """256 KiB, and more entries than fit. Where no tmpfs may be mounted, files of 2,000 bytes at most."""

    def work(out: Figures) -> None:
        try:
            small_disk(here / "disk")
        except OSError as e:
            out.done = f"no tmpfs may be mounted here ({e.strerror}): files of at most 2,000 bytes, "
            limit_files()
        else:
            out.done = "a tmpfs of 256 KiB, "
        fill(out, here / "disk" / "tiles")

    return in_child(here, work)


def limited_disk(here: Path) -> Figures:
    """The same with a limit on the size of a file in place of that of a disk."""

    def work(out: Figures) -> None:
        limit_files()
        fill(out, here / "disk" / "tiles")

    return in_child(here, work)


def limit_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def small_disk(path: Path) -> None:
    """Mount a tmpfs of 256 KiB for this process and its children alone.

    Raises:
        OSError: it may not be done here.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def call(name: str, *args: object) -> None:
        if getattr(libc, name)(*args):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), name)

    user, group = os.getuid(), os.getgid()
    new_mounts, new_user, private, deep = 0x20000, 0x10000000, 1 << 18, 1 << 14
    path.mkdir(mode=0o700)
    call("unshare", new_mounts | (new_user if user else 0))
    if user:  # the same names in the new namespace
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    call("mount", b"none", b"/", None, private | deep, None)
    call("mount", b"tessel", str(path).encode(), b"tmpfs", 0, f"size=256k,mode=0700,uid={user},gid={group}".encode())


def fill(out: Figures, root: Path) -> None:
    """More entries than there is room for."""
    own = Cache(root)
    count, tunings = 200, Counter[int]()

    def tune(n: int) -> Entry:
        tunings[n] += 1
        return made(n, size=4000 if n % 2 else 0)

    for _ in range(2):
        for n in range(count):
            entry = out.read(own.find_or_make(key(n), lambda n=n: tune(n)), n)
            out.expect(entry is not None, "no entry")
    out.tuned = max(tunings.values())
    stats = own.stats()
    out.seen += Counter(stats)
    out.expect(0 < stats["put"] < count and stats["not_written"] > 0, f"the disk was not full: {stats}")
    there = Cache(root)
    kept = [n for n in range(count) if out.read(there.get(key(n)), n) is not None]
    out.expect(len(kept) == stats["put"] and not verify(there).broken, f"{len(kept)} kept, {verify(there).broken}")
    pids = [forked(lambda: [Cache(root).put(made(n, 1, 5)) for n in range(count)] and None) for _ in range(4)]
    out.crashes += sum(wait(p) != 0 for p in pids)
    for n in range(count):
        out.read(Cache(root).get(key(n)), n)
    out.expect(not verify(Cache(root)).broken, f"left: {verify(Cache(root)).broken}")
    prune(there, max_bytes=0)
    out.expect(Cache(root).put(made(0, 2, 1)), "there is room again, and nothing is written")
    out.done += f"{count} entries, then 4 writers at once"


def read_only(rounds: int, here: Path) -> Figures:
    """A directory that may be read and not written to, by somebody who is not root."""
    root = here / "tiles"
    here.chmod(0o755)
    if os.getuid() == 0:
        os.chown(here, NOBODY, NOBODY)

    def work(out: Figures) -> None:
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        for n in range(5):
            assert Cache(root).put(made(n))
        root.chmod(0o500)
        own, tunings = Cache(root), Counter[int]()
        for _ in range(3):
            for n in range(10):

                def tune(n: int = n) -> Entry:
                    tunings[n] += 1
                    return made(n)

                out.read(own.find_or_make(key(n), tune), n)
        out.expect(sorted(tunings) == [5, 6, 7, 8, 9], f"tuned {dict(tunings)}")
        out.tuned = max(tunings.values())
        out.expect(own.stats()["not_written"] == 5 and len(own.files()) == 5, str(own.stats()))
        out.expect(not prune(own, max_bytes=0).removed, "removed from a directory that is read-only")
        root.chmod(0o700)
        out.expect(own.put(made(7)), "not written though it may be now")
        here.chmod(0o500)
        none = Cache(here / "none")  # cannot be made
        out.expect(not none.put(made(1)) and out.read(none.get(key(1)), 1) is not None, "not kept in memory")
        here.chmod(0o755)
        out.seen += Counter(own.stats())
        out.done = "mode 500, 10 kernels"

    return in_child(here, work)


def foreign_owner(rounds: int, here: Path) -> Figures:
    """A directory, then files, of another user."""
    out, root = Figures(), here / "tiles"
    own = Cache(root)
    for n in range(KEYS):
        own.put(made(n))
    other, how = root, "chown to another user"
    if os.getuid() == 0:
        files = sorted(root.iterdir())
        for path in files[: KEYS // 2]:
            os.chown(path, NOBODY, NOBODY)
        hits = sum(out.read(Cache(root).get(key(n)), n) is not None for n in range(KEYS))
        out.expect(hits == KEYS - KEYS // 2, f"{hits} hits")
        there = Cache(root)
        for n in range(KEYS):
            tunings = Counter[int]()

            def tune(n: int = n, tunings: Counter[int] = tunings) -> Entry:
                tunings[n] += 1
                return made(n)

            out.read(there.find_or_make(key(n), tune), n)
            out.tuned = max(out.tuned, tunings[n])
        out.seen += Counter(there.stats())
        os.chown(root, NOBODY, NOBODY)
    else:
        other, how = Path("/usr"), "a directory of root's (only root can give files away)"
    fresh = Cache(other)
    for n in range(KEYS):
        out.expect(out.read(fresh.get(key(n)), n) is None, "read from another user's directory")
        out.expect(not fresh.put(made(n, 1)), "written to another user's directory")
        out.expect(out.read(fresh.get(key(n)), n) is not None, "not kept in memory")
    out.expect("belongs to another user" in fresh.usable(), fresh.usable())
    out.seen += Counter({"unsafe_directory": fresh.stats()["unsafe_directory"]})
    out.done = how
    return out


def planted_links(rounds: int, here: Path) -> Figures:
    """Symbolic links in the place of a file, of the directory, and of the directory above."""
    out, rng = Figures(), random.Random(5)
    precious = here / "precious"
    for number in range(rounds):
        root = here / f"a{number}" / "tiles"
        own = Cache(root)
        own.put(made(number))
        (name,) = own.files()
        data = (root / name).read_bytes()
        for content in (data, b"precious", encode(made(number + 1))):
            precious.write_bytes(content)
            precious.chmod(rng.choice([0o600, 0o644]))
            (root / name).unlink()
            (root / name).symlink_to(precious)
            out.expect(out.read(Cache(root).get(key(number))) is None, "a link was followed")
            out.expect(Cache(root).put(made(number, 1)), "not written in the place of a link")
            out.expect(precious.read_bytes() == content, "written through a link")
            out.expect(not (root / name).is_symlink(), "the link is still there")
            out.read(Cache(root).get(key(number)), number)
        (root / name).unlink()
        (root / name).symlink_to(root / name)  # to itself
        out.expect(out.read(Cache(root).get(key(number))) is None, "a link to itself")
        away = here / f"away{number}"
        root.rename(away)
        root.symlink_to(away)
        linked = Cache(root)
        before = sorted(p.name for p in away.iterdir())
        out.expect(out.read(linked.get(key(number))) is None and not linked.put(made(number, 2)), "a linked directory")
        out.expect(sorted(p.name for p in away.iterdir()) == before, "written into a linked directory")
        above = here / f"above{number}"
        above.symlink_to(here / f"a{number}")
        root.unlink()
        away.rename(root)
        out.expect(Cache(above / "tiles").get(key(number)) is None, "a linked parent")
        out.seen["links"] += 6
        out.seen += Counter({"unsafe_directory": linked.stats()["unsafe_directory"]})
    out.done = f"{out.seen['links']} links"
    return out


def clock_set_back(rounds: int, here: Path) -> Figures:
    """The clock jumps back and forth by years; files come from the future."""
    out, rng, root = Figures(), random.Random(6), here / "tiles"
    now = [time.time()]
    own = Cache(root, clock=lambda: now[0])
    tunings = Counter[int]()
    for i in range(600):
        now[0] += rng.choice([-1, 1]) * rng.uniform(0, 3e8)
        n = rng.randrange(KEYS)

        def tune(n: int = n) -> Entry:
            tunings[n] += 1
            return made(n)

        out.read(own.find_or_make(key(n), tune), n)
        out.read(Cache(root, clock=lambda: now[0]).get(key(n)), n)
        for name in own.files():
            os.utime(root / name, (now[0], max(0.0, now[0] + rng.uniform(-1e8, 1e8))))
        if i % 20 == 0:
            own.sweep()
    out.tuned = max(tunings.values())
    left = root / ".new-1-x"
    left.write_bytes(b"x")
    for name in own.files():
        os.utime(root / name, (2e9, 2e9))
    now[0] = 1e9  # all files are 31 years too young
    done = prune(own, older_than=1.0)
    out.expect(not done.removed and done.left == KEYS and left.exists(), f"removed {done.removed}")
    for n in range(KEYS):
        out.expect(out.read(own.get(key(n)), n) is not None, "lost")
    now[0] = 3e9
    out.expect(own.sweep() == 1, "a leftover stays for ever")
    out.expect(len(prune(own, older_than=1.0).removed) == KEYS, "not pruned when the clock is right again")
    out.seen += Counter(own.stats())
    out.done = "600 jumps of up to 10 years"
    return out


CASES: dict[str, Callable[[int, Path], Figures]] = {
    "killed writers": killed_writers,
    "corrupt files": corrupt_files,
    "corrupt exports": corrupt_exports,
    "full disk": full_disk,
    "read-only directory": read_only,
    "foreign owner": foreign_owner,
    "planted links": planted_links,
    "clock set back": clock_set_back,
    "tuned at once": tuned_at_once,
}


def run(name: str, counts: dict[str, int]) -> Figures:
    """One case in a directory of its own."""
    start = time.perf_counter()
    with folder() as here:
        try:
            out = CASES[name](counts.get(name, 1), here)
        except Exception:
            traceback.print_exc()
            out = Figures("stopped", crashes=1)
    out.seconds = time.perf_counter() - start
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"all of: {', '.join(CASES)}")
    parser.add_argument("--quick", action="store_true", help="fewer of everything")
    given = parser.parse_args()
    unknown = [c for c in given.cases if c not in CASES]
    if unknown:
        parser.error(f"no case {unknown[0]!r}: {', '.join(CASES)}")
    print(f"{'case':<20} {'reads':>8} {'wrong':>6} {'crashes':>8} {'tuned':>6} {'seconds':>8}  what was done and seen")
    all_ok = True
    for name in given.cases or CASES:
        out = run(name, QUICK if given.quick else FULL)
        seen = ", ".join(f"{n.replace('_', ' ')} {v:,}" for n, v in sorted(out.seen.items()) if v)
        print(
            f"{name:<20} {out.reads:>8,} {out.wrong:>6} {out.crashes:>8} {out.tuned:>6} {out.seconds:>8.1f}  "
            f"{out.done}; {seen}",
            flush=True,
        )
        all_ok &= out.ok
    print("tuned: how often one process tuned one kernel, at most. " + ("all right" if all_ok else "NOT RIGHT"))
    return not all_ok


if __name__ == "__main__":
    sys.exit(main())
