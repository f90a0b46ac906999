"""For processes whose clock jumps: every look at it is ten years from the one before, ahead and back in turn."""

import itertools
import time

_now, _looks = time.time, itertools.count()
time.time = lambda: _now() + (-1) ** next(_looks) * 1.6e8
time.time_ns = lambda: int(time.time() * 1e9)
