"""Real processes that speak through gloo, as under torchrun. A fork server that has imported everything makes them."""

import multiprocessing
import pickle
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm.auto import tqdm

TIMEOUT = 300  # seconds; on an idle machine the slowest takes ten


def on_ranks(size: int, folder: Path, task: Callable[..., Any], /, **options: Any) -> list[Any]:
    """What `task(rank, **options)` returns on each of `size` processes; the exit code in words for one that died."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([task.__module__, "transformers.models.llava.modeling_llava"])
    meeting_place = folder / f"ranks_{time.monotonic_ns()}"
    meeting_place.mkdir()
    common = (size, meeting_place, torch.get_num_threads(), task, options)
    processes = [context.Process(target=one_rank, args=(rank, *common)) for rank in range(size)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + TIMEOUT
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for rank in hanging:
        processes[rank].kill()
    assert not hanging
    found = [meeting_place / f"result_{rank}" for rank in range(size)]
    return [
        pickle.loads(path.read_bytes()) if path.exists() else f"exit code {process.exitcode}"
        for path, process in zip(found, processes, strict=True)
    ]


def one_rank(
    rank: int, size: int, meeting_place: Path, threads: int, task: Callable[..., Any], options: dict[str, Any]
) -> None:
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a killed process leaves behind
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=f"file://{meeting_place}/store", rank=rank, world_size=size)
    dist.barrier()  # one that is done and gone would be missed by one that is still connecting
    result = task(rank, **options)
    partial = meeting_place / f"partial_{rank}"
    partial.write_bytes(pickle.dumps(result))
    partial.rename(meeting_place / f"result_{rank}")
    dist.destroy_process_group()
