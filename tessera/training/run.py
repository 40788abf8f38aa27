"""The training toolbox: a stage's `train.py` owns its loop, `Run` owns devices, schedules, resume, logs, checkpoints.

A run is a folder: `recipe.yaml`, `checkpoints/`, `samples/`, `logs/` (TensorBoard), `metrics.jsonl`. Started again with
the same recipe it resumes from its newest checkpoint, and on CPU it ends bit-equal to a run that was never interrupted:
data order, random numbers and schedules are pure functions of (seed, step), all else is in the checkpoint. A loss that
is no longer finite stops it, with the batch of that step saved as `not-finite-STEP.safetensors`.

A checkpoint carries what went into the run: the recipe, and the identities of data, codes, tokenizers and base.
Resuming with another is refused; what may change is listed in `MAY_CHANGE`. A damaged checkpoint is named and the one
before it is used. A disk that is full costs that checkpoint, not the run. One process writes a run's folder at a time.
"""

import atexit
import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset
from tqdm import tqdm

from tessera import logs
from tessera.config import Config
from tessera.data.loader import step_loader
from tessera.data.source import Unreadable
from tessera.errors import InputError, WriteError
from tessera.files import split_lines
from tessera.hardware import has_accelerator, keep_memory, multiplies_bfloat16
from tessera.images import contact_sheet, save_png, to_pil
from tessera.native import accelerate_training
from tessera.training.averages import AveragedWeights
from tessera.training.checkpoint import (
    CHECKPOINT,
    identity_of,
    is_checkpoint,
    move_aside,
    read_checkpoint,
    refuse_changes,
    refuse_foreign_run,
)
from tessera.training.optimizers import OptimizerConfig, Optimizers
from tessera.training.sharded import gathered, load_model, shard
from tessera.weights.lock import FolderLock
from tessera.weights.writing import new_file, write_text


class RunConfig(Config):
    output: Path  # folder of the run
    steps: int = Field(gt=0)
    batch_size: int = Field(gt=0)  # images a step, over all processes
    seed: int = Field(0, ge=0)
    precision: Literal["float32", "bfloat16", "auto"] = "float32"  # of the arithmetic; weights stay float32.
    # auto: bfloat16 where the hardware multiplies in it, else float32
    compile: bool = False  # torch.compile; needs a C++ compiler on CPU
    ema_decay: float = Field(0.999, ge=0, lt=1)  # of the averaged weights that are exported
    checkpoint_every: int = Field(500, gt=0)
    keep_checkpoints: int = Field(2, gt=0)
    log_every: int = Field(20, gt=0)
    sample_every: int = Field(500, gt=0)  # images and export of the weights so far
    num_workers: int = Field(0, ge=0)  # loader processes; 0 loads between the steps
    accumulate: int = Field(1, gt=0)  # micro-batches that a batch is computed in: less memory, the same step


def _leave_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Stateful(Protocol):
    def state_dict(self) -> Any: ...
    def load_state_dict(self, state: Any) -> Any: ...


class TrainingError(RuntimeError):
    """Training cannot continue; the message says at which step, why, and what to do."""


logger = logging.getLogger("tessera")
B = TypeVar("B")


class Run:
    """One training run on one or more processes; see the module's docstring."""

    def __init__(
        self, config: RunConfig, recipe: Config, identities: Mapping[str, str] | None = None, pictures: int = 0
    ) -> None:
        """`identities` say what the paths of the recipe lead to, by the key of each path; `images` is how many there
        are to be read, where images are read. Raises InputError when the folder is in use, is no run's, or holds
        checkpoints of another recipe or of other data, before anything is written to it."""
        logs.show()
        self.config, self.step = config, 0
        self.bfloat16 = config.precision == "bfloat16" or (config.precision == "auto" and multiplies_bfloat16())
        self.accelerator = Accelerator(
            mixed_precision="bf16" if self.bfloat16 else "no",
            cpu=not has_accelerator(),
            step_scheduler_with_optimizer=False,
        )
        self.device, self.is_main = self.accelerator.device, self.accelerator.is_main_process
        if self.accelerator.num_processes > 1:  # gloo's threads may end a process that leaves the group standing
            atexit.register(_leave_group)
        if config.batch_size < self.accelerator.num_processes:
            raise InputError(
                f"run.batch_size is {config.batch_size}, but {self.accelerator.num_processes} processes share a batch; "
                "give at least one picture to each"
            )
        if self.device.type == "cpu":
            keep_memory()
        self.state: dict[str, Stateful] = {}
        self.sharded = False  # whether parameters are split over the processes
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._unreadable = Unreadable(pictures)
        self._batch: object = None  # of the step under way
        self._share, self._losses = 1.0, list[Tensor]()  # of the micro-batch under way; of those of the step
        self._saved = -1  # the step of the newest checkpoint
        self._unwritten: dict[str, Path] = {}  # what the disk had no room for, by kind
        self.folder = config.output
        refuse_foreign_run(self.folder)
        self.identity = identity_of(recipe, identities or {})
        self._lock = FolderLock(self.folder) if self.is_main else None
        self._found = self._newest_checkpoint()
        if self._found is not None:
            refuse_changes(self._found.get("identity"), self.identity, self.folder)
        self._recipe = recipe
        self._writer = self._start_folder() if self.is_main else None

    # Set-up ----------------------------------------------------------------------------------------------------------

    def prepare(
        self, name: str, model: nn.Module, *, compile: bool = True, blocks: Sequence[nn.Module] = ()
    ) -> nn.Module:
        """Moves `model` to the device, wraps it for several processes and adds it to the checkpoints under `name`.

        Where `blocks` are given, parameters are split over the processes instead of copied, block by block (FSDP2).
        """
        model.to(self.device)
        accelerate_training(model)
        if self.config.compile and compile:
            model.compile()
        self.state[name] = model
        if blocks:
            shard(model, list(blocks))
            self.sharded = True
            return model
        prepared: nn.Module = self.accelerator.prepare_model(model)
        return prepared

    def averaged(self, name: str, model: nn.Module) -> AveragedWeights:
        """The moving average of the weights of a prepared model, added to the checkpoints under `name`."""
        average = AveragedWeights(model, self.config.ema_decay)
        self.state[name] = average
        return average

    def optimizers(
        self, name: str, model: nn.Module, config: OptimizerConfig, rates: Mapping[str, float] | None = None
    ) -> "Optimizers":
        optimizers = Optimizers(model, config, self.config.steps, rates)
        self.state[name] = optimizers
        return optimizers

    # The loop --------------------------------------------------------------------------------------------------------

    def batches(self, steps: Dataset[B]) -> Iterator[B]:
        """The batches of all steps that are still to do; resumes before the first, saves after every so many.

        `steps[i]` must be a pure function of i. A batch may have a field `skipped` with sentences to log.
        """
        self._resume()
        if self.is_main:  # not before the checkpoint has accepted it
            text = yaml.safe_dump(self._recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
            write_text(self.folder / "recipe.yaml", text)
        first = self.step
        self._seed()
        start, shown = time.perf_counter(), first
        bar = tqdm(
            total=self.config.steps,
            initial=first,
            unit="step",
            dynamic_ncols=True,
            disable=not self.is_main or not sys.stderr.isatty(),
        )
        try:
            for batch in step_loader(steps, first, self.config.steps, self.config.num_workers):
                if hasattr(batch, "skipped"):
                    self.note_skipped(self._of_all(batch.skipped))
                self._seed()
                self._batch = batch
                yield batch
                self.step += 1
                bar.update()
                if self.due(self.config.log_every):
                    elapsed = time.perf_counter() - start
                    self._write_logs(bar, (self.step - shown) * self.config.batch_size / elapsed)
                    start, shown = time.perf_counter(), self.step
                if self.due(self.config.checkpoint_every) and self._saved != self.step:
                    self.save_checkpoint()
        finally:  # also where the loop is left by an error
            bar.close()
            self.close()
        if self._unwritten:
            lost = ", ".join(str(path) for path in self._unwritten.values())
            raise WriteError(f"{lost} could not be written, the disk was full; make room and start again")

    def close(self) -> None:
        """Ends the logs and lets go of the folder."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def due(self, every: int) -> bool:
        """Whether something done every `every` steps is to be done now; the last step is always due."""
        return self.step % every == 0 or self.step == self.config.steps

    def due_after(self, every: int) -> bool:
        """`due`, asked from inside the loop: whether the step under way is one after which it is due."""
        return (self.step + 1) % every == 0 or self.step + 1 == self.config.steps

    def samples_due(self) -> bool:
        """Asked by every process at the end of a step: whether this one is to export the weights and sample now.

        All of them are where parameters are sharded, since gathering them is collective; else the main one is. Where a
        checkpoint of the step is due too, it is written first, so that no sample costs it.
        """
        if not self.due_after(self.config.sample_every):
            return False
        if self.due_after(self.config.checkpoint_every):
            self.save_checkpoint(self.step + 1)
        return self.is_main or self.sharded

    def autocast(self) -> torch.autocast:
        """The context for forward passes in the run's precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)

    def parts(self, batch: B) -> Iterator[B]:
        """The micro-batches of a batch, a NamedTuple of tensors and lists with one row an item (gradient accumulation).

        The mean of a loss over the parts, weighted by `share`, is that over the batch.
        """
        fields: Any = batch
        rows = len(next(value for value in fields if isinstance(value, Tensor | list) and len(value)))
        count = min(self.config.accumulate, rows)
        if count == 1:
            self._share = 1.0
            yield batch
            return
        edges = [rows * i // count for i in range(count + 1)]
        for first, last in zip(edges, edges[1:], strict=False):
            self._share = (last - first) / rows
            cut = (
                value[first:last] if isinstance(value, Tensor | list) and len(value) == rows else value
                for value in fields
            )
            yield type(fields)(*cut)

    @property
    def share(self) -> float:
        """The rows of the micro-batch under way over those of its batch."""
        return self._share

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a micro-batch's mean loss, times its share of the batch."""
        self._losses.append(loss.detach() * self._share)
        self.accelerator.backward(loss if self._share == 1 else loss * self._share)

    def update(self, optimizers: "Optimizers") -> None:
        """One step of `optimizers` down the gradient that was added up. Raises TrainingError when it, or the loss, is
        no longer finite."""
        loss, self._losses = torch.stack(self._losses).sum(), []
        norm = nn.utils.clip_grad_norm_(optimizers.parameters, optimizers.config.clip_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if not bool(torch.isfinite(norm) & torch.isfinite(loss)):
            self._stop_not_finite(loss, norm)
        optimizers.step(self.step)

    def log(self, **scalars: Tensor | float) -> None:
        """Adds to the means that are logged every `log_every` steps."""
        for name, value in scalars.items():
            value = value.detach().float() if isinstance(value, Tensor) else torch.tensor(float(value))
            self._sums[name] = self._sums.get(name, torch.zeros((), device=value.device)) + value
            self._counts[name] = self._counts.get(name, 0) + 1

    def log_now(self, **scalars: float) -> None:
        """Writes figures of this step at once (evaluations)."""
        self._write_scalars({name: float(value) for name, value in scalars.items()})

    def save_images(self, name: str, images: Tensor, labels: list[str], columns: int = 8) -> None:
        """(B, 3, H, W) in [-1, 1] as a contact sheet in the run's `samples/` and in TensorBoard."""
        if not self.is_main:
            return
        sheet = contact_sheet(to_pil(images), labels, columns, scale=max(1, 96 // images.shape[-1]))
        with self.optional(f"samples/{name}-{self.step + 1:06d}.png") as path:
            save_png(sheet, path, {"samples_of": self.folder.resolve().name, "step": self.step + 1})
        if self._writer is not None:
            pixels = torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8)
            self._writer.add_image(name, pixels.view(sheet.height, sheet.width, 3), self.step + 1, dataformats="HWC")

    @contextmanager
    def optional(self, name: str) -> Iterator[Path]:
        """The path of a file of the run, which a full disk costs: training continues, and ends by saying that it is
        missing unless a later one of its kind was written."""
        kind = name.partition("/")[0]
        try:
            yield self.folder / name
            self._unwritten.pop(kind, None)
        except WriteError as error:
            self._unwritten[kind] = self.folder / name
            self.say(f"{str(error).partition(';')[0]}; training continues")

    def note_skipped(self, sentences: Sequence[str]) -> None:
        """Names images that could not be read, each once. Raises InputError when they are too many, on every process at
        the same step if all were told of the same."""
        for sentence in self._unreadable.add(sentences):
            self.say(f"skipped: {sentence}")

    def _of_all(self, sentences: list[str]) -> list[str]:
        """What any process skipped in this step, the same list on all of them."""
        if self.accelerator.num_processes == 1:
            return sentences
        count = self.accelerator.reduce(torch.tensor(len(sentences), device=self.device))  # cheap: mostly there is none
        return gather_object(sentences) if int(count) else []

    def say(self, message: str) -> None:
        """One line on standard error, of the main process."""
        if self.is_main:
            logger.info("%s", message)

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def save_checkpoint(self, step: int | None = None) -> None:
        """Writes all state of the run after `step` steps, whole or not at all, and removes the oldest checkpoints."""
        self._saved = self.step if step is None else step
        content: dict[str, Any] = {"step": self._saved, "identity": self.identity}
        if self.is_main or self.sharded:  # gathering is collective
            content |= {name: gathered(part.state_dict()) for name, part in self.state.items()}
        if self.is_main:
            with self.optional(f"checkpoints/step-{self._saved:07d}.pt") as path:
                move_aside(path, self._saved)
                with new_file(path) as part:
                    torch.save(content, part)
                for step, old in self._checkpoints()[: -self.config.keep_checkpoints]:
                    if is_checkpoint(old, step):
                        old.unlink()
        self.accelerator.wait_for_everyone()

    def _checkpoints(self) -> list[tuple[int, Path]]:
        """Steps and files, in the order of the steps."""
        folder = self.folder / "checkpoints"
        names = [(CHECKPOINT.fullmatch(path.name), path) for path in folder.iterdir()] if folder.is_dir() else []
        return sorted((int(match[1]), path) for match, path in names if match)

    def _newest_checkpoint(self) -> dict[str, Any] | None:
        """The content of the newest checkpoint that is whole; damaged ones are named. Raises InputError when there are
        only damaged ones."""
        checkpoints = self._checkpoints()
        for _, path in reversed(checkpoints):
            content = read_checkpoint(path)
            if isinstance(content, str):
                self.say(f"{path} is damaged ({content}); the checkpoint before it is used")
                continue
            return {**content, "path": path}
        if checkpoints:
            raise InputError(
                f"{self.folder / 'checkpoints'} holds damaged checkpoints alone, {checkpoints[-1][1].name} the newest; "
                "remove them to start anew, or give run.output another folder"
            )
        return None

    def _resume(self) -> None:
        content, self._found = self._found, None
        if content is None:
            return self._forget_later_figures()
        try:
            for name, part in self.state.items():
                if isinstance(part, nn.Module):
                    load_model(part, content[name])
                else:
                    part.load_state_dict(content[name])
        except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise InputError(
                f"{content['path']} does not fit the recipe ({' '.join(str(error).split())[:200]}); "
                "give run.output another folder or remove the checkpoint"
            ) from error
        self.step = content["step"]
        self._forget_later_figures()
        self.say(f"resumed from {content['path']} after {self.step} of {self.config.steps} steps")

    def _forget_later_figures(self) -> None:
        """Takes out of `metrics.jsonl` the steps that are to be done again, and a line that a kill cut short."""
        path = self.folder / "metrics.jsonl"
        if not self.is_main or not path.is_file():
            return
        kept = []
        for line in split_lines(path.read_text(encoding="utf-8", errors="replace")):
            try:
                row = json.loads(line)
                keep = isinstance(row, dict) and row.get("step", 0) <= self.step
            except ValueError:
                keep = False
            kept += [line] if keep else []
        write_text(path, "".join(line + "\n" for line in kept))

    # Inside ----------------------------------------------------------------------------------------------------------

    def _start_folder(self) -> Any:
        """Makes the folders; returns TensorBoard's writer, where that is installed."""
        try:
            for name in ("checkpoints", "samples", "logs"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"cannot write the run folder {self.folder}: {error.strerror}; change run.output"
            ) from None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:  # the extra `track` brings it
            return None
        return SummaryWriter(str(self.folder / "logs"))

    def _seed(self) -> None:
        """Random numbers of a step depend on (seed, step, process) alone, so a resumed run draws the same."""
        torch.manual_seed(((self.config.seed * 1_000_003 + self.step) * 4099 + self.accelerator.process_index) % 2**63)

    def _write_logs(self, bar: Any, rate: float) -> None:
        means = {name: float(self._sums[name]) / self._counts[name] for name in self._sums}
        self._sums, self._counts = {}, {}
        self._write_scalars({**means, "images_per_second": rate})
        bar.set_postfix({name: f"{value:.4g}" for name, value in means.items()}, refresh=False)
        if bar.disable:
            figures = "  ".join(f"{name} {value:.4g}" for name, value in means.items())
            self.say(f"step {self.step}/{self.config.steps}  {figures}  {rate:.1f} images/s")

    def _write_scalars(self, scalars: dict[str, float]) -> None:
        if not self.is_main:
            return
        try:
            if self._writer is not None:
                for name, value in scalars.items():
                    self._writer.add_scalar(name, value, self.step)
            with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self.step, **scalars}) + "\n")
        except OSError as error:  # figures are not worth a run
            self.say(f"the figures of step {self.step} could not be written: {error.strerror}; training continues")

    def _stop_not_finite(self, loss: Tensor, norm: Tensor) -> None:
        path, broken = self._save_batch(loss, norm)
        cause = (
            f"{', '.join(broken)} in the batch is not finite either: mend the data"
            if broken
            else "lower optimizer.learning_rate or use run.precision=float32, and start again"
        )
        raise TrainingError(
            f"step {self.step}: the loss is {loss.item():.4g} and its gradient norm {norm.item():.4g}, not finite; "
            f"the batch is in {path}, the checkpoints in {self.folder / 'checkpoints'} are from before: {cause}"
        )

    def _save_batch(self, loss: Tensor, norm: Tensor) -> tuple[Path, list[str]]:
        """Writes the batch of this step: its tensors, all else as JSON in the file's metadata.

        Returns the file, one for each process, and the names of tensors that hold numbers that are not finite.
        """
        rank = self.accelerator.process_index
        path = self.folder / f"not-finite-{self.step:07d}{f'-{rank}' if rank else ''}.safetensors"
        fields = self._batch._asdict() if hasattr(self._batch, "_asdict") else {"batch": self._batch}
        tensors = {name: value.contiguous() for name, value in fields.items() if isinstance(value, Tensor)}
        other = {name: value for name, value in fields.items() if not isinstance(value, Tensor)}
        facts = {"step": self.step, "loss": str(loss.item()), "gradient_norm": str(norm.item()), **other}
        metadata = {name: json.dumps(value, ensure_ascii=False, default=str) for name, value in facts.items()}
        try:
            save_file(tensors, path, metadata)
        except OSError as error:  # that the loss is not finite is the news, even where the disk is full
            self.say(f"the batch could not be written to {path}: {error}")
        return path, [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
