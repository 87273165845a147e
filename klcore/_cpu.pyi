"""Types of the extension built from src/kl_cpu.pyx."""

from typing import Any

from typing_extensions import disjoint_base

OPENMP: int
COMPILER: str

def instruction_sets() -> dict[str, bool]: ...
def use_instruction_set(name: str) -> None: ...
def instruction_set() -> str: ...

OPERATIONS: dict[str, tuple[int, int, int]]
BY_TERM: int
BY_RATIO: int
BY_COST: int
BY_CLASS: int
SPACES: dict[str, int]
DTYPES: dict[str, int]
SIZES: dict[int, int]
OUTPUTS: dict[str, int]
CHUNK: int
COLUMNS: int
TEMPERATURES: tuple[float, float]
NARROW_TEMPERATURES: tuple[float, float]
TAILS: dict[str, int]
ROW_NUMBERS: int
NORM_STATES: int
MOST_CLASSES: int
PLACE_OF_KEY: int

def is_wide(operation: int, space_x: int, space_y: int, temperature: float, parameter: float = 0.0) -> bool: ...

@disjoint_base
class Planned: ...

def plan(
    operation: int,
    space_x: int,
    space_y: int,
    output: int,
    x: Any,
    y: Any,
    weights: Any,
    value: Any,
    dx: Any,
    dy: Any,
    wide: bool,
    temperature: Any,
    gradient_scale: float,
    threads: int,
    factors: Any,
    parameter: float,
    factor: float,
    inner_axes: int = -1,
) -> Planned: ...
def run(plans: list[Planned]) -> float: ...
def plain(call: tuple[Any, ...], threads: int) -> Any: ...
def chunk_sums(values: Any, sums: Any) -> None: ...
def add_up(values: Any) -> float: ...
def elementary(function: str, x: Any, out: Any) -> None: ...

MAX_STATS: int

def pretend_processors(n: int) -> None: ...
def few_at_once(operation: int, space_x: int, space_y: int, wide: bool, rows: int, n: int) -> int: ...
def sweeps(
    operation: int, space_x: int, space_y: int, wide: bool, terms: bool, gradient: bool, factors: bool = False
) -> tuple[int, ...]: ...
def sweep(
    number: int,
    operation: int,
    space_x: int,
    space_y: int,
    x: Any,
    y: Any,
    weights: Any,
    terms: Any,
    dx: Any,
    dy: Any,
    wide: bool,
    temperature: Any,
    gradient_scale: float,
    threads: int,
    parameter: float,
    factor: float,
    stats: Any,
    states: Any,
    inner_axes: int = -1,
) -> None: ...
def merge(
    number: int,
    operation: int,
    space_x: int,
    space_y: int,
    weights: Any,
    wide: bool,
    temperature: Any,
    threads: int,
    parameter: float,
    factor: float,
    states: Any,
    count: int,
    into: Any,
    fold: bool = False,
) -> None: ...

@disjoint_base
class Listed:
    keys: Any
    known: Any
    xs: Any
    ys: Any
    def __init__(
        self,
        x: Any,
        indices: Any,
        y: Any,
        weights: Any,
        temperature: Any,
        tail_mass: Any,
        space_x: int,
        space_y: int,
        tail: int,
        threads: int,
    ) -> None: ...
    def by_x(self, dxs: Any) -> Any: ...
    def by_y(self, dys: Any) -> None: ...
    def spread(
        self, dys: Any, y: Any, weights: Any, temperature: Any, known: Any, dy: Any, inner_axes: int
    ) -> None: ...
    def copy(self, values: Any, dx: Any, inner_axes: int) -> None: ...
