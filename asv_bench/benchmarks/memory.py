"""Peak memory of a process that holds the arrays of a call, and of one that also makes the call: the difference is
temporaries. asv cannot measure GPU memory, hence only the CPU.
"""

from .calls import NAMES, prepare
from .divergence import GRADIENTS, VALUES


class Memory:
    params = ([*VALUES, *GRADIENTS, "axis 0"], ["cpu"], ["float32"], ["512x32768"])
    param_names = NAMES

    def setup(self, *params: str) -> None:
        self.call = prepare(*params)

    def peakmem_arrays(self, *params: str) -> None:
        """Only what setup() left: Python, NumPy, klcore and 64 MiB per array."""

    def peakmem_call(self, *params: str) -> None:
        self.call()
