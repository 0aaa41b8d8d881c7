"""Three ranks that torchrun starts: one comes late, then one is frozen, then one takes another branch."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from leanmill.parallel.flight import start_recorder
from leanmill.parallel.pulse import Pulse, PulseWatch


HANG_SECONDS = 1.2


class Freed(logging.Handler):
    """Prints what is told, and lets a frozen rank go on."""

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), flush=True)
        if "is silent" in record.getMessage():
            os.kill(int(dist.distributed_c10d._get_default_store().get("frozen")), signal.SIGCONT)


def main(folder: Path) -> None:
    start_recorder(is_dumped=False)
    dist.init_process_group("gloo")
    rank, store, pulse = dist.get_rank(), dist.distributed_c10d._get_default_store(), Pulse()
    log = logging.getLogger("leanmill")
    log.addHandler(Freed())
    watch = PulseWatch(pulse, store, rank=rank, world_size=3, hang_seconds=HANG_SECONDS, folder=folder).start()
    dist.all_reduce(torch.ones(2))

    pulse.enter("reading data", 57)
    if rank == 2:
        time.sleep(5 * HANG_SECONDS)
    pulse.enter("update")
    dist.all_reduce(torch.ones(3))

    if rank == 1:
        store.set("frozen", str(os.getpid()))
        time.sleep(HANG_SECONDS)  # it has told where it is
        os.kill(os.getpid(), signal.SIGSTOP)
    dist.all_reduce(torch.ones(4))

    pulse.enter("checkpoint", 58)
    if rank == 1:
        dist.broadcast(torch.ones(5), src=1)
        time.sleep(6 * HANG_SECONDS)
    else:
        work = dist.all_reduce(torch.ones(5), async_op=True)
        time.sleep(6 * HANG_SECONDS)
        del work
    watch.end()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
