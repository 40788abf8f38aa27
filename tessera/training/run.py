"""The training toolbox: a stage's `train.py` owns its loop, `Run` owns devices, schedules, resume, logs, checkpoints.

A run is a folder: `recipe.yaml`, `checkpoints/`, `samples/`, `logs/` (TensorBoard), `metrics.jsonl`. Started again with
the same recipe it resumes from its newest checkpoint, and on CPU it ends bit-equal to a run that was never interrupted:
data order, random numbers and schedules are pure functions of (seed, step), all else is in the checkpoint. A loss that
is no longer finite stops it, with the batch of that step saved as `not-finite-STEP.safetensors`.

A checkpoint carries what went into the run: the recipe, and the identities of data, codes, tokenizers and base.
Resuming with another is refused; what may change is listed in `MAY_CHANGE`. A damaged checkpoint is named and the one
before it is used. A disk that is full costs that checkpoint, not the run. One process writes a run's folder at a time.
"""

import itertools
import json
import math
import os
import re
import sys
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
import yaml
from accelerate import Accelerator
from pydantic import BaseModel, Field
from pydantic_core import to_jsonable_python
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Dataset
from tqdm import tqdm

from tessera.config import Config
from tessera.data.source import Unreadable, step_loader
from tessera.errors import InputError, WriteError
from tessera.files import parse_yaml, read_text, split_lines
from tessera.hardware import has_accelerator, keep_memory, multiplies_bfloat16
from tessera.images import contact_sheet, save_png, to_pil
from tessera.native import accelerate_training
from tessera.training.muon import Muon
from tessera.weights.lock import FolderLock
from tessera.weights.writing import new_file, refuse_foreign, write_text

# Keys of a recipe that may differ between a checkpoint and the run that resumes from it: how long, how often, how fast
# and where to. Paths may differ too; what they lead to is compared by its content.
MAY_CHANGE = (
    "run.output", "run.steps", "run.checkpoint_every", "run.keep_checkpoints", "run.log_every", "run.sample_every",
    "run.num_workers", "run.compile", "activation_checkpointing", "prompts", "sampling", "data.validation_split",
    "loss.decoder_only_from",
)  # fmt: skip
TRAINED = "what is trained"  # in the identity of a run: the stage
CHECKPOINT = re.compile(r"step-(\d+)\.pt")


class OptimizerConfig(Config):
    """AdamW, or Muon (Jordan et al. 2024) for the matrices inside blocks with AdamW for all other parameters."""

    type: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = Field(3e-4, gt=0)  # of AdamW; Muon's updates are scaled to AdamW's RMS and share it
    muon_learning_rate: float | None = Field(None, gt=0)  # another rate for Muon's matrices
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.01, ge=0)  # matrices only
    warmup_steps: int = Field(100, ge=0)
    final_share: float = Field(0.05, ge=0, le=1)  # the cosine ends at this share of the learning rate
    clip_norm: float = Field(1.0, gt=0)  # gradient norm above which gradients are scaled down


class RunConfig(Config):
    output: Path  # folder of the run
    steps: int = Field(gt=0)
    batch_size: int = Field(gt=0)  # pictures a step, over all processes
    seed: int = Field(0, ge=0)
    precision: Literal["float32", "bfloat16", "auto"] = "float32"  # of the arithmetic; weights stay float32.
    # auto: bfloat16 where the hardware multiplies in it, else float32
    compile: bool = False  # torch.compile; needs a C++ compiler on CPU
    ema_decay: float = Field(0.999, ge=0, lt=1)  # of the averaged weights that are exported
    checkpoint_every: int = Field(500, gt=0)
    keep_checkpoints: int = Field(2, gt=0)
    log_every: int = Field(20, gt=0)
    sample_every: int = Field(500, gt=0)  # pictures and export of the weights so far
    num_workers: int = Field(0, ge=0)  # loader processes; 0 loads between the steps


class Stateful(Protocol):
    def state_dict(self) -> Any: ...
    def load_state_dict(self, state: Any) -> Any: ...


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step, why, and what to do."""


B = TypeVar("B")


class Run:
    """One training run on one or more processes; see the module's docstring."""

    def __init__(
        self, config: RunConfig, recipe: Config, identities: Mapping[str, str] | None = None, pictures: int = 0
    ) -> None:
        """`identities` say what the paths of the recipe lead to, by the key of each path; `pictures` is how many there
        are to be read, where pictures are read. Raises InputError when the folder is in use, is no run's, or holds
        checkpoints of another recipe or of other data, before anything is written to it."""
        self.config, self.step = config, 0
        self.bfloat16 = config.precision == "bfloat16" or (config.precision == "auto" and multiplies_bfloat16())
        self.accelerator = Accelerator(
            mixed_precision="bf16" if self.bfloat16 else "no",
            cpu=not has_accelerator(),
            step_scheduler_with_optimizer=False,
        )
        self.device, self.is_main = self.accelerator.device, self.accelerator.is_main_process
        if config.batch_size < self.accelerator.num_processes:
            raise InputError(
                f"run.batch_size is {config.batch_size}, but {self.accelerator.num_processes} processes share a batch; "
                "give at least one picture to each"
            )
        if self.device.type == "cpu":
            keep_memory()
        self.state: dict[str, Stateful] = {}
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._unreadable = Unreadable(pictures)
        self._batch: object = None  # of the step under way
        self._saved = -1  # the step of the newest checkpoint
        self._unwritten: dict[str, Path] = {}  # what the disk had no room for, by kind
        self.folder = config.output
        _refuse_foreign_run(self.folder)
        self.identity = _identity(recipe, identities or {})
        self._lock = FolderLock(self.folder) if self.is_main else None
        self._found = self._newest_checkpoint()
        if self._found is not None:
            _refuse_changes(self._found.get("identity"), self.identity, self.folder)
        self._recipe = recipe
        self._writer = self._start_folder() if self.is_main else None

    # Set-up ----------------------------------------------------------------------------------------------------------

    def prepare(self, name: str, model: nn.Module, *, compile: bool = True) -> nn.Module:
        """Moves `model` to the device, wraps it for several processes and adds it to the checkpoints under `name`."""
        model.to(self.device)
        accelerate_training(model)
        if self.config.compile and compile:
            model.compile()
        self.state[name] = model
        prepared: nn.Module = self.accelerator.prepare_model(model)
        return prepared

    def averaged(self, name: str, model: nn.Module) -> AveragedModel:
        """Exponential moving average of the weights of `model`; buffers are copied. Call `update_parameters` a step.

        To be called before `prepare`, which changes the model's forward.
        """
        average = AveragedModel(model, self.device, multi_avg_fn=get_ema_multi_avg_fn(self.config.ema_decay))
        average.requires_grad_(False)
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
                self.note_skipped(getattr(batch, "skipped", []))
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
        """Asked by every process at the end of a step: whether this one is to export the weights and draw samples now.

        Where a checkpoint of the step is due too, it is written first, so that no sample costs it.
        """
        if not self.due_after(self.config.sample_every):
            return False
        if self.due_after(self.config.checkpoint_every):
            self.save_checkpoint(self.step + 1)
        return self.is_main

    def autocast(self) -> torch.autocast:
        """The context for forward passes in the run's precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)

    def update(self, optimizers: "Optimizers", loss: Tensor) -> None:
        """One step of `optimizers` down the gradient of `loss`. Raises TrainingError when it is no longer finite."""
        self.accelerator.backward(loss)
        norm = nn.utils.clip_grad_norm_(optimizers.parameters, optimizers.config.clip_norm)
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

    def save_pictures(self, name: str, images: Tensor, labels: list[str], columns: int = 8) -> None:
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
        """Names pictures that could not be read, each once. Raises InputError when they are too many."""
        for sentence in self._unreadable.add(sentences):
            self.say(f"skipped: {sentence}", everywhere=True)

    def say(self, message: str, everywhere: bool = False) -> None:
        """One line on standard error: of the main process, or with `everywhere` of every one that has it to say."""
        if self.is_main or everywhere:
            tqdm.write(message, file=sys.stderr)

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def save_checkpoint(self, step: int | None = None) -> None:
        """Writes all state of the run after `step` steps, whole or not at all, and removes the oldest checkpoints."""
        self._saved = self.step if step is None else step
        if self.is_main:
            content = {"step": self._saved, "identity": self.identity}
            content |= {name: part.state_dict() for name, part in self.state.items()}
            with self.optional(f"checkpoints/step-{self._saved:07d}.pt") as path:
                _move_aside(path, self._saved)
                with new_file(path) as part:
                    torch.save(content, part)
                for step, old in self._checkpoints()[: -self.config.keep_checkpoints]:
                    if _is_checkpoint(old, step):
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
            content = _read_checkpoint(path)
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


def _identity(recipe: Config, identities: Mapping[str, str]) -> dict[str, str]:
    """What goes into a run, by the keys of its recipe: values as JSON, and for paths what they lead to."""
    found = {TRAINED: type(recipe).__name__.removesuffix("Recipe").lower()}

    def walk(prefix: str, config: BaseModel) -> None:
        for name in type(config).model_fields:
            key, value = f"{prefix}{name}", getattr(config, name)
            if key in MAY_CHANGE or isinstance(value, Path):
                continue
            if isinstance(value, BaseModel):
                walk(f"{key}.", value)
            else:
                found[key] = json.dumps(to_jsonable_python(value), ensure_ascii=False, sort_keys=True)

    walk("", recipe)
    return found | dict(identities)


def _refuse_foreign_run(folder: Path) -> None:
    """Raises InputError when `folder` holds files with the names of a run's that no run wrote."""
    refuse_foreign(folder / "model")
    recipe = folder / "recipe.yaml"
    if not recipe.is_file() or not (folder / "checkpoints").is_dir():
        there = [name for name in ("recipe.yaml", "metrics.jsonl", "doctor.html") if (folder / name).exists()]
        if there:
            raise InputError(f"{folder / there[0]} is in the way: no run wrote it; choose another run.output")
        return
    content = parse_yaml(read_text(recipe), str(recipe))
    if not isinstance(content, dict) or not isinstance(content.get("run"), dict):
        raise InputError(f"{recipe} is in the way: no run wrote it; choose another run.output")


def _refuse_changes(before: Any, now: dict[str, str], folder: Path) -> None:
    """Raises InputError for the first thing that a checkpoint was made from otherwise. Those of earlier releases do not
    say; keys that either side does not know are not compared, so that a release may have more of them."""
    if not isinstance(before, dict):
        return
    for key in sorted(before.keys() & now.keys(), key=lambda key: (key != TRAINED, key)):
        if before[key] != now[key]:
            raise InputError(
                f"{key} has changed: it was {_short(before[key])} when the checkpoints in {folder} were written and is "
                f"{_short(now[key])} now; restore it, or give run.output another folder"
            )


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


def _is_checkpoint(path: Path, step: int) -> bool:
    """Whether the file is a run's after that step, by its content; tensors are not read."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # unpickling fails in many ways
        return False
    return isinstance(content, dict) and content.get("step") == step


def _move_aside(path: Path, step: int) -> None:
    """Gives a file that has a checkpoint's name and is none, damaged or somebody else's, another name."""
    if os.path.lexists(path) and not _is_checkpoint(path, step):
        names = (path.with_name(f"{path.name}.damaged{number or ''}") for number in itertools.count())
        path.rename(next(name for name in names if not os.path.lexists(name)))


def _read_checkpoint(path: Path) -> dict[str, Any] | str:
    """The content of a checkpoint, or in a clause what is wrong with the file."""
    try:
        if path.stat().st_size == 0:
            return "it is empty"
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()  # torch itself does not look at the checksums
        if damaged is not None:
            return f"its part {damaged} is not what was written"
        content = torch.load(path, map_location="cpu", weights_only=True)
    except zipfile.BadZipFile:
        return "it is cut off or overwritten"
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    except Exception:  # unpickling fails in many ways, and torch's advice is not for these files
        return "it is not a checkpoint of a run"
    if not isinstance(content, dict) or not isinstance(content.get("step"), int):
        return "it is not a checkpoint of a run"
    return content


class Optimizers:
    """The optimizer(s) of one model with warm-up, cosine schedule and weight decay on matrices only.

    `rates` gives parameters with a name part, such as "lora_B", another multiple of AdamW's learning rate.
    """

    def __init__(
        self, model: nn.Module, config: OptimizerConfig, steps: int, rates: Mapping[str, float] | None = None
    ) -> None:
        self.config, self.steps = config, steps
        self.share = 1.0  # of the scheduled learning rates; a stage that finds them too high sets it
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        muon = {id(p) for p in _block_matrices(model)} if config.type == "muon" else set()
        groups: list[dict[str, Any]] = []
        for rate, named in _by_rate(model, rates or {}).items():
            decayed = [p for p in named if p.ndim >= 2 and id(p) not in muon]
            plain = [p for p in named if p.ndim < 2]
            groups.append({"params": decayed, "weight_decay": config.weight_decay, "rate": rate})
            groups.append({"params": plain, "weight_decay": 0.0, "rate": rate})
        self._optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW([g for g in groups if g["params"]], lr=config.learning_rate, betas=config.betas)
        ]
        self._rates = [config.learning_rate]
        if muon:
            matrices = [p for p in self.parameters if id(p) in muon]
            rate = config.muon_learning_rate or config.learning_rate
            self._optimizers.append(
                Muon(
                    matrices,
                    lr=rate,
                    weight_decay=config.weight_decay,
                    dtype=torch.bfloat16 if multiplies_bfloat16() else torch.float32,
                )
            )
            self._rates.append(rate)

    def step(self, step: int) -> None:
        """One update at the learning rate of `step`, then gradients are cleared."""
        factor = self.share * schedule(step, self.config.warmup_steps, self.steps, self.config.final_share)
        for optimizer, rate in zip(self._optimizers, self._rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("rate", 1.0) * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> list[Any]:
        return [optimizer.state_dict() for optimizer in self._optimizers]

    def load_state_dict(self, state: list[Any]) -> None:
        for optimizer, part in zip(self._optimizers, state, strict=True):
            optimizer.load_state_dict(part)


def schedule(step: int, warmup_steps: int, steps: int, final_share: float) -> float:
    """Share of the learning rate at `step`: linear warm-up, then a cosine from 1 down to `final_share`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return final_share + (1 - final_share) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _by_rate(model: nn.Module, rates: Mapping[str, float]) -> dict[float, list[nn.Parameter]]:
    """The trained parameters for each multiple of the learning rate, those without a rate of their own first."""
    found: dict[float, list[nn.Parameter]] = {1.0: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = next((rate for part, rate in rates.items() if part in name.split(".")), 1.0)
            found.setdefault(rate, []).append(parameter)
    return found


def _block_matrices(model: nn.Module) -> Iterator[nn.Parameter]:
    """Weights of Linear layers inside a `blocks` list: Muon is for hidden matrices, not embeddings and heads."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "blocks" in name.split("."):
            yield module.get_parameter("weight")
