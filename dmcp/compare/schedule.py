"""In which order, and in which processes, the tasks of a comparison are done."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from dmcp.compare.config import CompareConfig
from dmcp.compare.tasks import Find, Place, Pretrain, Retrain, Task, do
from dmcp.errors import DmcpError

Progress = Callable[[int, int, str], None]
"""Called with the tasks that are done, those there are, and the last one's name."""


def tasks_of(config: CompareConfig) -> list[Task]:
    """Everything that a comparison needs, in the order in which it is begun."""
    cells = [(method, seed) for seed in config.seeds for method in config.methods]
    return [
        *(Pretrain(seed) for seed in config.seeds),
        *(Find(method, seed) for method, seed in cells),
        *(
            Retrain(method, seed, budget, track)
            for track in config.tracks
            for budget in config.budgets
            for method, seed in cells
        ),
    ]


def carry_out(
    config: CompareConfig,
    place: Place,
    jobs: int,
    seconds: float | None,
    progress: Progress,
) -> tuple[dict[Task, DmcpError], list[Task]]:
    """Do what is not done yet.

    Args:
        config: the comparison.
        place: where.
        jobs: processes; with one and no limit of time, this process does everything.
        seconds: after so many the processes are stopped wherever they are, None never. What they
            were at continues from its checkpoint in a later call.
        progress: told after every task.

    Returns:
        The tasks that failed, with the reasons, and those that are left, because the time was over
        or because they need one that failed.
    """
    tasks = tasks_of(config)
    pending = [task for task in tasks if not task.is_done(config, place.folder)]
    queue = _Queue(config, place.folder, pending)
    deadline = None if seconds is None else time.monotonic() + seconds

    def report(task: Task) -> None:
        progress(len(tasks) - len(queue.waiting) - len(queue.failed), len(tasks), name_of(task))

    progress(len(tasks) - len(pending), len(tasks), "")
    if jobs == 1 and deadline is None:
        while (task := queue.next()) is not None:
            queue.finish(task, _attempt(task, config, place))
            report(task)
        return queue.failed, queue.waiting
    theirs = set(multiprocessing.active_children())
    with ProcessPoolExecutor(
        jobs, multiprocessing.get_context("spawn"), initializer=_end_with_parent
    ) as pool:
        try:
            for task, error in _in_processes(pool, queue, jobs, config, place, deadline):
                queue.finish(task, error)
                report(task)
        except BrokenProcessPool:
            raise DmcpError(
                "a process of the comparison was killed, for want of memory perhaps; the same "
                "command continues, with fewer jobs if need be"
            ) from None
        finally:
            # Nobody waits for a task that runs: the time is over, or something went wrong.
            if queue.running:
                for process in set(multiprocessing.active_children()) - theirs:
                    process.kill()
    return queue.failed, queue.waiting


def _end_with_parent() -> None:
    """Let this process end when the one that began it does, however that ends: otherwise it would
    go on writing to a folder that the next one takes up."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def name_of(task: Task) -> str:
    """A task in a few words."""
    match task:
        case Retrain(method, seed, budget, track):
            return f"train {method} {budget}, track {track}, seed {seed}"
        case Find(method, seed):
            return f"search {method}, seed {seed}"
    return f"train the whole network, seed {task.seed}"


class _Queue:
    """Which tasks wait, run, are done or have failed.

    Attributes:
        waiting: those that are not done and have not failed, also those that run.
        failed: with the reasons.
        running: those that were begun, with their folders.
    """

    def __init__(self, config: CompareConfig, root: Path, waiting: Sequence[Task]) -> None:
        self.waiting = list(waiting)
        self.failed: dict[Task, DmcpError] = {}
        self._config = config
        self._root = root
        self.running: dict[Task, Path] = {}

    def next(self) -> Task | None:
        """The first task that can be begun, marked as running; None if none can now."""
        for task in [*self.waiting]:
            if task in self.running or not self._can_begin(task):
                continue
            if self._is_done(task):  # another one gave the same structure
                self.waiting.remove(task)
                continue
            folder = task.folder(self._root)
            if folder not in self.running.values():
                self.running[task] = folder
                return task
        return None

    def finish(self, task: Task, error: DmcpError | None) -> None:
        """A running task is done, or has failed."""
        del self.running[task]
        self.waiting.remove(task)
        if error is not None:
            self.failed[task] = error

    def _is_done(self, task: Task) -> bool:
        return task.is_done(self._config, self._root)

    def _can_begin(self, task: Task) -> bool:
        """Whether what it needs is there."""
        if isinstance(task, Retrain):
            if task.track == "B":
                return self._is_done(task.origin)
            return task.origin.has_structures(self._root)
        if isinstance(task, Find) and task.needs_pretrained(self._config):
            return self._is_done(Pretrain(task.seed))
        return True


def _in_processes(
    pool: ProcessPoolExecutor,
    queue: _Queue,
    jobs: int,
    config: CompareConfig,
    place: Place,
    deadline: float | None,
) -> Iterator[tuple[Task, DmcpError | None]]:
    """Tasks as they come to an end; none is begun that no process is free for."""
    running: dict[Future[DmcpError | None], Task] = {}
    while True:
        while len(running) < jobs and (task := queue.next()) is not None:
            running[pool.submit(_attempt, task, config, place)] = task
        if not running:
            return
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        ended, _ = wait(running, timeout=left, return_when=FIRST_COMPLETED)
        if not ended:
            return
        for future in ended:
            yield running.pop(future), future.result()


def _attempt(task: Task, config: CompareConfig, place: Place) -> DmcpError | None:
    """Do a task; what goes wrong is a result, so that the others are done."""
    try:
        do(task, config, place)
    except DmcpError as error:
        return error
    except Exception as error:
        traceback.print_exc()
        reason = next(iter(str(error).splitlines()), "")
        return DmcpError(f"{type(error).__name__}: {reason}")
    return None
