"""PyTorch tensors on a GPU: streams, graphs, results. Collected if KLCORE_TEST_DEVICES contains "cuda"."""

import pytest
from test_torch import kl, logits

torch = pytest.importorskip("torch", reason="no PyTorch: its adapter is not tested")


@pytest.mark.parametrize("device", ["cuda"])
def test_current_stream(device):
    """The kernels wait for the stream's earlier work, and nothing else waits for them."""
    x, y = logits(512, 4096).to(device), logits(512, 4096, seed=1).to(device)
    expected = kl(x, y, "row", return_grad="x")

    def step(x):
        leaf = (x + 0.0).requires_grad_()
        value = kl(leaf, y, "row")
        value.sum().backward()
        out = torch.empty_like(value)
        kl(leaf.detach(), y, "row", out=out)
        return value.detach(), leaf.grad, out

    step(x)  # compiled, and loaded, which waits for the GPU
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        found = step(x)
        busy = not stream.query()
    torch.cuda.synchronize()
    assert busy
    torch.testing.assert_close(found, (*expected, expected[0]), rtol=0, atol=0)


def steps(weights):
    """Losses whose kernels need working memory: totals, weighted means, gradients that are summed."""
    return {
        "total": lambda x, y: kl(x, y, "batchmean"),
        "weighted": lambda x, y: kl(x, y, "rowmean", weights=weights),
        "broadcast": lambda x, y: kl(x, y[:1], "sum"),
        "half": lambda x, y: kl(x.bfloat16(), y.bfloat16(), "batchmean"),
    }


@pytest.mark.parametrize("device", ["cuda"])
@pytest.mark.parametrize("name", steps(None))
def test_cuda_graph(device, name):
    """Memory that a graph has allocated belongs to it as long as it lives, whoever allocates meanwhile."""
    x, y = logits(300, 5000, dtype=torch.float32).to(device), logits(300, 5000, seed=1, dtype=torch.float32).to(device)
    step = steps(torch.rand(300, device=device))[name]

    def loss_and_gradient():
        leaf = y.detach().requires_grad_()
        value = step(x, leaf)
        return value.detach(), torch.autograd.grad(value, leaf)[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        loss_and_gradient()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        found = loss_and_gradient()
    for seed in (2, 3):
        x.copy_(logits(300, 5000, seed=seed, dtype=torch.float32))
        graph.replay()
        torch.cuda.synchronize()
        kept = tuple(t.clone() for t in found)
        others = [loss_and_gradient() for _ in range(3)]  # would be allocated in memory that the graph does not own
        graph.replay()
        torch.cuda.synchronize()
        for expected in (kept, others[0]):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("device", ["cuda"])
@pytest.mark.parametrize("name", steps(None))
def test_reduce_overhead(device, name):
    """torch.compile's own graphs."""
    x, y = logits(300, 5000, dtype=torch.float32).to(device), logits(300, 5000, seed=1, dtype=torch.float32).to(device)
    step = steps(torch.rand(300, device=device))[name]
    compiled = torch.compile(step, mode="reduce-overhead", fullgraph=True)
    for seed in range(4):
        x = logits(300, 5000, seed=seed, dtype=torch.float32).to(device)
        found = []
        for function in (step, compiled):
            torch.compiler.cudagraph_mark_step_begin()
            leaf = y.detach().clone().requires_grad_()
            value = function(x, leaf)
            value.backward()
            found.append((value.detach().clone(), leaf.grad.clone()))
        torch.testing.assert_close(*found, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("device", ["cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.bfloat16], ids=str)
def test_results_on_a_gpu(device, dtype):
    x = logits(2, 3).mul(9).to(dtype)
    on_gpu = kl(x.to(device), [1.0, 2.0, 3.0], "row", return_grad=("x", "y"), weights=[1.0, 0.5])
    on_cpu = kl(x, [1.0, 2.0, 3.0], "row", return_grad=("x", "y"), weights=[1.0, 0.5])
    torch.testing.assert_close(tuple(t.cpu() for t in on_gpu), on_cpu)
    assert kl(x.to(device), x, device="cpu").device.type == "cpu"
