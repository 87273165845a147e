"""The emulator that runs CUDA kernels without a GPU: correct kernels give correct results, and wrong ones are
detected."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import as_here
from emulator import device
from emulator.device import EmulatorError, cupy, settings, using

pytestmark = pytest.mark.skipif(
    not shutil.which("g++") or sys.platform == "win32", reason="the emulator needs g++ and POSIX"
)

# One source for all toy kernels, compiled once. Like klcore's kernels they take one kl::Plan; `wrong` adds the faults.
SOURCE = r"""
#if defined(KL_EMULATOR)
#define KL_SHARED(T) reinterpret_cast<T*>(emulator::shared_memory())
#endif
#define FULL 0xffffffffu
#if !defined(SCALE)
#define SCALE 1
#endif

namespace kl {
struct Plan { const float* in; float* out; int n; int wrong; };
template <typename T> struct Constant { static inline T scale = SCALE; };   // must not be shared between modules
}

__device__ __forceinline__ float warp_sum(float v) {
  for (int k = 16; k; k /= 2) v += __shfl_xor_sync(FULL, v, k);
  return v;
}

// out[block] = the sum of this block's share of in
extern "C" __global__ void __launch_bounds__(256) block_sum(const kl::Plan p) {
  float* partial = KL_SHARED(float);
  unsigned i = blockIdx.x * blockDim.x + threadIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float v = warp_sum(i < (unsigned)p.n ? p.in[i] : 0.f);
  if (lane == 0) partial[warp] = v;
  if (!p.wrong) __syncthreads();
  if (warp == 0) {
    v = warp_sum(lane < blockDim.x / 32 ? partial[lane] : 0.f);
    if (lane == 0) p.out[blockIdx.x] = v * kl::Constant<float>::scale;
  }
}

// Thread t passes t through shared memory to its right neighbour, again and again: it needs the second barrier as well.
extern "C" __global__ void pass_round(const kl::Plan p) {
  float* slot = KL_SHARED(float);
  float v = (float)threadIdx.x;
  for (int k = 0; k < p.n; k++) {
    slot[threadIdx.x] = v;
    __syncthreads();
    v = slot[(threadIdx.x + blockDim.x - 1) % blockDim.x];
    if (!p.wrong) __syncthreads();
  }
  p.out[blockIdx.x * blockDim.x + threadIdx.x] = v;
}

extern "C" __global__ void divergent(const kl::Plan p) {
  if (threadIdx.x < 40) __syncthreads();
  else if (p.wrong) __shfl_sync(threadIdx.x < 64 ? 0xfu : FULL, 1.f, 0);
}

// The first p.n warps pass numbers on, as often as they are warps; the others leave.
extern "C" __global__ void some_warps(const kl::Plan p) {
  float* mine = KL_SHARED(float);
  if ((int)threadIdx.x >= 32 * p.n) return;
  float v = (float)threadIdx.x;
  for (int k = 0; k < p.n; k++) {
    mine[threadIdx.x] = v;
    kl::warps_barrier(p.wrong == 1 && k == 1 ? p.n + 1 : p.n);
    v = mine[(threadIdx.x + 32) % (32 * p.n)];
    if (p.wrong != 2) kl::warps_barrier(p.n);
    if (p.wrong == 3 && threadIdx.x == 5) return;
  }
  p.out[threadIdx.x] = v;
}

extern "C" __global__ void early(const kl::Plan p) {
  if (threadIdx.x % 32 == 7) return;
  p.out[threadIdx.x] = warp_sum(1.f);
}

extern "C" __global__ void meets(const kl::Plan p) {
  unsigned lane = threadIdx.x % 32, half = lane < 16 ? 0xffffu : 0xffff0000u;
  switch (p.wrong) {
    case 0: {
      double v = __shfl_down_sync(FULL, (double)lane, 1u);                     // 1 2 ... 31 31
      v += (double)__shfl_sync(half, (unsigned long long)lane, lane < 16 ? 3 : 30);
      v += (double)(__ballot_sync(FULL, lane == 2 || lane == 31) >> 16);        // 0x8000
      v += __all_sync(FULL, lane < 32) * 0.5 + __all_sync(FULL, lane < 31) * 7;
      v += __any_sync(half, lane == 1) * 0.25;
      __syncwarp();
      p.out[blockIdx.x * blockDim.x + threadIdx.x] = (float)v;
      break;
    }
    case 1: __shfl_sync(0xffffu, 1.f, 0); break;                               // lanes above 15 are not in it
    case 2: __shfl_xor_sync(half, 1.f, 16); break;                             // reads the other half
    case 3: lane < 16 ? (void)__any_sync(FULL, 1) : (void)__all_sync(FULL, 1); break;
    case 4: if (lane < 16) __syncwarp(); else __syncthreads(); break;
    case 5: throw 5;
  }
}

extern "C" __global__ void copies(const kl::Plan p) {
  float* buffer = KL_SHARED(float);
  if (p.wrong == 2) kl::copy_async<16>(buffer + 4 * threadIdx.x + 1, p.in);
  if (p.wrong == 3) kl::copy_async<8>(buffer + 4 * blockDim.x, p.in);
  if (p.wrong == 4) kl::copy_vector<8>(p.out, p.in + 1);
  kl::copy_async<16>(buffer + 4 * threadIdx.x, p.in + 4 * threadIdx.x);
  if (p.wrong != 1) kl::wait_copies();
  __syncthreads();
  float* reversed = buffer + 4 * (blockDim.x - 1 - threadIdx.x);
  kl::copy_vector<16>(p.out + 4 * threadIdx.x, reversed);
}

extern "C" __global__ void overrun(const kl::Plan p) {
  KL_SHARED(float)[threadIdx.x + (p.wrong ? 1 : 0)] = 1.f;
}

extern "C" __global__ void copy(const kl::Plan p) {
  unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < (unsigned)p.n) p.out[i] = p.in[i + (p.wrong ? 1 : 0)];
}

extern "C" __global__ void exponentials(const kl::Plan p) { p.out[threadIdx.x] = kl::hardware_exp2(p.in[threadIdx.x]); }

extern "C" __global__ void deep(const kl::Plan p) {
  volatile char hole[270000];
  for (int i = 0; i < 270000; i++) hole[i] = 1;
  p.out[threadIdx.x] = hole[p.n];
}
"""
PLAN = np.dtype([("in", "u8"), ("out", "u8"), ("n", "i4"), ("wrong", "i4")])
SEEDS = range(6)


@pytest.fixture(scope="session")
def modules(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emulator")

    def load(*options, arch=90):
        path = folder / f"{settings.sanitize}{arch}{''.join(options)}.cubin"
        path.write_bytes(device.compile(SOURCE, options, arch))
        return cupy.RawModule(path=str(path))

    return load


@pytest.fixture(scope="session")
def launch(modules):
    return launcher(modules())


def launcher(module):
    def run(name, grid, block, x=(), size=None, n=None, wrong=0, shared=0, seed=0, module=module):
        x = cupy.asarray(np.asarray(x, dtype="float32"))
        out = cupy.empty(grid * block if size is None else size, "float32")
        plan = np.array([(x.data.ptr, out.data.ptr, x.size if n is None else n, wrong)], PLAN)
        kernel = module.get_function(name)
        if shared > 48 << 10:
            kernel.max_dynamic_shared_size_bytes = shared
        with using(seed=seed):
            kernel((grid,), (block,), (plan,), shared_mem=shared)
        return cupy.asnumpy(out)

    return run


def found(launch, error, *arguments, **keywords):
    with pytest.raises(EmulatorError, match=error):
        launch(*arguments, **keywords)


# ---- kernels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_right_reduction_is_right_under_every_schedule(launch, seed, threads):
    x = np.random.default_rng(0).random(5000, dtype="float32")
    with using(threads=threads):
        sums = launch("block_sum", 20, 256, x, size=20, shared=32, seed=seed)
    assert (sums == launch("block_sum", 20, 256, x, size=20, shared=32)).all()
    np.testing.assert_allclose(sums, np.pad(x, (0, 120)).reshape(20, 256).sum(1), rtol=1e-6)


def test_a_missing_barrier_shows(launch):
    x = np.ones(256, dtype="float32")
    assert np.isnan(launch("block_sum", 1, 256, x, size=1, shared=32, wrong=1)).all()


def test_a_missing_barrier_behind_the_reading_shows_where_a_warp_is_held_back(launch):
    def passed(seed, wrong=0):
        return launch("pass_round", 3, 96, n=5, shared=4 * 96, seed=seed, wrong=wrong).reshape(3, 96)

    right = np.roll(np.arange(96), 5)
    for seed in SEEDS:
        assert (passed(seed) == right).all(), seed
    for seed in SEEDS[1::2]:  # data that is written too early has arrived when the last warp of a block reads
        assert (passed(seed, wrong=1) != right).any(axis=1).all(), seed


def test_barriers_that_not_all_threads_reach(launch):
    found(
        launch, "^divergent: block 0, thread 0: is at __syncthreads and .* thread 40 has returned$", "divergent", 2, 64
    )
    for seed in SEEDS:
        found(launch, "^divergent: block .*, thread .*", "divergent", 2, 96, wrong=1, seed=seed)


def test_some_warps_of_a_block_meet(launch):
    for seed in SEEDS:
        out = launch("some_warps", 1, 160, size=96, n=3, shared=4 * 96, seed=seed)
        assert (out == np.arange(96)).all()
    wrong = [launch("some_warps", 1, 160, size=96, n=3, shared=4 * 96, seed=seed, wrong=2) for seed in SEEDS]
    assert any((w != np.arange(96)).any() for w in wrong)
    missed = "^some_warps: block 0, thread .*: is at warps_barrier and would wait for ever: thread .* has returned$"
    found(launch, missed, "some_warps", 1, 160, size=96, n=3, shared=4 * 96, wrong=1)
    found(launch, missed, "some_warps", 1, 160, size=96, n=3, shared=4 * 96, wrong=3)
    found(launch, "a barrier of 6 warps, .* the block has fewer", "some_warps", 1, 160, n=6, shared=768)


def test_warps_of_which_lanes_are_missing(launch):
    for seed in SEEDS:
        found(launch, "^early: block 0, thread .*: is at __shfl_xor_sync .* has returned$", "early", 1, 64, seed=seed)


def test_lanes_that_meet(launch):
    lane = np.arange(32)
    expected = np.minimum(lane + 1, 31) + np.where(lane < 16, 3.25, 30) + 0x8000 + 0.5
    for seed in SEEDS:
        assert (launch("meets", 2, 64, seed=seed).reshape(4, 32) == expected).all()


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (1, "thread 16: .*mask 0000ffff, which excludes its own lane, 16"),
        (2, "thread 0: is at __shfl_xor_sync with mask 0000ffff, but reads lane 16"),
        (3, "thread 31: is at __all_sync with .*, but lane 0 is at __any_sync"),
        (4, "thread 0: is at __syncwarp and would wait for ever: thread 16 is at __syncthreads"),
        (5, "thread 0: an exception"),
    ],
)
def test_lanes_that_miss_each_other(launch, wrong, error):
    found(launch, "^meets: block 0, " + error, "meets", 1, 32, wrong=wrong)


def test_copies_land_when_they_are_waited_for(launch):
    x = np.arange(256)
    for seed in SEEDS:
        out = launch("copies", 1, 64, x, size=256, shared=1024, seed=seed)
        assert (out.reshape(64, 4)[::-1] == x.reshape(64, 4)).all()
        out = launch("copies", 1, 64, x, size=256, shared=1024, seed=seed, wrong=1)
        assert np.isnan(out).any()
        assert np.isnan(out).all() or seed


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (2, "copies asynchronously to 16 bytes at 0x[0-9a-f]*4, which is not aligned"),
        (3, "copies asynchronously to 0x.* which is not in the shared memory of its block"),
        (4, "reads 8 bytes at 0x[0-9a-f]*4, which is not aligned"),
    ],
)
def test_misaligned_and_misplaced_copies(launch, wrong, error):
    found(launch, "^copies: block 0, thread 0: " + error, "copies", 1, 64, np.arange(256), shared=1024, wrong=wrong)


def test_blocks_that_are_too_large(launch):
    found(launch, "overrun: 2 blocks of 1025 threads cannot be launched", "overrun", 2, 1025)


def test_shared_memory_overrun(launch):
    launch("overrun", 1, 32, shared=128)
    found(launch, "overrun: block 0: wrote beyond .* 128 bytes, at byte 128", "overrun", 1, 32, shared=128, wrong=1)


def test_a_stack_overrun_is_no_mystery(launch):
    with using(threads=1):
        found(launch, "deep: block 0, thread .*stack overflowed", "deep", 1, 32, n=0)
    launch("block_sum", 20, 256, range(5000), size=20, shared=32)


def test_the_hardware_exponential_is_inexact_but_close(launch):
    x = np.linspace(-40, 5, 1024, dtype="float32")
    out = launch("exponentials", 1, 1024, x).astype("float64")
    error = out / np.exp2(x.astype("float64")) - 1
    assert 1e-7 < np.abs(error).max() < 3e-7
    assert launch("exponentials", 1, 4, [0, -np.inf, np.inf, np.nan]).tolist()[:3] == [1, 0, np.inf]


def test_the_switch_of_other_platforms(modules):
    with using(ucontext=True):
        slow = launcher(modules())
        for seed in range(2):
            assert (slow("block_sum", 2, 256, np.ones(512), size=2, shared=32, seed=seed) == 256).all()
            found(slow, "thread .* has returned", "divergent", 2, 64, seed=seed)


def test_modules_share_no_variables(launch, modules):
    doubled = modules("-DSCALE=2")
    x = np.ones(256)
    assert launch("block_sum", 1, 256, x, size=1, shared=32, module=doubled) == 512
    assert launch("block_sum", 1, 256, x, size=1, shared=32) == 256


def test_an_older_gpu_has_no_asynchronous_copies():
    source = "namespace kl { struct Plan { int n; }; }\nvoid k(const kl::Plan) { kl::copy_async<4>(nullptr, nullptr); }"
    with pytest.raises(RuntimeError, match="asynchronous copies need compute capability 8"):
        device.compile(source, (), 75)


# ---- in place of CuPy and NVRTC
# ----------------------------------------------------------------------------------------


def test_arrays_are_cupys():
    x = cupy.asarray(np.arange(6, dtype="float32").reshape(2, 3))
    assert type(x).__module__ == "cupy"
    for y in (
        x + 1,
        x.T,
        x.sum(),
        x.max(axis=0),
        x[0],
        x[0, 0],
        np.exp(x),
        x.astype("float64"),
        cupy.moveaxis(x, 0, 1),
    ):
        assert isinstance(y, cupy.ndarray)
    assert x[1, 1].shape == x.sum().shape == (x > 0).all().shape == ()
    assert float(x.sum()) == 15
    assert x.data.ptr == x.__cuda_array_interface__["data"][0]
    assert x[1, 1].data.ptr == x.data.ptr + 16
    x[1, 1] = 7
    assert cupy.asnumpy(x).tolist() == [[0, 1, 2], [3, 7, 5]]
    assert type(x.get()) is np.ndarray
    assert np.isnan(cupy.empty((2, 3)).get()).all()
    assert cupy.empty(3).data.ptr % 512 == 0
    assert cupy.broadcast_to(x, (4, 2, 3)).strides[0] == 0
    assert cupy.empty_like(x.T).strides == x.T.strides
    assert not hasattr(x.flags, "writeable")


def test_what_cupy_refuses():
    x = cupy.zeros(3)
    with pytest.raises(TypeError, match="Unsupported type"):
        x + np.zeros(3)
    with pytest.raises(TypeError, match="subok"):
        cupy.empty_like(x, subok=False)
    with pytest.raises(ValueError, match="non-scalar"):
        x[:] = np.zeros(3)
    with pytest.raises(ValueError, match="Unsupported dtype"):
        cupy.asarray(["a"])
    with pytest.raises(NotImplementedError, match="max_work"):
        cupy.shares_memory(x, x, max_work=10)


def test_shared_memory_beyond_48_kb_has_to_be_asked_for(modules):
    kernel = modules().get_function("overrun")
    plan = np.zeros(1, PLAN)
    with pytest.raises(EmulatorError, match="max_dynamic_shared_size_bytes is 49152"):
        kernel((1,), (32,), (plan,), shared_mem=50_000)
    with using(architecture="75"), pytest.raises(EmulatorError, match="are not available"):
        kernel.max_dynamic_shared_size_bytes = 100_000
    kernel.max_dynamic_shared_size_bytes = 100_000
    kernel((1,), (32,), (plan,), shared_mem=100_000)
    with pytest.raises(EmulatorError, match="the plan has 8 bytes, its struct 24"):
        kernel((1,), (32,), (np.zeros(1),))


def test_devices():
    with using(devices=2, architecture="80"):
        assert cupy.cuda.runtime.getDeviceCount() == 2
        with cupy.cuda.Device(1) as one:
            assert one.compute_capability == "80"
            x = cupy.zeros(2)
        assert cupy.cuda.runtime.getDevice() == 0
        assert x[:1].device == x.data.device == one != cupy.zeros(1).device
        with pytest.raises(EmulatorError, match="invalid device ordinal"):
            cupy.cuda.Device(2)


def test_install_and_uninstall(python):
    code = """
import sys
sys.path.insert(0, sys.argv[1])
from emulator import device
from klcore.backends.cuda import nvrtc
before = nvrtc.compile, nvrtc.build
for _ in range(2):
    device.install()
    import cupy
    assert cupy is device.cupy
    assert nvrtc.compile is device.compile and nvrtc.build is not before[1]
    device.uninstall()
    assert sys.modules.get("cupy") is None
    assert (nvrtc.compile, nvrtc.build) == before
"""
    python(code, os.path.dirname(__file__))


def test_processes_at_once_compile_once(tmp_path):
    code = """
import sys
sys.path.insert(0, sys.argv[1])
from emulator import device
print(len(device.compile("namespace kl { struct Plan { int n; }; }", (), 90)))
"""
    (tmp_path / "g++").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/log\nexec {shutil.which("g++")} "$@"\n')
    (tmp_path / "g++").chmod(0o755)
    keywords = as_here(KLCORE_EMULATOR_CACHE=tmp_path / "cache", CXX=tmp_path / "g++")
    words = [sys.executable, "-c", code, os.path.dirname(__file__)]
    running = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True, **keywords) for _ in range(3)]
    sizes = {process.communicate(timeout=600)[0] for process in running}
    assert len(sizes) == 1
    assert not any(process.returncode for process in running)
    assert (tmp_path / "log").read_text().count("-shared") == 1


# ---- the sanitizers --------------------------------------------------------------------------------------------------

SANITIZED = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
import test_emulator as t
from emulator import device

device.settings.sanitize = True
path = sys.argv[2] + "/sanitized.so"
with open(path, "wb") as file:
    file.write(device.compile(t.SOURCE, (), 90))
launch = t.launcher(device.cupy.RawModule(path=path))
x = np.arange(999)
assert (launch("copy", 4, 256, x, size=999) == x).all()
for seed in range(3):
    launch("block_sum", 20, 256, np.ones(5000), size=20, shared=32, seed=seed)
    launch("pass_round", 3, 96, n=5, shared=4 * 96, seed=seed)
    launch("copies", 1, 64, range(256), size=256, shared=1024, seed=seed)
    t.found(launch, "would wait for ever", "divergent", 2, 64, seed=seed)
    t.found(launch, "an exception", "meets", 2, 64, wrong=5, seed=seed)
print("the right ones ran", flush=True)
launch(sys.argv[3], 1, 256, np.arange(256), shared=1024, wrong=1)
"""


@pytest.mark.exhaustive
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs g++'s sanitizers")
@pytest.mark.parametrize("kernel", ["copy", "overrun"])
def test_sanitizers_find_what_lies_outside(kernel, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SANITIZED, os.path.dirname(__file__), str(tmp_path), kernel],
        capture_output=True,
        text=True,
        timeout=600,
        **as_here(**device.sanitizer_environment()),
    )
    assert done.stdout == "the right ones ran\n", done.stderr
    assert "ERROR: AddressSanitizer" in done.stderr
    assert f"in {kernel} " in done.stderr  # and says where
    assert done.returncode
