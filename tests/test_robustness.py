"""With forks, threads, signals and other libraries' OpenMP, calls end, and the bits are the same.

Each scenario has its own process and a time limit, so that nothing here can hang a test run.
"""

import ctypes.util
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

LIMIT = 600  # seconds: what a scenario may take on a slow, busy machine; each needs a few
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
needs_torch = pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="torch is not installed")
# Python 3.12 and later warn of every fork in a process with threads: such forks are the subject here
FORK_WARNING = "ignore:This process:DeprecationWarning"

COMMON = """
import hashlib, os, signal, sys, threading, time
import numpy as np
import klcore
from klcore import _cpu

_cpu.pretend_processors(64)
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

def in_child(work, limit=300):
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
    """Run a scenario that prints digests of the same data; all must equal those of one thread in a quiet process."""

    def run(scenario, *arguments, expected=2, warnings=("error", FORK_WARNING), **keywords):
        code = COMMON + textwrap.dedent(scenario)
        found = python(code, *arguments, timeout=LIMIT, warnings=warnings, **keywords).split()
        assert len(found) == expected
        quiet = python(COMMON + "print(digest(1))", timeout=LIMIT).split()
        assert found == quiet * expected

    return run


# ---- fork ------------------------------------------------------------------------------------------------------------


@needs_fork
@pytest.mark.parametrize("child", [1, 2, 5])
@pytest.mark.parametrize("parent", [1, 2, 5])
def test_fork(same, parent, child):
    """GNU's OpenMP hangs in the child of a process that used it, unless klcore avoids the inherited threads."""
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
    same("digest(2); print(in_child(lambda: digest(2) + ' ' + in_child(lambda: digest(5), 200)))")


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
                print(in_child(lambda: digest(2)))
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
    """Other libraries use it to limit OpenMP: it may slow klcore down, but must not change it."""
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


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("threads", [100_000, 2**29, 2**30, 2**31 - 1])
def test_absurd_numbers_of_threads(python, threads, axis):
    """They do not end the process: there are no more threads than processors."""
    code = """
    keywords = dict(axis=int(sys.argv[2]), reduction="sum", space=("probs", "logits"))
    with klcore.threads(1):
        expected = klcore.kl_div(X, Y, **keywords)
    _cpu.pretend_processors(0)
    klcore.set_num_threads(int(sys.argv[1]))
    others = os.path.exists("/proc/self/task") and len(os.listdir("/proc/self/task"))  # NumPy's
    print(klcore.kl_div(X, Y, **keywords) == expected)
    assert not others or len(os.listdir("/proc/self/task")) < others + os.cpu_count()
    """
    assert python(COMMON + textwrap.dedent(code), threads, axis, timeout=LIMIT) == "True\n"


# ways to forbid threads; `room` is the limit
LIMITS = {
    "address space": """
        with open("/proc/self/statm") as f:
            used = int(f.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + room, resource.RLIM_INFINITY))
    """,
    "processes": """
        if os.getuid() == 0:
            os.setuid(65534)  # root may have any number
        resource.setrlimit(resource.RLIMIT_NPROC, (room, room))
    """,
}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems do not keep these limits")
@pytest.mark.parametrize(
    ("limit", "room"), [("address space", 1 << 28), ("address space", 3 << 29), ("processes", 1), ("processes", 3)]
)
def test_threads_that_cannot_be_made(same, limit, room):
    """Fewer threads compute the same bits, and OpenMP does not exit(1)."""
    big = {"OMP_STACKSIZE": "1G"} if limit == "address space" else {}  # enough for none, or for one
    same(
        f"import resource\ndigest(1)\nroom = {room}\n{textwrap.dedent(LIMITS[limit])}\nprint(digest(8))",
        expected=1,
        **big,
    )


SMALL_STACKS = """
from functools import partial
TWO = ("probs", "logits")
shapes = [(300, 20), (20, 2100)]  # few classes, and some chunks

def compute(threads):
    sha = hashlib.sha256()
    for dtype in ("f4", "f8", "f2"):
        for rows, n in shapes:
            x, y = (a.reshape(-1)[: rows * n].reshape(rows, n).astype(dtype) for a in (X, Y))
            masked = np.where(x > 0.8, dtype_lowest, x).astype(dtype)  # classes far apart
            for o in (o for o in klcore.operations.OPERATIONS.values() if not o.single):
                f, by_class = partial(getattr(klcore, o.name), **o.needed), "none" if o.has_terms else "row"
                for space in ("probs", "log_probs", "logits", TWO, TWO[::-1], ("log_probs", "logits")):
                    for a, b in ((x, y), (masked, y)) if space == "logits" else ((x, y),):
                        for axis, reduction in ((1, "row"), (0, by_class)):
                            for r in f(a, b, space=space, axis=axis, reduction=reduction, return_grad=("x", "y")):
                                sha.update(r.tobytes())
                        sha.update(f(a, b[0], space=space, return_grad="y")[1].tobytes())
    digests.append(sha.hexdigest())

dtype_lowest, digests = -6e4, []
np.seterr(all="ignore")
with klcore.threads(1):
    compute(1)
threading.stack_size(int(sys.argv[1]) * 1024)
klcore.set_num_threads(3)
worker = threading.Thread(target=compute, args=(3,))
worker.start()
worker.join()
print(len(digests), len(set(digests)))
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize("size", [32, 96, 144, 160])
def test_small_stacks(python, size):
    """Python's threads may have less stack than the kernels need: NumPy works in 32 KiB, too."""
    assert python(COMMON + SMALL_STACKS, size, timeout=LIMIT) == "2 1\n"


@pytest.mark.quick(1)
@pytest.mark.parametrize("size", ["32k", "100", "0.12M", "128k"])
def test_small_stacks_of_openmp(python, size):
    assert python(COMMON + SMALL_STACKS, 0, timeout=LIMIT, OMP_STACKSIZE=size) == "2 1\n"


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
# these libraries' own warnings do not matter here
LENIENT = ("error", "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.mark.quick(1)
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


@pytest.mark.quick(1)
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


@pytest.mark.quick(1)
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
    """The interrupt gets through, and the next call is correct."""
    command = [sys.executable, "-Werror", "-c", COMMON + INTERRUPTED]
    keywords = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **as_here()}
    with subprocess.Popen(command, **keywords) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            time.sleep(0.2)  # so that it arrives in the middle of a call
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=LIMIT)
        finally:
            process.kill()
    assert process.returncode == 0, err
    quiet = subprocess.run([*command[:3], COMMON + "print(digest(1))"], timeout=LIMIT, **keywords)
    assert out == quiet.stdout != ""


# Calls that would take hours, each on another path through the kernels. Broadcasting creates them without memory.
LONG = """
far = np.broadcast_to(np.linspace(0.1, 1, 100_000, dtype=np.float32), (2_000_000, 100_000))
one = np.broadcast_to(np.float32(0.5), (2**39,))
few = np.broadcast_to(np.array([0.5, 0.5], np.float32), (2**38, 2))
two = ("probs", "logits")

def in_torch(rows=2_000_000):
    import torch
    x = torch.linspace(0.1, 1, 100_000).expand(rows, -1)
    klcore.kl_div(x, x[0].clone().requires_grad_(), space=two, reduction="sum").backward()

CALLS = {
    "rows": lambda: klcore.kl_div(far, far[0], space=two, reduction="sum"),
    "one sweep": lambda: klcore.kl_div(far, far[0], reduction="sum"),
    "one row": lambda: klcore.kl_div(one, one, space="logits"),
    "few classes": lambda: klcore.kl_div(few, few[0], space="logits", reduction="sum"),
    "classes first": lambda: klcore.kl_div(far.T, far.T, space=two, axis=0, reduction="sum"),
    "broadcast gradient": lambda: klcore.kl_div(far, far[0], space=two, reduction="sum", return_grad="y"),
    "broadcast gradient of few": lambda: klcore.kl_div(few, few[0], reduction="sum", return_grad="y"),
    "torch": in_torch,
    "weights of 0": lambda: klcore.kl_div(few, few, weights=0, reduction="sum"),
}

class Enough(Exception):
    pass

if hasattr(signal, "pthread_sigmask"):  # whatever started this process may have blocked the timer's signal
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})

def enough(*_):
    raise Enough

def interrupted(call, threads):
    digest(2)  # imports what a call needs: while Python compiles a module, the exceptions of handlers may be lost
    signal.signal(signal.SIGALRM, enough)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with klcore.threads(threads):
            call()
    except Enough:
        return digest(2)
"""

WAYS = ("rows", "one sweep", "one row", "few classes", "classes first")
SUMMED = ("broadcast gradient", "broadcast gradient of few")
BOTH = [(way, threads) for way in (*WAYS, *SUMMED) for threads in (1, 2)]


@pytest.mark.quick(1)
@pytest.mark.skipif(sys.platform == "win32", reason="sets a timer")
@pytest.mark.parametrize(
    ("way", "threads"),
    [*BOTH, ("weights of 0", 1), pytest.param("torch", 2, marks=needs_torch)],
)
def test_a_signal_handler_that_raises(same, way, threads):
    """It ends a call that would take hours, with its exception; the next call is correct."""
    imports = "in_torch(1)\n" if way == "torch" else ""
    same(LONG + imports + f"print(interrupted(CALLS[{way!r}], {threads}))", expected=1, warnings=LENIENT)


@needs_fork
@pytest.mark.parametrize("threads", [1, 2])
def test_a_signal_handler_that_raises_in_a_fork(same, threads):
    same(LONG + f"digest(2); print(in_child(lambda: interrupted(CALLS['rows'], {threads})))", expected=1)


@pytest.mark.skipif(sys.platform == "win32", reason="sets a timer")
def test_a_signal_is_for_the_main_thread(same):
    """A call in another thread continues, like Python's own code; the main thread's handler raises there."""
    same(
        LONG
        + textwrap.dedent("""
        done = threading.Event()
        def work():
            klcore.kl_div(far[:5000], far[0], space=two, reduction="sum")
            print(digest(2))
            done.set()
        threading.Thread(target=work).start()
        interrupted(done.wait, 1)
        done.wait()
        """),
        expected=1,
    )


SLOW = """
def slowly(call, seconds):
    def handle(*_):
        time.sleep(seconds)
        raise Enough
    signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    end = time.monotonic() + 60
    try:
        while time.monotonic() < end:
            call()
        raise SystemExit("the exception of the handler is lost")
    except Enough:
        pass
    finally:
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        signal.setitimer(signal.ITIMER_REAL, 0)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sets a timer")
@pytest.mark.parametrize("small", [False, True])
def test_a_handler_that_takes_its_time(same, small):
    """Longer than the time between two checks, and than the rest of the call: its exception is not lost."""
    code = """
    digest(2)  # as above
    x = np.full((512, 60_000), 0.5, np.float32)
    out = np.empty(60_000, np.float32), np.empty_like(x), np.empty_like(x)
    for _ in range(3):
        slowly(lambda: klcore.kl_div(x, x, axis=0, weights=0, return_grad=("x", "y"), out=out), 0.15)
        slowly(lambda: klcore.kl_div(x[:, :999], x[:, :999], reduction="sum"), 0.3)
    """
    if small:  # a limit of the main thread's stack counts from the start of a program
        shell = ("/bin/sh", "-c", 'ulimit -s 112 && exec "$@"', "sh")
        same(LONG + SLOW + textwrap.dedent(code) + "\nprint(digest(2))", expected=1, within=shell)
    else:
        same(LONG + SLOW + textwrap.dedent(code) + "\nprint(digest(2))", expected=1)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_the_team_only_grows(same):
    """Calls of few threads between calls of many: OpenMP would end the other threads, and start them again."""
    code = """
    from klcore import _cpu
    _cpu.pretend_processors(8)
    big, small = np.full((9000, 32), 0.1), np.full((1100, 32), 0.1)
    with klcore.threads(8):
        klcore.kl_div(big, big)
        before = set(os.listdir("/proc/self/task"))
        for _ in range(20):
            klcore.kl_div(small, small)
            klcore.kl_div(big, big[:, :1], axis=0, return_grad="y")
    assert set(os.listdir("/proc/self/task")) == before
    _cpu.pretend_processors(0)
    print(digest(2))
    """
    same("import os\n" + textwrap.dedent(code), expected=1)


@needs_fork
def test_first_import_in_a_fork(python):
    """The parent used the same OpenMP without klcore, and the child must not wait for threads that it does not have."""
    library = ctypes.util.find_library("gomp")
    if not library:
        pytest.skip("GNU's OpenMP is not there as a library of its own")
    code = f"""
    import ctypes, os, sys
    libc, gomp = ctypes.CDLL(None), ctypes.CDLL({library!r})
    gomp.GOMP_parallel(libc.free, None, 2, 0)
    child = os.fork()
    if not child:
        import numpy, klcore
        from klcore import _cpu
        _cpu.pretend_processors(2)
        x = numpy.full((300, 700), 0.5, numpy.float32)
        with klcore.threads(2):
            os._exit(0 if klcore.kl_div(x, x, reduction="sum") == 0 else 1)
    assert os.waitpid(child, 0)[1] == 0
    """
    python(textwrap.dedent(code), timeout=LIMIT, warnings=("error", FORK_WARNING))


def test_a_daemon_thread_at_the_end(python):
    """Python ends while a thread computes: it must not check for signals then, which would abort the process."""
    code = """
    threading.Thread(target=CALLS["rows"], daemon=True).start()
    time.sleep(0.3)
    print("end")
    """
    assert python(COMMON + LONG + textwrap.dedent(code), timeout=LIMIT) == "end\n"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory by RLIMIT_AS")
def test_out_of_memory(python):
    """If working memory is not available, a call raises MemoryError, and the next call is correct."""
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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory by RLIMIT_AS")
@pytest.mark.parametrize("reduction", ["row", "sum"])
@pytest.mark.parametrize("broadcast", ["x", "y"])
def test_out_of_memory_leaves_out_as_it_was(python, broadcast, reduction):
    """The gradient of a broadcast argument needs memory besides that of the value and the other gradient."""
    code = """
    import resource
    broadcast, reduction = sys.argv[1:]
    many = np.broadcast_to(np.float32(0.5), (5000, 4_000_000))
    x, y = (many[0], many) if broadcast == "x" else (many, many[0])
    out = tuple(np.full(shape, 7, np.float32) for shape in (5000 if reduction == "row" else (), 4_000_000))
    digest(1)
    with open("/proc/self/statm") as f:
        used = int(f.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**24, resource.RLIM_INFINITY))
    try:
        klcore.kl_div(x, y, space="logits", reduction=reduction, return_grad=broadcast, out=out)
    except MemoryError:
        print(all((a == 7).all() for a in out))
    """
    assert python(COMMON + textwrap.dedent(code), broadcast, reduction, timeout=LIMIT) == "True\n"
