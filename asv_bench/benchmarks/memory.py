"""Peak memory of a process: one that holds the arrays of a call, and one that makes the call as well. Temporaries would
stand between the two. Outside GPUs' memory, so on the CPU alone.
"""

from .calls import NAMES, prepare
from .divergence import GRADIENTS, VALUES


class Memory:
    params = ([*VALUES, *GRADIENTS, "axis 0"], ["cpu"], ["float32"], ["512x32768"])
    param_names = NAMES

    def setup(self, *params: str) -> None:
        self.call = prepare(*params)

    def peakmem_arrays(self, *params: str) -> None:
        """Nothing but what setup() left: Python, NumPy, klcore and 64 MiB an array."""

    def peakmem_call(self, *params: str) -> None:
        self.call()
