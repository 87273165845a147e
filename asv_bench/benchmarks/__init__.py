"""klcore over time, by airspeed velocity: `make asv`. To compare two commits: `asv continuous -f 1.2 main HEAD`.

asv installs the commits to measure, but always uses these files from the working tree. They import two more files from
it: the floor (benchmarks/floor.py) and the exact answers (tests/oracle.py). Of klcore they import only public names and
the table of operations. asv treats every increase as a regression, in tracked numbers as in times: track what should be
small.
"""

import sys
from pathlib import Path

_ROOT = Path(__file__).parents[2]
sys.path += [str(_ROOT / "benchmarks"), str(_ROOT / "tests")]
