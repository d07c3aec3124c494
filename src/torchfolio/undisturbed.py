"""Imported first by the server that workers are forked from: it imports without collecting garbage or hearing Ctrl-C.

Workers turn both on again. Without collections the memory that they share with the server stays shared.
"""

import gc
import signal

gc.disable()
signal.signal(signal.SIGINT, signal.SIG_IGN)
