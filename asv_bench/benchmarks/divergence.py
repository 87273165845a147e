"""Time of one call on arrays that exist already, including those for the results."""

from .calls import DEVICES, IN_CACHE, NAMES, OTHERS, PAST_CACHE, timer, warm

VALUES = ["probs", "log_probs", "logits"]
GRADIENTS = [f"{space}, gradient" for space in VALUES]
MIXED = ["probs to logits, gradient", "entropy of logits", "cross-entropy, probs to logits"]


class _Calls:
    param_names = NAMES
    repeat = (5, 100, 0.6)  # in each of two processes 5 to 100 samples of one call, within 0.6 s if possible

    def setup(self, operation: str, device: str, dtype: str, shape: str) -> None:
        self.call = warm(operation, device, dtype, shape)
        self.timer = timer(device, shape)

    def time_call(self, *params: str) -> None:
        self.call()


class Rows(_Calls):
    """One value per row."""

    params = (VALUES + GRADIENTS + MIXED, DEVICES, ["float32"], [IN_CACHE, PAST_CACHE])


class Operations(_Calls):
    """One value and one gradient per row."""

    params = (list(OTHERS), DEVICES, ["float32"], [IN_CACHE])


class Dtypes(_Calls):
    """The same kernels with other dtypes in memory."""

    params = (
        ["probs", "logits", "logits, gradient"],
        DEVICES,
        ["float64", "float16", "bfloat16"],
        [IN_CACHE, PAST_CACHE],
    )


class Arguments(_Calls):
    """Other arguments: for probabilities, and for logits of listed classes."""

    params = (
        [
            "sum",
            "terms",
            "weights",
            "one y for all",
            "one y for all, gradient",
            "axis 0",
            "64 classes listed, gradient",
        ],
        DEVICES,
        ["float32"],
        [IN_CACHE],
    )
