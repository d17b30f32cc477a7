"""A command that writes down every signal it gets, one number a line, to $OUT/signals; USR2 twice ends it."""

from __future__ import annotations

import os
import signal

mask = signal.valid_signals() - {signal.SIGCHLD}
signal.pthread_sigmask(signal.SIG_BLOCK, mask)
out = os.open(os.environ["OUT"] + "/signals", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
open(os.environ["OUT"] + "/recording", "w").close()
while True:
    info = signal.sigwaitinfo(mask)
    os.write(out, f"{info.si_signo}\n".encode())
    if info.si_signo == signal.SIGTERM:
        os._exit(43)
