"""`tessera generate` and `tessera rerank`."""

import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from pipelines.cli.app import BUNDLE, AsJson, LoraOptions, app, as_meant, command, importing, weighted
from pipelines.cli.show import print_json, print_table, say, show_generated, show_replayed
from tessera.errors import InputError


class Schedule(StrEnum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class PruneBy(StrEnum):
    likelihood = "likelihood"
    reranker = "reranker"


@command(app)
def generate(
    context: typer.Context,
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
    num_images_per_prompt: Annotated[
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
    """Sample candidates for a prompt and write the best, with a contact sheet of all, as PNG files."""
    with importing():
        from pipelines.conditions import ClassLabel, NoPrompt, SegmentationMap
        from pipelines.output import generate as write_images
        from pipelines.output import read_prompts
        from pipelines.replay import replay as generate_again
        from pipelines.request import keywords

    if replay is not None:
        if prompts or prompts_file or classes or unconditional or len(segmentations or []) > 1:
            raise InputError("--replay draws what the picture remembers; leave the prompts out")
        segmentation = segmentations[0] if segmentations else None
        again = generate_again(
            replay, output, model=model, device=device, segmentation=segmentation, loras=weighted(loras)
        )
        show_replayed(again, as_json)
        return
    asked: list[object] = [*(prompts or []), *(read_prompts(prompts_file) if prompts_file else [])]
    asked += [ClassLabel(label) for label in classes or []] + [SegmentationMap(path) for path in segmentations or []]
    asked += [NoPrompt()] if unconditional else []
    if not asked:
        raise InputError(
            "there is nothing to draw; give a prompt, --prompts FILE.jsonl, --class LABEL, --segmentation MAP.png, "
            "--unconditional, or --replay PICTURE.png"
        )
    report = write_images(
        asked,
        output,
        model=model or "emoji",
        device=device,
        precision=precision,
        loras=weighted(loras),
        top_of=top_of,
        top_rows=top_rows,
        image=image,
        mask=mask,
        **settings_of(context, keywords()),
    )
    show_generated(report, as_json)


def settings_of(context: typer.Context, names: list[str]) -> dict[str, Any]:
    """Those options of a command that are settings of a `Request`, by their names."""
    values = {name: context.params[name] for name in names if name in context.params}
    values = {name: value.value if isinstance(value, StrEnum) else value for name, value in values.items()}
    return {name: as_meant(value) for name, value in values.items()}


@command(app)
def rerank(
    prompt: Annotated[str, typer.Argument(help="What the pictures should show.")],
    images: Annotated[list[Path], typer.Argument(help="Picture files.")],
    model: Annotated[
        str, typer.Option(help="Folder of a reranker or a bundle, a shipped bundle, or an open_clip model.")
    ] = "emoji",
    weights: Annotated[str | None, typer.Option(help="Weights of an open_clip model: a tag or a file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Order images by how well they fit a prompt, best first."""
    with importing():
        from pipelines.rank import rank

    start = time.perf_counter()
    ranked = rank(prompt, images, model, weights)
    if as_json:
        print_json({"prompt": prompt, "model": model, "results": [place._asdict() for place in ranked]})
    else:
        print_table([{"rank": p.rank, "score": f"{p.score:.4f}", "image": p.image} for p in ranked])
    seconds = time.perf_counter() - start
    say(f"{len(ranked)} images in {seconds:.1f} s, {len(ranked) / seconds:.1f} images per second")
