"""CALM, the model package: continuous autoregressive language models (arXiv 2510.27688).

Models know nothing of training, files or devices; objectives, metrics and samplers take plain tensors or
callables. Stages read files and call into this package; nothing here imports them.
"""

import signal
import sys

# While `calm` still imports, Ctrl-C ends it without a traceback; its main function then has a handler of its own.
if sys.argv and sys.argv[0].endswith("/calm") and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
