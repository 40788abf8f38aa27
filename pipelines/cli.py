"""The command `tessera`. Results go to standard output, logs and progress bars to standard error.

Exit codes: 0 done, 1 failed, 2 wrong input (one sentence says what was wrong and what to do), 130 interrupted,
143 ended by SIGTERM.
Nothing heavy is imported before a command runs, so `tessera --help` answers at once.
"""

import codecs
import gc
import json
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tessera.errors import InputError, InputWarning, WriteError, reason
from tessera.paths import expand

EXTRAS = {  # packages that only a few need, and the extra that brings each
    "emoji": "emoji",
    "fontTools": "emoji",
    "peft": "lora",
    "sklearn": "digits",
    "tensorboard": "track",
    "torch_fidelity": "metrics",
    "torchmetrics": "metrics",
    "uharfbuzz": "emoji",
}


# Raised where a file is read, they mean that the file is damaged or cannot be had, even where the reader forgot to say
# so in its own words: by the module or the package that their class is from, and by their name.
OF_BAD_FILES = "json yaml zipfile tarfile pickle _pickle zlib struct _csv PIL safetensors_rust".split()
BAD_FILES = ("EOFError", "RecursionError", "MemoryError", "PanicException", "UnicodeDecodeError", "UnicodeEncodeError")
BAD_PATHS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
FOR_DEVELOPERS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning, ResourceWarning, ImportWarning)


def _group(help: str) -> typer.Typer:
    return typer.Typer(help=help, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


app = _group("Text to image in two stages: train your own, draw candidates, keep the best.")
evaluate_app = _group("Measure a tokenizer, a prior or the whole pipeline.")
data_app = _group("Look at data before training on it.")
app.add_typer(evaluate_app, name="evaluate")
app.add_typer(data_app, name="data")

AsJson = Annotated[bool, typer.Option("--json", help="Write JSON instead of a table.")]
LoraOptions = Annotated[
    list[str] | None, typer.Option("--lora", metavar="FOLDER[:WEIGHT]", help="Draw with a LoRA; several are fine.")
]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY.SUB=VALUE", help="Changes to the recipe.")]
BUNDLE = "A shipped bundle, a bundle's folder, or a hub name."
Recipe = Annotated[Path, typer.Argument(help="YAML recipe.")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; whatever goes wrong is one line on standard error."""
    _write_what_cannot_be_written()
    try:
        with warnings.catch_warnings(), _ended_by_sigterm():
            warnings.showwarning = _show_warning  # type: ignore[assignment]
            code = app(None if arguments is None else list(arguments), prog_name="tessera", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except _Terminated:
        return 143
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BaseException as error:
        if isinstance(error, SystemExit | GeneratorExit):
            raise
        return _explain(error)


def _explain(error: BaseException) -> int:
    """One line about what stopped the command; returns the exit code."""
    if hasattr(error, "format_message"):  # typer's own: an unknown command, a missing argument, a wrong number
        return _complain("error", _usage(error), 2)
    if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
        need = f"this needs the package {error.name}; pip install 'tessera[{EXTRAS[error.name]}]'"
        return _complain("failed", need, 1)
    shown = _show_traceback()
    if isinstance(error, InputError):
        return _complain("error", str(error), 2)
    if isinstance(error, WriteError):
        return _complain("failed", str(error), 1)
    if _is_bad_file(error):
        return _complain("error", _of_bad_file(error), 2)
    hint = "" if shown else " (TESSERA_DEBUG=1 shows the traceback)"
    return _complain("failed", f"{type(error).__name__}: {reason(error, 1000)}{hint}", 1)


def _is_bad_file(error: BaseException) -> bool:
    package = type(error).__module__.split(".")[0]
    return isinstance(error, BAD_PATHS) or package in OF_BAD_FILES or type(error).__name__ in BAD_FILES


def _of_bad_file(error: BaseException) -> str:
    file = getattr(error, "filename", None) or _file_at_fault(error) or "a file"
    what = getattr(error, "strerror", None) or f"{type(error).__name__}: {reason(error)}"
    return f"{file} cannot be read ({what}); give another file, or restore it"


def _file_at_fault(error: BaseException) -> Path | None:
    """The path that the innermost of our functions worked on when the error came, which knows no file itself."""
    found = None
    here = str(Path(__file__).resolve().parent.parent)
    for frame, _ in traceback.walk_tb(error.__traceback__):
        name = frame.f_code.co_filename
        if name.startswith(here) and "site-packages" not in name[len(here) :]:
            paths = [value for value in frame.f_locals.values() if isinstance(value, Path)]
            found = paths[-1] if paths else found
    return found


def _show_warning(message: Warning | str, category: type[Warning], *place: Any) -> None:
    """A warning as one line, without the place in the code; those of libraries to developers with TESSERA_DEBUG=1."""
    if issubclass(category, InputWarning):
        _complain("warning", str(message), 0)
    elif not issubclass(category, FOR_DEVELOPERS) or _debugging():
        _complain("warning", reason(message) if isinstance(message, Warning) else str(message), 0)


class _Terminated(BaseException):
    """SIGTERM: what is being written is given up, and what was begun for it removed, on the way out."""


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM inside raises `_Terminated`, once; where a command has its own way with it, that one counts."""

    def end(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise _Terminated

    try:
        before = signal.signal(signal.SIGTERM, end)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _write_what_cannot_be_written() -> None:
    """Characters that the terminal or the pipe has no code for are written as escapes; no work is lost for them."""

    def escape(error: UnicodeError) -> tuple[bytes, int]:
        assert isinstance(error, UnicodeEncodeError)
        # A byte of a file's name that the locale could not read is written as it is.
        coded = (
            os.fsencode(one) if "\udc80" <= one <= "\udcff" else one.encode("ascii", "backslashreplace")
            for one in error.object[error.start : error.end]
        )
        return b"".join(coded), error.end

    codecs.register_error("tessera", escape)
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) in ("strict", "surrogateescape", "backslashreplace"):
            stream.reconfigure(errors="tessera")  # type: ignore[union-attr]


def _complain(kind: str, message: str, code: int) -> int:
    print(f"tessera: {kind}: {' '.join(message.split())}", file=sys.stderr)
    return code


def _usage(error: Any) -> str:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "tessera"
    return f"{error.format_message().rstrip('.')}; see '{command} --help'"


def _debugging() -> bool:
    return os.environ.get("TESSERA_DEBUG", "0") not in ("", "0")


def _show_traceback() -> bool:
    if not _debugging():
        return False
    traceback.print_exc()
    return True


def _command(group: typer.Typer, name: str | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Adds a command to a group. What it is given as a `Path` is expanded, and text that the locale could not read is
    read as UTF-8."""

    def add(function: Callable[..., None]) -> Callable[..., None]:
        @wraps(function)
        def run(**given: Any) -> None:
            try:
                function(**{name: _as_meant(value) for name, value in given.items()})
            except EOFError as error:  # click would take it for the end of what is typed
                raise InputError(_of_bad_file(error)) from error

        group.command(name)(run)
        return function

    return add


def _as_meant(value: Any) -> Any:
    if isinstance(value, list):
        return [_as_meant(one) for one in value]
    if isinstance(value, Path):
        return expand(value)
    if isinstance(value, str) and any("\udc80" <= character <= "\udcff" for character in value):
        with suppress(UnicodeError):
            return os.fsencode(value).decode("utf-8")
    return value


@contextmanager
def importing() -> Iterator[None]:
    """Around torch's first import. What that makes stays until the end, and looking for garbage among it, while it is
    made and when the process ends, takes a third as long as making it; so the collector does not look."""
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Show it and exit.")] = False
) -> None:
    """Text to image in two stages: train your own, draw candidates, keep the best."""
    if version:
        from importlib.metadata import version as installed

        print(f"tessera {installed('tessera')}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


class Schedule(StrEnum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class PruneBy(StrEnum):
    likelihood = "likelihood"
    reranker = "reranker"


# Pictures -------------------------------------------------------------------------------------------------------------


@_command(app)
def generate(
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT", help="What to draw; several are fine.")
    ] = None,
    prompts_file: Annotated[Path | None, typer.Option("--prompts", help="JSONL file with more prompts.")] = None,
    classes: Annotated[
        list[str] | None, typer.Option("--class", help="Number or name of a class, not text; several are fine.")
    ] = None,
    segmentations: Annotated[
        list[Path] | None, typer.Option("--segmentation", help="Map to draw, a picture of labels; several are fine.")
    ] = None,
    unconditional: Annotated[
        bool, typer.Option("--unconditional", help="Draw from a prior that was trained without any condition.")
    ] = False,
    num_images: Annotated[
        int | None, typer.Option("-n", "--num-images", help="Pictures to keep of each prompt.  [default: 4]")
    ] = None,
    num_candidates: Annotated[int, typer.Option("--candidates", help="Pictures to choose them from.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the first candidate; the next ones count up.")] = 0,
    output: Annotated[Path, typer.Option("-o", "--out", help="Folder for the pictures.")] = Path("out"),
    model: Annotated[str | None, typer.Option(help=f"{BUNDLE}  [default: emoji]")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Below 1 safer, above 1 wilder.  [default: bundle's]")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Only the k likeliest codes; 0 for all.  [default: bundle's]")
    ] = None,
    top_p: Annotated[float | None, typer.Option(help="Only the likeliest share p.  [default: bundle's]")] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Only codes of p times the likeliest's probability.  [default: bundle's]")
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Faith to the prompt; 1 is none.  [default: bundle's]")
    ] = None,
    guidance_schedule: Annotated[
        Schedule | None,
        typer.Option(help="From 1 at the first code up to the scale, or always it.  [default: bundle's]"),
    ] = None,
    plausibility: Annotated[
        float | None,
        typer.Option(help="Guidance chooses among codes of p times the likeliest's probability.  [default: bundle's]"),
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What guidance steers away from.")] = None,
    top_of: Annotated[Path | None, typer.Option(help="A picture whose top is kept and continued.")] = None,
    top_rows: Annotated[int | None, typer.Option(help="Rows of its codes to keep.  [default: half]")] = None,
    image: Annotated[Path | None, typer.Option(help="A picture that is drawn anew where --mask is white.")] = None,
    mask: Annotated[Path | None, typer.Option(help="White and black, of the size of --image.")] = None,
    candidate_budget: Annotated[
        float | None,
        typer.Option(help="Share of all candidates' codes to draw; the least promising are dropped.  [default: 1]"),
    ] = None,
    prune_by: Annotated[PruneBy, typer.Option(help="What says which they are.")] = PruneBy.likelihood,
    log_probs: Annotated[bool, typer.Option("--log-probs", help="Also the log-probability of each picture.")] = False,
    precision: Annotated[
        Literal["float32", "bfloat16", "int8", "fp8"] | None,
        typer.Option(help="What the prior's weights are kept in: faster, other pictures.  [default: the bundle's]"),
    ] = None,
    rerank: Annotated[
        bool, typer.Option("--rerank/--no-rerank", help="Order the pictures by how well they fit.")
    ] = True,
    likelihood_weight: Annotated[
        float | None,
        typer.Option(help="Order also by the prior's log-likelihood, times this.  [default: bundle's]"),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; a GPU when there is one.")] = None,
    loras: LoraOptions = None,
    replay: Annotated[Path | None, typer.Option(help="Draw this PNG of ours again, instead of a prompt.")] = None,
    as_json: AsJson = False,
) -> None:
    """Draw candidates for a prompt and write the best, with a contact sheet of all, as PNG files."""
    with importing():
        from pipelines import generate as generating
        from pipelines.conditions import ClassLabel, NoPrompt, SegmentationMap

    if replay is not None:
        if prompts or prompts_file or classes or unconditional or len(segmentations or []) > 1:
            raise InputError("--replay draws what the picture remembers; leave the prompts out")
        segmentation = segmentations[0] if segmentations else None
        replayed = generating.replay(
            replay, output, model=model, device=device, segmentation=segmentation, loras=_weighted(loras)
        )
        _show_replayed(replayed, as_json)
        return
    texts = [*(prompts or []), *(generating.read_prompts(prompts_file) if prompts_file else [])]
    texts += [ClassLabel(label) for label in classes or []] + [SegmentationMap(path) for path in segmentations or []]
    texts += [NoPrompt()] if unconditional else []
    if not texts:
        raise InputError(
            "there is nothing to draw; give a prompt, --prompts FILE.jsonl, --class LABEL, --segmentation MAP.png, "
            "--unconditional, or --replay PICTURE.png"
        )
    report = generating.generate(
        texts,
        output,
        model=model or "emoji",
        num_images=num_images,
        num_candidates=num_candidates,
        seed=seed,
        rerank=rerank,
        device=device,
        loras=_weighted(loras),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        guidance_scale=guidance_scale,
        guidance_schedule=guidance_schedule and guidance_schedule.value,
        plausibility=plausibility,
        negative_prompt=negative_prompt,
        likelihood_weight=likelihood_weight,
        top_of=top_of,
        top_rows=top_rows,
        image=image,
        mask=mask,
        candidate_budget=candidate_budget,
        prune_by=prune_by.value,
        log_probs=log_probs,
        precision=precision,
    )
    _show_generated(report, as_json)


@_command(app)
def rerank(
    prompt: Annotated[str, typer.Argument(help="What the pictures should show.")],
    images: Annotated[list[Path], typer.Argument(help="Picture files.")],
    model: Annotated[
        str, typer.Option(help="Folder of a reranker or a bundle, a shipped bundle, or an open_clip model.")
    ] = "emoji",
    weights: Annotated[str | None, typer.Option(help="Weights of an open_clip model: a tag or a file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Order pictures by how well they fit a prompt, best first."""
    with importing():
        from pipelines.rank import rank

    start = time.perf_counter()
    ranked = rank(prompt, images, model, weights)
    if as_json:
        _print_json({"prompt": prompt, "model": model, "results": [place._asdict() for place in ranked]})
    else:
        _print_table([{"rank": p.rank, "score": f"{p.score:.4f}", "image": p.image} for p in ranked])
    seconds = time.perf_counter() - start
    _say(f"{len(ranked)} images in {seconds:.1f} s, {len(ranked) / seconds:.1f} images per second")


# Training -------------------------------------------------------------------------------------------------------------


class Trainable(StrEnum):
    tokenizer = "tokenizer"
    prior = "prior"
    reranker = "reranker"
    text_tokenizer = "text-tokenizer"


@_command(app)
def train(part: Trainable, recipe: Recipe, overrides: Overrides = None) -> None:
    """Train one part as its recipe says; started again, it goes on where it stopped."""
    match part:
        case Trainable.tokenizer:
            from stage1_tokenizer.train import train as run
        case Trainable.prior:
            from stage2_prior.train import train as run
        case Trainable.reranker:
            from rerank.train import train as run
        case Trainable.text_tokenizer:
            from stage2_prior.train_text import train as run
    print(run(recipe, overrides or []))


class Finetunable(StrEnum):
    prior = "prior"


@_command(app)
def finetune(
    part: Annotated[Finetunable, typer.Argument(help="The part to teach.")], recipe: Recipe, overrides: Overrides = None
) -> None:
    """Teach a trained part something new by LoRA; started again, it goes on where it stopped."""
    from stage2_prior.finetune import finetune as run

    print(run(recipe, overrides or []))


@_command(app)
def merge(
    model: Annotated[str, typer.Argument(help="A bundle, or a prior's folder.")],
    loras: LoraOptions = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder of the result.")] = None,
) -> None:
    """Make LoRAs part of a model for good, and write it as a model of the same kind."""
    from pipelines.merge import merge as run

    if not loras or out is None:
        raise InputError("there is nothing to merge; give --lora FOLDER[:WEIGHT] and --out FOLDER")
    print(run(model, _weighted(loras), out))


@_command(app)
def encode(recipe: Recipe, overrides: Overrides = None) -> None:
    """Turn a data folder into codes once, which is what a prior trains on."""
    from stage2_prior.encode import encode as run

    print(run(recipe, overrides or []))


# Measuring ------------------------------------------------------------------------------------------------------------


@_command(evaluate_app, "tokenizer")
def evaluate_tokenizer(
    model: Annotated[str, typer.Argument(help="A tokenizer's folder or hub name.")],
    data: Annotated[Path, typer.Argument(help="A data folder.")],
    split: Annotated[str | None, typer.Option(help="One split of the data; all of it when left out.")] = None,
    clip: Annotated[
        Path | None, typer.Option(help="Folder of a CLIP with a ResNet tower: distances of its features.")
    ] = None,
    lpips: Annotated[Path | None, typer.Option(help="torchvision's weights of VGG16: LPIPS.")] = None,
    inception: Annotated[Path | None, typer.Option(help="torch-fidelity's weights of Inception: rFID.")] = None,
    per_image: Annotated[Path | None, typer.Option(help="JSONL file for the figures of each picture.")] = None,
    as_json: AsJson = False,
) -> None:
    """Encode and decode pictures and say how much of them survives."""
    from stage1_tokenizer.evaluate import evaluate

    report = evaluate(model, data, split, clip=clip, lpips=lpips, inception_weights=inception, per_image=per_image)
    _print_report(report, as_json)


@_command(app)
def reconstruct(
    images: Annotated[list[Path], typer.Argument(help="Picture files.")],
    model: Annotated[str | None, typer.Option(help="A tokenizer's folder or hub name.  [default: emoji's]")] = None,
    output: Annotated[Path, typer.Option("-o", "--out", help="Folder for the pictures.")] = Path("out"),
    size: Annotated[
        int | None, typer.Option(min=1, help="Cut pictures to this side first; their own when left out.")
    ] = None,
    tile: Annotated[
        int | None, typer.Option(min=1, help="Go through large pictures in parts of this side: less memory, slower.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Encode and decode pictures and write each beside what came back."""
    from pipelines.bundle import find_bundle
    from stage1_tokenizer.reconstruct import reconstruct as run

    start = time.perf_counter()
    done = run(images, model or find_bundle("emoji") / "image_tokenizer", output, size, tile)
    if as_json:
        _print_json([one._asdict() for one in done])
    else:
        _print_table([{"psnr": f"{r.psnr:.2f}", "size": f"{r.width}x{r.height}", "picture": r.path} for r in done])
    seconds = time.perf_counter() - start
    _say(f"{len(done)} images in {seconds:.1f} s, {len(done) / seconds:.1f} images per second")


@_command(evaluate_app, "prior")
def evaluate_prior(
    model: Annotated[str, typer.Argument(help="A prior's folder or hub name.")],
    codes: Annotated[Path, typer.Argument(help="A folder of codes, as tessera encode writes it.")],
    guidance_scale: Annotated[
        float | None, typer.Option(min=0, help="Also the loss of what sampling with it draws from.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say how well a prior predicts the codes of images, in nats."""
    from stage2_prior.evaluate import evaluate

    _print_report(evaluate(model, codes, guidance_scale), as_json)


@_command(evaluate_app, "pipeline")
def evaluate_pipeline(recipe: Recipe, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Draw the prompts of a recipe and have its judge say how many pictures are right."""
    from pipelines.evaluate_recipe import evaluate_recipe

    evaluated = evaluate_recipe(recipe, overrides or [])
    if as_json:
        _print_json(evaluated.figures)
    else:
        print(evaluated.table)
        print(f"more in {evaluated.figures['output']}")


# Folders --------------------------------------------------------------------------------------------------------------


@_command(data_app, "check")
def check_data(
    folder: Annotated[Path, typer.Argument(help="A data folder.")],
    split: Annotated[str | None, typer.Option(help="One split of it; all of it when left out.")] = None,
    images_only: Annotated[bool, typer.Option("--images-only", help="Captions are not needed.")] = False,
    as_json: AsJson = False,
) -> None:
    """Read every picture and caption and count what training would meet."""
    from pipelines.check import check

    _print_report(check(folder, split, images_only), as_json)


class Convertible(StrEnum):
    """The image tokenizers and then the priors that can be converted."""

    taming_vqgan = "taming-vqgan"
    openai_dvae = "openai-dvae"
    mindalle_vqgan = "mindalle-vqgan"
    rudalle_vqgan = "rudalle-vqgan"
    min_dalle_detoker = "min-dalle-detoker"
    llamagen_vq = "llamagen-vq"
    janus_vq = "janus-vq"
    diffusers_vq = "diffusers-vq"
    ibq_vq = "ibq-vq"
    sber_movqgan = "sber-movqgan"
    chameleon_vq = "chameleon-vq"
    mindalle = "mindalle"
    rudalle = "rudalle"
    min_dalle = "min-dalle"
    llamagen = "llamagen"
    janus = "janus"
    taming = "taming"


@_command(app)
def convert(
    family: Annotated[Convertible, typer.Argument(help="Whose checkpoint it is.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the tokenizer or the bundle made of it.")],
    sources: Annotated[
        list[Path] | None,
        typer.Argument(metavar="SOURCE", help="Its files, or the folder of them; without any, what to get is said."),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(help="Pixels a side a tokenizer is used at.  [default: the checkpoint's, or its family's]"),
    ] = None,
    image_tokenizer: Annotated[
        Path | None, typer.Option(help="Folder of a converted tokenizer, for priors published without theirs.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="What a prior's files do not say.")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(metavar="model|ema", help="Which weights, where a file has both.  [default: ema, if it is whole]"),
    ] = None,
) -> None:
    """Turn a public image tokenizer, or a prior with all it needs, into ours; nothing in its files is executed."""
    from pipelines.convert import convert as run

    print(
        run(
            family.value,
            sources or [],
            out,
            image_size=image_size,
            image_tokenizer=image_tokenizer,
            settings=settings or [],
            weights=weights,
        )
    )


@_command(app)
def info(
    folder: Annotated[str, typer.Argument(help="A folder of a bundle, a part or data, or a shipped bundle's name.")],
    as_json: AsJson = False,
) -> None:
    """Say what a folder holds, without loading it."""
    from pipelines.info import describe

    _print_report(describe(folder), as_json)


@_command(app)
def bundle(
    out: Annotated[Path, typer.Argument(help="Folder of the new bundle.")],
    image_tokenizer: Annotated[str, typer.Option(help="Folder of a trained tokenizer.")],
    prior: Annotated[str, typer.Option(help="Folder of a prior trained on its codes.")],
    text_tokenizer: Annotated[
        str | None, typer.Option(help="Folder of the text tokenizer that the prior reads with, if it reads text.")
    ] = None,
    reranker: Annotated[str | None, typer.Option(help="Folder of a reranker, in open_clip's layout.")] = None,
    segmentation_tokenizer: Annotated[
        str | None, typer.Option(help="Folder of the tokenizer of segmentation maps, if the prior draws from these.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="What pictures are drawn with unless told otherwise.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Likewise.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Likewise.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Likewise.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Likewise.")] = None,
    guidance_schedule: Annotated[Schedule | None, typer.Option(help="Likewise.")] = None,
    plausibility: Annotated[float | None, typer.Option(help="Likewise.")] = None,
    likelihood_weight: Annotated[
        float, typer.Option(min=0, help="Pictures are also ordered by the prior's log-likelihood, times this.")
    ] = 0.0,
) -> None:
    """Put trained parts together into one folder that draws, and check that they belong together."""
    from pipelines.bundle import assemble_bundle
    from stage2_prior import Sampling
    from tessera.config import validate

    given = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "guidance_scale": guidance_scale,
        "guidance_schedule": guidance_schedule and guidance_schedule.value,
        "plausibility": plausibility,
    }
    assemble_bundle(
        out,
        image_tokenizer=image_tokenizer,
        prior=prior,
        text_tokenizer=text_tokenizer,
        reranker=reranker,
        segmentation_tokenizer=segmentation_tokenizer,
        sampling=validate(Sampling, {key: value for key, value in given.items() if value is not None}, "sampling"),
        likelihood_weight=likelihood_weight,
    )
    print(out)


def _weighted(loras: list[str] | None) -> list[tuple[str, float]]:
    """The folder and the weight in each FOLDER[:WEIGHT]. Raises InputError for a weight that is no number."""
    found = []
    for text in loras or []:
        folder, colon, weight = text.rpartition(":")
        if not colon or os.path.lexists(expand(text)):
            found.append((text, 1.0))
            continue
        try:
            found.append((folder, float(weight)))
        except ValueError:
            raise InputError(f"--lora {text}: the weight '{weight}' is not a number; write FOLDER:0.8") from None
    return found


# Printing -------------------------------------------------------------------------------------------------------------


def _show_generated(report: Any, as_json: bool) -> None:
    """Where the pictures of a `pipelines.generate.Report` are, and how long they took."""
    if as_json:
        _print_json(asdict(report))
        return
    for one in report.prompts:
        print(one.prompt)
        rows: list[dict[str, object]] = []
        for picture in one.images:
            scored = {"score": "-" if picture.score is None else f"{picture.score:.3f}"}
            likely = {} if picture.log_prob is None else {"log p": f"{picture.log_prob:.2f}"}
            rows.append({**scored, **likely, "seed": picture.seed, "picture": picture.path})
        _print_table(rows)
        if one.sheet is not None:
            print(f"all candidates: {one.sheet}")
        print()
    rate = f"{report.images_per_second:.2f} images per second"
    pruned = "" if report.finished == report.candidates else f" of {report.candidates} candidates"
    _say(f"{report.finished} images{pruned} in {report.seconds:.1f} s with loading and writing, {rate} once loaded")


def _show_replayed(replayed: Any, as_json: bool) -> None:
    if as_json:
        _print_json(asdict(replayed))
        return
    print(replayed.path)
    _say(f"{'equal' if replayed.identical else 'NOT equal'} to the picture, drawn in {replayed.seconds:.1f} s")


def _print_json(content: object) -> None:
    text = json.dumps(content, ensure_ascii=False, indent=2)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # an escape of ours would not be JSON
        text = json.dumps(content, indent=2)
    print(text)


def _print_table(rows: list[dict[str, object]]) -> None:
    """Rows with the same keys, in columns as wide as their widest cell."""
    lines = [list(rows[0])] + [[str(value) for value in row.values()] for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _print_report(report: dict[str, Any], as_json: bool) -> None:
    """Figures with their names, one a line; a figure of several parts below its name."""
    if as_json:
        _print_json(report)
    else:
        _print_lines(report, "")


def _print_lines(report: dict[str, Any], indent: str) -> None:
    width = max((len(name) for name in report), default=0)
    for name, value in report.items():
        if isinstance(value, dict):
            print(f"{indent}{name}:" + ("" if value else " none"))
            _print_lines(value, indent + "  ")
        elif _is_long_list(value):
            print(f"{indent}{name}:")
            print("\n".join(f"{indent}  {line}" for line in value))
        else:
            print(f"{indent}{name.ljust(width)}  {_readable(value)}")


def _is_long_list(value: object) -> bool:
    texts = isinstance(value, list | tuple) and all(isinstance(one, str) for one in value)
    return texts and len(" ".join(value)) > 60  # type: ignore[arg-type]


def _readable(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(_readable(part) for part in value) or "none"
    return "none" if value is None else str(value)


def _say(message: str) -> None:
    print(message, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
