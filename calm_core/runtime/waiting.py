"""How threads of an operator wait for one another: asleep, unless the user has said otherwise.

OpenMP's threads spin by default, which saves some microseconds at each barrier and takes a core from whoever works
beside them. Where it matters for speed, threads work side by side and meet at no barriers (``threads``); what is left
loses little by sleeping, and much by spinning on a busy machine (docs/performance.md).
"""

import os

VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""What users set; the last two are those of GNU's and LLVM's OpenMP."""


def wait_asleep() -> None:
    """To be called before the first import of torch, whose OpenMP reads the variables when it is loaded."""
    if not any(name in os.environ for name in VARIABLES):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
