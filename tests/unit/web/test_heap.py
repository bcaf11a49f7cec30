"""A server's threads share one heap."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, sys, threading
from onebase.web.server import one_heap
if sys.argv[1] == "one":
    one_heap()
malloc = ctypes.CDLL(None).malloc
threads = [threading.Thread(target=malloc, args=(10_000,)) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
ctypes.CDLL(None).malloc_stats()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="heaps are told apart by glibc's malloc_stats")
@pytest.mark.parametrize(("how", "alone"), [("one", True), ("each its own", False)])
def test_threads_share_a_heap_only_where_told(how, alone):
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
    assert (done.stderr.count("Arena ") == 1) is alone, done.stderr
