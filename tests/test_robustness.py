"""Beside forks, threads, signals and other libraries' OpenMP: it ends, and the bits are the same.

Each scenario has a process of its own and a time limit, so that nothing here can hang a test run.
"""

import importlib.util
import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import as_here

import klcore
from klcore import _cpu

LIMIT = 100  # seconds: what a scenario may take on a slow, busy machine; each needs a few
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
needs_torch = pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="torch is not installed")
# Python 3.12 and later warn of every fork in a process with threads: such forks are the subject here
FORK_WARNING = "ignore:This process:DeprecationWarning"

COMMON = """
import hashlib, os, signal, sys, threading, time
import numpy as np
import klcore

rng = np.random.default_rng(0)
X, Y = rng.random((2, 300, 700), dtype=np.float32)
ROW_X, ROW_Y = rng.random((2, 300_000))

def digest(threads):
    sha = hashlib.sha256()
    with klcore.threads(threads):
        for x, y in ((X, Y), (ROW_X, ROW_Y), (X, Y[0])):
            for space in ("probs", "logits"):
                for a in klcore.kl_div(x, y, space=space, reduction="sum", return_grad=("x", "y")):
                    sha.update(a.tobytes())
    return sha.hexdigest()

def in_child(work, limit=60):
    # Runs work() in a fork of this process and returns what it returned, a string; never waits longer than `limit`.
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.write(write, work().encode())
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    end = time.monotonic() + limit
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise SystemExit("the forked child hangs")
        time.sleep(0.01)
    with os.fdopen(read) as f:
        return f.read()
"""


@pytest.fixture
def same(python):
    """Runs a scenario that prints digests of the same data; all must be those of one thread in a quiet process."""

    def run(scenario, *arguments, expected=2, warnings=("error", FORK_WARNING), **environment):
        code = COMMON + textwrap.dedent(scenario)
        found = python(code, *arguments, timeout=LIMIT, warnings=warnings, **environment).split()
        assert len(found) == expected
        quiet = python(COMMON + "print(digest(1))", timeout=LIMIT).split()
        assert found == quiet * expected

    return run


# ---- fork ------------------------------------------------------------------------------------------------------------


@needs_fork
@pytest.mark.parametrize("child", [1, 2, 5])
@pytest.mark.parametrize("parent", [1, 2, 5])
def test_fork(same, parent, child):
    """GNU's OpenMP hangs in the child of a process that used it, unless it is kept from the inherited threads."""
    same(
        """
        parent, child = map(int, sys.argv[1:])
        print(digest(parent))
        print(in_child(lambda: digest(child)))
        print(digest(parent))
        """,
        parent,
        child,
        expected=3,
    )


@needs_fork
def test_fork_before_the_first_call(same):
    same("print(in_child(lambda: digest(2))); print(digest(2))")


@needs_fork
def test_fork_in_a_fork(same):
    same("digest(2); print(in_child(lambda: digest(2) + ' ' + in_child(lambda: digest(5), 20)))")


@needs_fork
def test_many_calls_and_threads_in_a_fork(same):
    same(
        """
        def work():
            found = []
            workers = [threading.Thread(target=lambda: found.append(digest(3))) for _ in range(3)]
            for w in workers: w.start()
            for w in workers: w.join(50)
            return " ".join(found + [digest(2)])
        digest(2)
        print(in_child(work))
        """,
        expected=4,
    )


@needs_fork
def test_fork_while_another_thread_computes(same):
    same(
        """
        digest(1)  # Python itself does not survive a fork in the middle of an import, which the first call makes
        stop = threading.Event()
        def compute():
            while not stop.is_set():
                digest(2)
        worker = threading.Thread(target=compute)
        worker.start()
        try:
            for _ in range(5):
                print(in_child(lambda: digest(2), 15))
        finally:
            stop.set()
            worker.join()
        """,
        expected=5,
    )


@needs_fork
@pytest.mark.parametrize("parent", [1, 2])
@pytest.mark.parametrize("child", [1, 2])
def test_multiprocessing_fork(same, parent, child):
    same(
        """
        import multiprocessing
        parent, child = map(int, sys.argv[1:])
        print(digest(parent))
        with multiprocessing.get_context("fork").Pool(2) as pool:
            for found in pool.map_async(digest, [child] * 3).get(60):
                print(found)
        print(digest(parent))
        """,
        parent,
        child,
        expected=5,
    )


# ---- threads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ["probs", "log_probs", "logits", ("probs", "logits")])
def test_many_python_threads(space):
    rng = np.random.default_rng(0)
    x, y = rng.random((2, 100, 500))

    def compute(k):
        with klcore.threads(1 + k % 4):
            results = klcore.kl_div(x, y, space=space, return_grad=("x", "y"))
            total = klcore.kl_div(x, y, space=space, reduction="sum")
        return b"".join(np.asarray(a).tobytes() for a in (*results, total))

    expected = compute(0)
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(compute, range(80), timeout=LIMIT)) == {expected}


@pytest.mark.skipif(not _cpu.OPENMP, reason="built without OpenMP")
@pytest.mark.parametrize("environment", [{"OMP_THREAD_LIMIT": 2}, {"OMP_DYNAMIC": "true"}, {"OMP_THREAD_LIMIT": 1}])
def test_fewer_threads_than_asked_for(same, environment):
    same("print(digest(5)); print(digest(64))", **environment)


def test_more_threads_than_rows_and_chunks(same):
    same("print(digest(100)); print(digest(2))")


def test_threadpoolctl(same):
    """Which other libraries use to limit OpenMP: it may slow klcore down, not change it."""
    same(
        """
        import threadpoolctl
        print(digest(2))
        assert any(pool["user_api"] == "openmp" for pool in threadpoolctl.threadpool_info())
        for limit in (1, 2):
            with threadpoolctl.threadpool_limits(limit):
                print(digest(2))
        print(digest(2))
        """,
        expected=4,
    )


# ---- other users of OpenMP -------------------------------------------------------------------------------------------

OTHERS = {
    "sklearn": """
        def other():
            from sklearn.cluster import KMeans
            KMeans(3, n_init=1, random_state=0).fit(np.asarray(X[:, :20], np.float64))
    """,
    "torch": """
        def other():
            import torch
            torch.set_num_threads(2)
            a = torch.linspace(0, 1, 1_000_000).reshape(1000, 1000)
            torch.nn.functional.kl_div(torch.log_softmax(a, 1), torch.softmax(a + 1, 1), reduction="sum")
    """,
}
OTHER = [pytest.param("sklearn"), pytest.param("torch", marks=needs_torch)]
# these libraries' own warnings are none of our business
LENIENT = ("error", "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.mark.parametrize("order", ["other first", "klcore first"])
@pytest.mark.parametrize("library", OTHER)
def test_beside(same, library, order):
    same(
        textwrap.dedent(OTHERS[library])
        + textwrap.dedent("""
        if sys.argv[1] == "klcore first":
            digest(2)
        for _ in range(3):
            other()
            print(digest(2))
        """),
        order,
        expected=3,
        warnings=LENIENT,
    )


@needs_fork
@pytest.mark.parametrize("library", OTHER)
def test_fork_beside(same, library):
    same(
        textwrap.dedent(OTHERS[library])
        + textwrap.dedent("""
        other()
        print(digest(2))
        other()
        print(in_child(lambda: digest(2)))
        print(digest(2))
        """),
        expected=3,
        warnings=LENIENT,
    )


@pytest.mark.parametrize("library", OTHER)
def test_beside_at_the_same_time(same, library):
    same(
        textwrap.dedent(OTHERS[library])
        + textwrap.dedent("""
        other()
        stop = threading.Event()
        def compute():
            while not stop.is_set():
                other()
        worker = threading.Thread(target=compute)
        worker.start()
        try:
            for _ in range(5):
                print(digest(2))
        finally:
            stop.set()
            worker.join()
        """),
        expected=5,
        warnings=LENIENT,
    )


# ---- interruption ----------------------------------------------------------------------------------------------------

INTERRUPTED = """
x = np.broadcast_to(np.linspace(0.1, 1, 100_000), (2000, 100_000))
digest(2)
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job of a shell is without
print("ready", flush=True)
try:
    with klcore.threads(2):
        while True:
            klcore.kl_div(x, x[0], space=("probs", "logits"), reduction="sum")
except KeyboardInterrupt:
    print(digest(2))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_keyboard_interrupt():
    """A call is not cut short, but the interruption gets through, and the next call is right."""
    command = [sys.executable, "-Werror", "-c", COMMON + INTERRUPTED]
    keywords = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **as_here()}
    with subprocess.Popen(command, **keywords) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            time.sleep(0.2)  # so that it comes in the middle of a call
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=LIMIT)
        finally:
            process.kill()
    assert process.returncode == 0, err
    quiet = subprocess.run([*command[:3], COMMON + "print(digest(1))"], timeout=LIMIT, **keywords)
    assert out == quiet.stdout != ""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory by RLIMIT_AS")
def test_out_of_memory(python):
    """Working memory that cannot be had is a MemoryError, and the next call is right."""
    found = python(
        COMMON
        + textwrap.dedent("""
        import resource
        expected = digest(2)
        x = np.broadcast_to(np.float32(1), (2, 2**36))  # its gradient alone would take 256 GiB
        limit = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (2**34, limit[1]))
        try:
            klcore.kl_div(x[0], x, return_grad="x")
        except MemoryError:
            print("refused", digest(2) == expected)
        """),
        timeout=LIMIT,
    )
    assert found.split() == ["refused", "True"]
