"""`tessera evaluate` and `tessera reconstruct`."""

import time
from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli.app import AsJson, Overrides, Recipe, app, command, evaluate_app
from pipelines.cli.show import print_json, print_report, print_table, say


@command(evaluate_app, "tokenizer")
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
    """Encode and decode images and say how much of them survives."""
    from stage1_tokenizer.evaluate import evaluate

    report = evaluate(model, data, split, clip=clip, lpips=lpips, inception_weights=inception, per_image=per_image)
    print_report(report, as_json)


@command(app)
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
    """Encode and decode images and write each beside what came back."""
    from pipelines.bundle import find_bundle
    from stage1_tokenizer.reconstruct import reconstruct as run

    start = time.perf_counter()
    done = run(images, model or find_bundle("emoji") / "image_tokenizer", output, size, tile)
    if as_json:
        print_json([one._asdict() for one in done])
    else:
        print_table([{"psnr": f"{r.psnr:.2f}", "size": f"{r.width}x{r.height}", "picture": r.path} for r in done])
    seconds = time.perf_counter() - start
    say(f"{len(done)} images in {seconds:.1f} s, {len(done) / seconds:.1f} images per second")


@command(evaluate_app, "prior")
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

    print_report(evaluate(model, codes, guidance_scale), as_json)


@command(evaluate_app, "pipeline")
def evaluate_pipeline(recipe: Recipe, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Draw the prompts of a recipe and have its judge say how many images are right."""
    from pipelines.evaluate_recipe import evaluate_recipe

    evaluated = evaluate_recipe(recipe, overrides or [])
    if as_json:
        print_json(evaluated.figures)
    else:
        print(evaluated.table)
        print(f"more in {evaluated.figures['output']}")
