"""What an error in the middle of a run leaves: a checkpoint of the last whole step, if that is sure to be one.

The error is raised as it was, whether saving works or not. Three things are never saved: a step whose update an error broke off,
since weights and moving average would be of two steps; weights whose gradients were not finite too often; and what this process
has not trained, before its first step.

Of several ranks one may fail alone while the others wait for it in a collective, where nothing can be asked of them. So a rank
that fails says so in the store, which needs no answer, and ends. The others then lose their connection, and find there who it was.
Where every rank holds all weights, the first one saves if it stands outside of an update. Where they hold pieces, all must save or
none can: at a point where they stand together, in an evaluation or a save, each waits a while for the others to say so too.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Protocol, TypeVar

from ditkernels.checkpoints.format import Checkpoint
from ditkernels.checkpoints.writer import CheckpointWriter
from ditkernels.files import first_line
from ditkernels.runtime import World
from ditkernels.training.distributed import LostRankError, Parallel, is_lost
from ditkernels.training.log import RunLog
from ditkernels.training.optimizer import NonFiniteGradientError

# Seconds that a rank waits for the others to say that they have failed at the same point.
TOGETHER = 10.0
# Seconds after which nobody will say any more why the connection is gone.
HEARSAY = 2.0
INTERVAL = 0.05

Value = TypeVar("Value")

logger = logging.getLogger(__name__)


class Rescued(Protocol):
    """A trainer, as far as an error needs it."""

    parallel: Parallel
    step: int
    updating: bool

    def flush(self, log: RunLog) -> None: ...

    def checkpoint(self, log: RunLog, world: World | None = None) -> Checkpoint: ...


class Rescue:
    """Around the loop: an error that leaves it saves the last step boundary first.

    Args:
        trainer: that trains.
        writer: of its checkpoints.
        log: of its steps.

    Raises:
        LostRankError: another rank has failed, and said why.
    """

    def __init__(self, trainer: Rescued, writer: CheckpointWriter, log: RunLog) -> None:
        self._trainer = trainer
        self._writer = writer
        self._log = log
        self._world = trainer.parallel.world
        self._first_step = trainer.step
        self._agreed = False

    def __enter__(self) -> Rescue:
        return self

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Around what all ranks do at the same point of the same step."""
        self._agreed = True
        yield
        self._agreed = False

    def __exit__(self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None) -> None:
        if not isinstance(error, Exception):
            return
        if is_lost(error):
            return self._end_after_another(error)
        self._world.tell(
            {"step": self._trainer.step, "agreed": self._agreed, "cause": f"{type(error).__name__}: {first_line(error)}"}
        )
        if self._trainer.step > self._first_step:
            self._save(error)
        return None

    def _end_after_another(self, error: Exception) -> None:
        """The connection is gone: because of a rank that has said so, or of one that was killed or hangs."""
        told = _wait_for(self._world.told, HEARSAY)
        if not told:
            return logger.error("an error ends the run; nothing is saved for it: a rank is gone without a word")
        rank, theirs = min(told.items())
        if self._trainer.step > self._first_step:
            self._save(error)
        raise LostRankError(
            f"rank {self._world.rank}: rank {rank} failed after step {theirs['step']}, so the run ends here ({theirs['cause']}); "
            "--resume auto goes on from the newest whole checkpoint"
        ) from error

    # ---- Who saves ---------------------------------------------------------------------------------------------------

    def _save(self, error: Exception) -> None:
        against = self._reason_against(error)
        if against is not None:
            logger.error("an error ends the run; nothing is saved for it: %s", against)
        elif self._trainer.parallel.whole_here:
            if self._world.first:
                self._save_among(World())
        elif self._agreed and self._all_say():
            self._save_among(self._world)
        else:
            logger.error("an error ends the run; each rank holds its pieces alone, so the last periodic checkpoint stands")

    def _reason_against(self, error: Exception) -> str | None:
        """Why nothing can be saved here; None if it can."""
        if isinstance(error, NonFiniteGradientError):
            return "the last good checkpoint is kept"
        if self._trainer.updating:
            return f"it came inside the update of step {self._trainer.step + 1}, whose weights and average are of two steps"
        return None

    def _all_say(self) -> bool:
        """Whether all ranks come to say that they have failed together, after the same step."""

        def everyone() -> list[Any] | None:
            told = self._world.told()
            return list(told.values()) if len(told) == self._world.size else None

        said = _wait_for(everyone, TOGETHER) or []
        return bool(said) and all(word["agreed"] and word["step"] == self._trainer.step for word in said)

    # ---- Saving ------------------------------------------------------------------------------------------------------

    def _save_among(self, world: World) -> None:
        """Saves, together with the ranks of ``world``; raises nothing."""
        # A log that fails, be it of a service far away, must not cost the weights.
        lost = _outcome(lambda: self._trainer.flush(self._log)).exception()
        if lost is not None:
            logger.error("the numbers of step %d are lost: %s", self._trainer.step, first_line(lost))
        saving = _outcome(lambda: self._writer.save_for_error(self._trainer.checkpoint(self._log, world)))
        failure = saving.exception()
        if failure is not None:
            logger.error("an error ends the run, and its last step cannot be saved: %s", first_line(failure))
        elif world.first:
            logger.error("an error ends the run; step %d is saved, %s", self._trainer.step, saving.result())


def _outcome(action: Callable[[], Value]) -> Future[Value]:
    """What an action has come to, be it an error, which is not raised."""
    with ThreadPoolExecutor(1, thread_name_prefix="rescue") as thread:
        return thread.submit(action)


def _wait_for(look: Callable[[], Value], seconds: float) -> Value:
    """What ``look`` returns once it is something, or at the end."""
    end = time.monotonic() + seconds
    while not (found := look()) and time.monotonic() < end:
        time.sleep(INTERVAL)
    return found
