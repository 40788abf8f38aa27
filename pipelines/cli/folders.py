"""`tessera data check`, `convert`, `info` and `bundle`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli.app import AsJson, app, command, data_app
from pipelines.cli.images import Schedule, settings_of
from pipelines.cli.show import print_report


@command(data_app, "check")
def check_data(
    folder: Annotated[Path, typer.Argument(help="A data folder.")],
    split: Annotated[str | None, typer.Option(help="One split of it; all of it when left out.")] = None,
    images_only: Annotated[bool, typer.Option("--images-only", help="Captions are not needed.")] = False,
    as_json: AsJson = False,
) -> None:
    """Read every image and caption and count what training would meet."""
    from tessera.data.check import check

    print_report(check(folder, split, images_only), as_json)


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


@command(app)
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


@command(app)
def info(
    folder: Annotated[str, typer.Argument(help="A folder of a bundle, a part or data, or a shipped bundle's name.")],
    as_json: AsJson = False,
) -> None:
    """Say what a folder holds, without loading it."""
    from pipelines.info import describe

    print_report(describe(folder), as_json)


@command(app)
def bundle(
    context: typer.Context,
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

    settings = {
        key: value for key, value in settings_of(context, [*Sampling.model_fields]).items() if value is not None
    }
    assemble_bundle(
        out,
        image_tokenizer=image_tokenizer,
        prior=prior,
        text_tokenizer=text_tokenizer,
        reranker=reranker,
        segmentation_tokenizer=segmentation_tokenizer,
        sampling=validate(Sampling, settings, "sampling"),
        likelihood_weight=likelihood_weight,
    )
    print(out)
