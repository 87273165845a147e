"""klcore over time, by airspeed velocity: `make asv`; one commit beside another: `asv continuous -f 1.2 main HEAD`.

asv installs the commits to be measured; these files are always those of the working tree. With them come two more of
its files: the floor (benchmarks/floor.py) and the exact answers (tests/oracle.py). Nothing else of klcore is imported
but its public names and its table of operations. asv takes every increase for a regression, of tracked numbers as of
times: track what should be small.
"""

import sys
from pathlib import Path

_ROOT = Path(__file__).parents[2]
sys.path += [str(_ROOT / "benchmarks"), str(_ROOT / "tests")]
