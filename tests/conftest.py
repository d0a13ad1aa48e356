"""One thread for each library, whatever the machine has: limits of memory count what threads reserve."""

import os

# Read when a library is loaded, so set before any of them is; the processes that tests start inherit it.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS", "POLARS_MAX_THREADS", "ARROW_IO_THREADS"):
    os.environ[name] = "1"
# Threads that wait leave the cores to the tests of another worker.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
