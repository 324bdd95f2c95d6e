"""Pretends to train, for tests of what starts trainings: --config.seed tells how it ends.

0 and 1 end well, 2 with an error. 3 waits for a signal to stop, once, and ends well at the next
start.
"""

import json
import pathlib
import signal
import sys

FLAGS = dict(word.lstrip("-").split("=", 1) for word in sys.argv[1:])
SEED = int(FLAGS["config.seed"])
WORKDIR = pathlib.Path(FLAGS["workdir"])
WORKDIR.mkdir(parents=True, exist_ok=True)
with open(WORKDIR / "starts", "a") as starts:
    starts.write("start\n")
if SEED == 2:
    sys.exit(2)
if SEED == 3 and len((WORKDIR / "starts").read_text().splitlines()) == 1:
    # Blocked first, so that none can come between the file that invites it and the wait.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    (WORKDIR / "waits").touch()
    signal.sigwait({signal.SIGTERM})
    sys.exit(42)
rows = [{"step": 1, "val/accuracy": 0.1, "val/loss": 3.0}, {"step": 2, "val/accuracy": SEED / 10}]
(WORKDIR / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
