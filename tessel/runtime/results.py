"""Memory of results, used again once the caller has dropped them.

A large block is mapped anew by the C library at every allocation, and every page of it is then faulted in and
cleared by the system: 8192 faults for logits of 32 MiB, a few milliseconds a call. So the storage of a large result
is remembered, and handed out again when nobody else refers to it: no tensor, view, array, saved tensor of
autograd or storage object. That is what the counts of its references say, C++'s and Python's; a storage that was
resized or moved (``share_memory_``) in the meantime is forgotten. It is asked for in huge pages, where the system
has them for the asking: 512 times fewer faults in the first call, and stores that do not wait for page tables.

At most ``LIMIT`` bytes are remembered in a process; the oldest go first. ``release`` forgets all of them.

Smaller blocks lie in the heap of the C library, which is asked not to give back what the next call needs.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import torch

__all__ = [
    "LEAST",
    "LIMIT",
    "MAPPED",
    "empty",
    "empty_on",
    "in_huge_pages",
    "keep_freed_memory",
    "part",
    "release",
    "remembered",
    "result",
]

LEAST = 2**20  # bytes: smaller blocks the C library keeps itself
MAPPED = 2**25 - 2**17  # bytes: larger blocks it never keeps (glibc's DEFAULT_MMAP_THRESHOLD_MAX is 32 MiB)
LIMIT = 256 * 2**20


def empty_on(where: torch.device) -> Callable[[Sequence[int], Sequence[int], torch.dtype], torch.Tensor]:
    """What allocates ``(shape, strides, dtype)`` on a device."""
    # Torch's own for generated programs: no parsing of arguments and no dispatching, which are half of the time.
    quick = getattr(torch._C._dynamo.guards, "_empty_strided_cpu", None)
    if where.type == "cpu" and quick is not None:
        return quick  # type: ignore[no-any-return]
    return lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype, device=where)


_empty = empty_on(torch.device("cpu"))
# A tensor of the same storage and type as another, and no view of it; again torch's own for generated programs.
_alike = getattr(torch._C._dynamo.guards, "_reinterpret_tensor", None)


@dataclass(eq=False, slots=True)
class _Block:
    storage: torch.UntypedStorage
    nbytes: int
    address: int
    base: torch.Tensor  # of no elements, on the storage; of the type that was last asked for

    def free(self) -> bool:
        """Whether this record alone refers to the storage, by two references, and the storage is what it was."""
        s = self.storage
        return (
            torch._C._storage_Use_Count(s._cdata) == 2
            and sys.getrefcount(s) == _ALONE
            and s.nbytes() == self.nbytes
            and s.data_ptr() == self.address
        )

    def tensor(self, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of its own on the storage, not a view: nothing in it tells of the results before."""
        if self.base.dtype != dtype or self.base.is_inference() != torch.is_inference_mode_enabled():
            self.base = _on(self.storage, dtype)
        if _alike is None:
            return _on(self.storage, dtype, shape, strides)
        return _alike(self.base, shape, strides, 0)  # type: ignore[no-any-return]


def _on(
    storage: torch.UntypedStorage,
    dtype: torch.dtype,
    shape: Sequence[int] = (0,),
    strides: Sequence[int] = (1,),
    offset: int = 0,
) -> torch.Tensor:
    """A tensor on a storage, from an offset in elements."""
    return _empty((0,), (1,), dtype).set_(storage, offset, shape, strides)  # type: ignore[call-overload, no-any-return]


def _new_block(nbytes: int, dtype: torch.dtype) -> _Block:
    storage = torch.empty(nbytes, dtype=torch.uint8, device="cpu").untyped_storage()
    in_huge_pages(storage.data_ptr(), nbytes)
    return _Block(storage, nbytes, storage.data_ptr(), _on(storage, dtype))


# Oldest first. Threads and signal handlers may meet here: whoever removes a block from the list owns it.
_blocks: list[_Block] = []


def result(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of the given layout with undefined content, in memory of its own."""
    nbytes = _span(shape, strides) * dtype.itemsize
    if not LEAST <= nbytes <= LIMIT:
        return _empty(shape, strides, dtype)
    block = _take(nbytes) or _new_block(nbytes, dtype)
    made = block.tensor(shape, strides, dtype)
    _blocks.append(block)
    _forget(LIMIT)  # also after one was taken: another thread may have made its own meanwhile
    return made


def empty(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """As ``result``, but only blocks are remembered that the C library would map anew every time."""
    return (result if _span(shape, strides) * dtype.itemsize >= MAPPED else _empty)(shape, strides, dtype)


def part(
    x: torch.Tensor, offset: int, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    """Some bytes of the storage of a result that is not written yet, as another tensor; ``offset`` in bytes."""
    return _on(x.untyped_storage(), dtype, shape, strides, offset // dtype.itemsize)


_HUGE, _ADVICE = 2**21, 14  # bytes of a huge page, and Linux's MADV_HUGEPAGE
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD


@cache
def _madvise() -> Callable[..., int] | None:
    if not sys.platform.startswith("linux"):
        return None
    call = ctypes.CDLL(None).madvise
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return call  # type: ignore[no-any-return]


def in_huge_pages(address: int, nbytes: int) -> None:
    """Ask for huge pages where a block of ``nbytes`` has whole ones; it is advice, and a system that has none refuses
    it."""
    begin, end = -(-address // _HUGE) * _HUGE, (address + nbytes) // _HUGE * _HUGE
    call = _madvise() if begin < end else None
    if call is not None:
        call(begin, end - begin, _ADVICE)


@lru_cache(maxsize=4096)
def _span(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first to the last of a layout."""
    return 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if 0 not in shape else 0


_kept = [0]  # bytes at the end of its heap that the C library keeps


def keep_freed_memory(nbytes: int = 2 * MAPPED) -> None:
    """Let the C library keep so much freed memory between calls, or what it was told before if that is more.

    glibc maps large blocks one by one, and gives the free end of its heap back to the system: then every call of a
    model pays for fresh, zeroed pages again (20% of the time of a small BERT). Other libraries are left as they are.
    """
    if nbytes <= _kept[0] or not sys.platform.startswith("linux"):
        return
    _kept[0] = min(nbytes, 2**31 - 1)
    tell = getattr(ctypes.CDLL(None), "mallopt", None)
    if tell is not None:
        tell(_MMAP_THRESHOLD, MAPPED)
        tell(_TRIM_THRESHOLD, _kept[0])


def remembered() -> int:
    """Bytes of storages that are remembered, in use or not."""
    return sum(b.nbytes for b in tuple(_blocks))


def release() -> None:
    """Forget all storages; what nobody else refers to is freed."""
    _forget(0)


def _take(nbytes: int) -> _Block | None:
    for block in tuple(_blocks):
        if block.nbytes == nbytes and block.free():
            try:
                _blocks.remove(block)
            except ValueError:  # another thread was quicker
                continue
            if block.free():
                return block
    return None


def _forget(limit: int) -> None:
    while _blocks and remembered() > limit:
        try:
            _blocks.pop(0)
        except IndexError:
            return


def _references_when_alone() -> int:
    """What ``free`` counts where there is no reference from outside: the record's, its own name, the argument, and
    torch's own where a tensor has the storage."""
    block = _new_block(8, torch.uint8)
    s = block.storage
    return sys.getrefcount(s)


_ALONE = _references_when_alone()
