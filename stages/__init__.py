"""The stages of dvc.yaml, a thin module each: read params and inputs, call calm_core, write outputs."""

import signal
import sys

from calm_core.runtime.caches import use_writable_caches
from calm_core.runtime.waiting import wait_asleep

# `python -m stages.NAME` comes here first, before the stage's module imports torch and others.
wait_asleep()
use_writable_caches()

# Until run_stage has handlers of its own, Ctrl-C ends that program without a traceback. Python has "-m" in place of a
# program's name while it looks for the module, and at no other time.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
