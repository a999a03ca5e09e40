"""A job whose last rank is killed while the others wait for its keys. See :mod:`.composed`."""

from __future__ import annotations

import os
import signal

from benchmarks.sharded.job import Job
from benchmarks.sharded.problems import Attention, Mask


def main() -> None:
    job = Job()
    attention = Attention(job, Mask("one document", [0, job.n * 64], -1), "torch", 64)
    attend = attention.sharded("zig_zag")
    attend()
    job.line_up()
    job.say("step 1")
    if job.rank == job.n - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        attend()


if __name__ == "__main__":
    main()
