"""The training loop: steps, validations, checkpoints; exact to resume after any step.

Where a run stands is one frozen value, `Position`, which goes into every checkpoint. What the loop does next is a
function of it, the recipe and the data, so a run that was killed and resumed does what an uninterrupted one does.

Dimensions: B batch.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace

from torch import Tensor

from smoe_hpc.config import Recipe
from smoe_hpc.errors import RunError
from smoe_hpc.io.loading.loader import Batches
from smoe_hpc.io.sampling.order import steps_per_epoch
from smoe_hpc.layers import begin_step, end_step, hold_routing, routing_loss, routing_metrics
from smoe_hpc.runs.identity import identity_of
from smoe_hpc.runs.position import Position
from smoe_hpc.training.batches import (
    Loaders,
    remedy_of_divergence,
    sample_positions,
    what_is_not_finite,
    what_is_not_finite_in_split,
)
from smoe_hpc.training.checkpoint import Checkpoints
from smoe_hpc.training.engine import Engine
from smoe_hpc.training.metrics import Log, StepRecords
from smoe_hpc.training.processes import Processes
from smoe_hpc.training.progress import Watch
from smoe_hpc.training.scoring import score
from smoe_hpc.training.signals import Requests, RunInterrupted
from smoe_hpc.training.state import all_tensors, data_identity, grid_in_words
from smoe_hpc.training.task import Task

READ_BACK = 50  # steps whose losses stay on the device before they are read together
FIRST_CHECKPOINT = 60.0  # seconds after which a run has a checkpoint, whatever its recipe says


class Loop:
    """Trains a model from its position to the end of its recipe.

    Args:
        recipe: how long to train, batch size, accumulation.
        task: data, loss, scores.
        engine: the model and its optimiser, in the state of ``position``.
        position: where the run stands.
        checkpoints: where to save.
        log: metrics files.
        watch: progress for a person.
        processes: the ranks; every method is collective over them.

    Raises:
        RunError: a position that the task's data cannot have led to.
    """

    def __init__(
        self,
        recipe: Recipe,
        task: Task,
        engine: Engine,
        position: Position,
        checkpoints: Checkpoints,
        log: Log,
        watch: Watch,
        processes: Processes,
    ) -> None:
        self.position = position
        self._recipe, self._task, self._engine = recipe, task, engine
        self._checkpoints, self._log, self._watch, self._processes = checkpoints, log, watch, processes
        self._samples = task.samples("train")
        self._epoch_steps = steps_per_epoch(len(self._samples), recipe.training.batch)
        self.identity = {"recipe": identity_of(recipe), "grid": grid_in_words(task), **data_identity(task)}
        if position.step != position.epoch * self._epoch_steps + position.in_epoch or position.in_epoch > self._epoch_steps:
            raise RunError(
                f"step {position.step}, which is step {position.in_epoch} of epoch {position.epoch}, is impossible in epochs "
                f"of {self._epoch_steps} steps: the run was trained on another number of samples than the "
                f"{len(self._samples)} there; put its data back, or train under another --run-name"
            )
        self._records = StepRecords(processes, recipe.run.log_every)
        self._saved_step = position.step
        self._has_checkpoint = position.step > 0  # it goes on from one
        self._saved_at = self._began = self._read_at = time.monotonic()
        self._first_step = self._read_step = position.step
        self._waited = self._read_waited = 0.0
        self._positions = sample_positions(recipe, processes)
        self._loaders = Loaders(task, recipe, processes, engine.dtype)

    def ended(self) -> str | None:
        """Why training is over ("epochs", "max_steps", "early_stop", "stop_at_score"), or None while it is not."""
        training, plateau = self._recipe.training, self.position.plateau
        if plateau.reached(training.stop_at_score, self._task.selection.mode):
            return "stop_at_score"
        if plateau.stop(self._recipe.schedule):
            return "early_stop"
        if training.max_steps is not None and self.position.step >= training.max_steps:
            return "max_steps"
        return "epochs" if self.position.epoch >= training.epochs else None

    def run(self, requests: Requests) -> str:
        """Train to the end; the reason why it ended.

        Raises:
            RunError: a loss or score that is not finite.
            RunInterrupted: a signal asked to stop, and the state was saved.
            CheckpointError: a checkpoint could not be written.
        """
        self._engine.model.train()
        hold_routing(self._engine.model)
        self._engine.scale_learning_rates(self.position.plateau.scale)
        try:
            if not self.position.settled:
                self._settle()
            while (reason := self.ended()) is None:
                self._epoch(requests)
            if self._saved_step != self.position.step:
                self._save()
        except BaseException:
            self._loaders.close()
            raise
        return reason

    def _epoch(self, requests: Requests) -> None:
        """Steps until the epoch or training ends."""
        training = self._recipe.training
        batches = self._loaders.of("train").train(
            training.seed,
            self.position.epoch,
            self.position.in_epoch,
            global_batch=training.batch,
            accumulation=training.accumulation,
        )
        epoch = self.position.epoch
        try:
            while self.position.epoch == epoch and self.ended() is None:
                self._step(batches)
                self._after_step(requests)
        finally:
            batches.close()

    def _step(self, batches: Batches) -> None:
        """One optimiser step."""
        position, training, engine = self.position, self._recipe.training, self._engine
        total: Tensor | None = None
        self._processes.at_step(position.step + 1)
        for samples in self._positions:
            began = time.perf_counter()
            batch = next(batches)
            self._waited += time.perf_counter() - began
            begin_step(engine.model, position.step, samples)
            loss = self._task.loss(engine(batch.inputs), batch)
            engine.backward(loss + routing_loss(engine.model))
            engine.step()
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        if training.accumulation > 1:
            total = total / training.accumulation
        with self._processes.at("all_reduce (routing)"):
            end_step(engine.model, position.step, refresh=training.routing_refresh, delay=training.routing_delay)
        step = position.step + 1
        others = routing_metrics(engine.model) if self._records.logged(step) else {}
        if step % training.routing_refresh:
            others.pop("selections_changed", None)  # of an earlier step, which a resumed run has not seen
        self._records.add(step, position.epoch, total, others)
        self.position = replace(position, step=step, in_epoch=position.in_epoch + 1, settled=False)

    def _after_step(self, requests: Requests) -> None:
        """Read back, settle, save and stop, where the step just made requires it."""
        now = time.monotonic()
        period = self._recipe.run.checkpoint_seconds
        if not self._has_checkpoint:
            period = FIRST_CHECKPOINT if period is None else min(period, FIRST_CHECKPOINT)
        stop, late = requests.poll(period is not None and now - self._saved_at >= period)
        if stop:
            self._save()
            name = f" ({requests.name})" if requests.name else ""
            raise RunInterrupted(
                f"stopped as asked{name} after step {self.position.step}, which is saved; the same command goes on from there"
            )
        if len(self._records) >= READ_BACK:
            self._read_back()
        self._settle()
        every, step = self._recipe.run.checkpoint_every, self.position.step
        due = step % every == 0 if every is not None else self.position.in_epoch == 0
        if (due or late) and self._saved_step != step:
            self._save()
        if self._watch.due(now):
            samples = (step - self._first_step) * self._recipe.training.batch
            self._watch.show(step, samples, self._waited, now)

    def _settle(self) -> None:
        """What follows a step: the end of an epoch, a validation, the schedule."""
        ends_epoch = self.position.in_epoch == self._epoch_steps
        every = self._recipe.training.validate_every
        due = self.position.step % every == 0 if every is not None else ends_epoch
        if ends_epoch:
            self._read_back()
            mean = self.position.loss_sum / self._epoch_steps
            self._log.event("epoch", self.position.step, self.position.epoch, loss=mean)
            self.position = replace(self.position, epoch=self.position.epoch + 1, in_epoch=0, loss_sum=0.0)
        better = self.validate() if due else False
        self.position = replace(self.position, settled=True)
        if better:
            self._save()  # the best weights must be on the disk whatever happens next

    def validate(self) -> bool:
        """Score the selection's split and let the schedule see it; whether the score is the best so far."""
        self._read_back()
        began = time.monotonic()
        selection, position, recipe = self._task.selection, self.position, self._recipe
        scores = score(self._engine, self._task, selection.split, recipe, self._processes, self._loaders.of(selection.split))
        value = scores[selection.region][selection.score]
        if not math.isfinite(value):
            found = what_is_not_finite_in_split(self._task.samples(selection.split))
            remedy = remedy_of_divergence(self._checkpoints.steps(), found, f"the {selection.split} data")
            raise RunError(f"{selection.score} on {selection.split} is {value} at step {position.step}: {remedy}")
        before = position.plateau
        plateau = before.after(value, position.step, recipe.schedule, recipe.optimizer.lr, selection.mode)
        rates = self._engine.learning_rates()
        best = {"score": selection.score, "value": plateau.best, "step": plateau.best_step}
        self._log.event("validation", position.step, position.epoch, split=selection.split, scores=scores, lr=rates, best=best)
        self._log.timing(step=position.step, validation_seconds=time.monotonic() - began)
        self._log.flush()
        where = f"step {position.step}, epoch {position.epoch}"
        self._watch.say(f"{where}: {selection.split} {selection.score} {value:.6g}, {plateau.in_words(position.step)}")
        if plateau.scale != before.scale:
            self._engine.scale_learning_rates(plateau.scale)
            self._watch.say(f"no improvement for a while: learning rates times {plateau.scale:g} from here on")
        self.position = replace(position, plateau=plateau)
        return plateau.best_step == position.step

    def validate_last(self) -> int:
        """Score the last step's weights if that has not been done; the step of the best checkpoint."""
        every = self._recipe.training.validate_every
        done = self.position.step % every == 0 if every is not None else self.position.in_epoch == 0
        try:
            if not done or self.position.plateau.best_step is None:
                self.validate()
        finally:
            self._loaders.close()
        assert self.position.plateau.best_step is not None
        return self.position.plateau.best_step

    def _read_back(self) -> None:
        """Move the losses of the steps since the last call from the device into metrics.jsonl.

        Raises:
            RunError: one is not finite; it names the step, and the value in its data that is not, if there is one.
        """
        rates = self._engine.learning_rates()
        loss_sum = self.position.loss_sum
        loss = None
        with self._processes.at("all_reduce (losses)"):
            taken = self._records.take()
        for step, epoch, values in taken:
            loss = values["loss"]
            if not math.isfinite(loss):
                self._log.flush()
                found = what_is_not_finite(self._samples, self._recipe, epoch, self._in_epoch(step, epoch))
                remedy = remedy_of_divergence(self._checkpoints.steps(), found, "the data of its batch")
                raise RunError(f"loss is {loss} at step {step} (epoch {epoch}): {remedy}")
            loss_sum += loss
            if self._records.logged(step):
                self._log.event("step", step, epoch, **values, lr=rates)
        if loss is None:
            return
        self.position = replace(self.position, loss_sum=loss_sum)
        best = self.position.plateau.best
        self._watch.note(f"loss {loss:.4g}" + ("" if best is None else f", best {self._task.selection.score} {best:.6g}"))
        now, steps = time.monotonic(), self.position.step - self._read_step
        seconds = max(now - self._read_at, 1e-9)
        self._log.timing(
            step=self.position.step,
            seconds=seconds,
            samples_per_second=steps * self._recipe.training.batch / seconds,
            data_wait=(self._waited - self._read_waited) / seconds,
        )
        self._log.flush()
        self._read_at, self._read_step, self._read_waited = now, self.position.step, self._waited

    def _in_epoch(self, step: int, epoch: int) -> int:
        """Index within its epoch of the optimiser step numbered ``step``, which counts from 1."""
        return step - 1 - epoch * self._epoch_steps

    def _save(self) -> None:
        """Write a checkpoint of this step, once its loss is known to be finite."""
        self._read_back()
        began = time.monotonic()
        state = {"position": self.position.as_dict(), "log": self._log.sizes()}
        tensors = all_tensors(self._engine)
        self._checkpoints.save(self.position.step, tensors, state, self.identity, self.position.plateau.best_step)
        self._log.saved()
        self._has_checkpoint = True
        self._saved_step, self._saved_at = self.position.step, time.monotonic()
        self._log.timing(step=self.position.step, checkpoint_seconds=self._saved_at - began)
