"""What klcore costs before it computes anything: calls on 10 x 10 arrays, and the import."""

import functools

import klcore

from .calls import DEVICES, NAMES, library, random_logits, timer, to_space, waiting

CALLS = {
    "row": {},
    "sum": {"reduction": "sum"},
    "gradient": {"return_grad": "y"},
    "logits": {"space": "logits"},
    "named device": {},  # device= instead of inferring it from the arrays
}
NEW_PROCESS = {  # what is timed, and what runs before
    "import": ("import klcore", ""),
    "import, first call": ("import klcore; klcore.kl_div([0.5, 0.5], [0.9, 0.1])", "import numpy"),
}


class SmallCalls:
    """A thousand calls per sample, because asv calls setup(), which skips a missing GPU, before each sample."""

    params = (list(CALLS), DEVICES, ["float32"], ["10x10"])
    param_names = NAMES
    repeat = (5, 100, 0.6)

    def setup(self, operation: str, device: str, dtype: str, shape: str) -> None:
        xp = library(device)
        x, y = (xp.asarray(to_space("probs", random_logits(10, 10, seed)).astype(dtype)) for seed in (0, 1))
        words = CALLS[operation] | ({"device": device} if operation == "named device" else {})
        self.call = functools.partial(klcore.kl_div, x, y, **words)
        self.wait = waiting(device)
        self.timer = timer(device, shape)
        self.call()

    def time_thousand_calls(self, operation: str, device: str, dtype: str, shape: str) -> None:
        """On a GPU there is one wait for all of them: this measures the launches."""
        for _ in range(1000):
            self.call()
        self.wait()

    time_thousand_calls.pretty_name = "1000 calls on 10 x 10 (ms = us per call)"


class Import:
    """In a new process each time."""

    params = (list(NEW_PROCESS),)
    param_names = NAMES[:1]
    repeat = (5, 20, 3.0)

    def timeraw_import(self, operation: str) -> tuple[str, str]:
        return NEW_PROCESS[operation]
