"""PyTorch tensors on a GPU: the current stream, and results. Collected where KLCORE_TEST_DEVICES asks for "cuda"."""

import pytest
from test_torch import kl, logits

torch = pytest.importorskip("torch", reason="no PyTorch: its adapter is not tested")


@pytest.mark.parametrize("device", ["cuda"])
def test_current_stream(device):
    """The kernels wait for what the stream does, and nobody else for them."""
    x, y = logits(512, 4096).to(device), logits(512, 4096, seed=1).to(device)
    expected = kl(x, y, "row", return_grad="x")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late = x + 0.0
        leaf = late.requires_grad_()
        value = kl(leaf, y, "row")
        value.sum().backward()
        out = torch.empty_like(value)
        kl(leaf.detach(), y, "row", out=out)
        busy = not stream.query()
    torch.cuda.synchronize()
    assert busy
    torch.testing.assert_close((value.detach(), leaf.grad, out), (*expected, expected[0]), rtol=0, atol=0)


@pytest.mark.parametrize("device", ["cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.bfloat16], ids=str)
def test_results_on_a_gpu(device, dtype):
    x = logits(2, 3).mul(9).to(dtype)
    on_gpu = kl(x.to(device), [1.0, 2.0, 3.0], "row", return_grad=("x", "y"), weights=[1.0, 0.5])
    on_cpu = kl(x, [1.0, 2.0, 3.0], "row", return_grad=("x", "y"), weights=[1.0, 0.5])
    torch.testing.assert_close(tuple(t.cpu() for t in on_gpu), on_cpu)
    assert kl(x.to(device), x, device="cpu").device.type == "cpu"
