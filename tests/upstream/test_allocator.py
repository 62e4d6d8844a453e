"""Freed memory stays with the process while it is asked for, and goes back afterwards."""

from __future__ import annotations

import subprocess
import sys

import pytest

from nnunetv2_mgml.upstream import allocator

PROGRAM = """
import ctypes
import resource
from nnunetv2_mgml.upstream.allocator import freed_memory_kept

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def faults_of_a_layer():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    memory = libc.malloc(48 * 2**20)  # more than the C library would ever keep by itself
    ctypes.memset(memory, 1, 48 * 2**20)
    libc.free(memory)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def pages():
    return int(open("/proc/self/statm").read().split()[1])

empty = pages()
usual = [faults_of_a_layer() for _ in range(3)]
with freed_memory_kept() as kept:
    assert kept
    faults_of_a_layer()
    again = [faults_of_a_layer() for _ in range(3)]
    full = pages()
after = pages()
print(min(usual), max(again), full - empty, after - empty)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_what_is_freed_is_there_for_the_next_layer_and_goes_back_at_the_end() -> None:
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    usual, again, kept, left = map(int, run.stdout.split())
    assert again < usual / 20
    assert left < kept / 20


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_what_the_environment_sets_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: pytest.fail("the allocator was touched"))
    with allocator.freed_memory_kept() as kept:
        assert not kept


@pytest.mark.parametrize("platform", ["darwin", "win32", "linux"])
def test_other_systems_and_c_libraries_are_left_alone(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def library(_: None) -> object:
        assert platform == "linux"
        return object()  # without ``mallopt``, like musl

    monkeypatch.setattr(allocator.ctypes, "CDLL", library)
    monkeypatch.setattr(allocator.sys, "platform", platform)
    with allocator.freed_memory_kept() as kept:
        assert not kept


def test_it_ends_with_the_prediction_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    calls: list[tuple[int, ...]] = []

    class Library:
        def mallopt(self, *limit: int) -> int:
            calls.append(limit)
            return 1

        def malloc_trim(self, padding: int) -> int:
            calls.append((padding,))
            return 1

    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: Library())
    monkeypatch.setattr(allocator.sys, "platform", "linux")
    with pytest.raises(MemoryError), allocator.freed_memory_kept():
        raise MemoryError
    kept, given_back = calls[:2], calls[2:]
    assert [name for name, _ in kept] == [-3, -1]
    assert given_back == [(-3, 32 * 2**20), (-1, 64 * 2**20), (0,)]
