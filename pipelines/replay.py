"""`tessera generate --replay`: a PNG generated again from the request that it remembers."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import ImageChops

from pipelines.bundle import bundle_fingerprint, draws_pictures_of
from pipelines.output import free_path, output_folder, record_of, slug
from pipelines.record import read_record
from pipelines.request import SegmentationMap
from pipelines.text_to_image import TextToImagePipeline
from tessera.errors import InputError
from tessera.images import open_image, save_png
from tessera.paths import expand


@dataclass(frozen=True)
class Replayed:
    path: str
    identical: bool  # pixel by pixel
    seconds: float


def replay(
    image: str | Path,
    output: str | Path,
    *,
    model: str | Path | None = None,
    device: str | torch.device | None = None,
    loras: Sequence[tuple[str | Path, float]] = (),
    segmentation: str | Path | None = None,
) -> Replayed:
    """Generates a PNG of `tessera generate` again from what it remembers, and writes it into the folder `output`.

    `model` is the bundle, by default the one that the image names; `loras` are the folders of those that it was sampled
    with, with the weights that they had; `segmentation` is the file of the map that it was conditioned on. Raises
    InputError when the image remembers nothing or is a contact sheet, or when the bundle or the LoRAs are not those
    that it was sampled with.
    """
    start = time.perf_counter()
    record = read_record(expand(image))
    if record.seeds is not None:
        raise InputError(f"{image} is a contact sheet; replay one of the images instead")
    name = record.model if model is None else model
    try:
        found = bundle_fingerprint(name)
    except InputError as error:
        raise InputError(f"{image} was drawn with the bundle {record.bundle}: {error}; name it with --model") from None
    if not draws_pictures_of(name, record.bundle):
        raise InputError(
            f"{image} was drawn with the bundle {record.bundle}, but {name} is {found} and draws other images; "
            "name the right bundle with --model"
        )
    before = open_image(image)
    pipeline = TextToImagePipeline.from_pretrained(name, device=device, rerank=False)
    for lora, weight in loras:
        pipeline.load_lora_weights(lora, weight)
    if (record_of(pipeline, name)["loras"] or ()) != (record.loras or ()):
        wanted = " ".join(f"--lora FOLDER:{one.weight:g} ({one.name}, {one.fingerprint})" for one in record.loras or ())
        raise InputError(f"{image} was drawn with {wanted or 'no LoRA'}; give exactly that")
    pipeline.precision = record.precision
    request = record.request
    if segmentation is not None:
        request = request.model_copy(update={"prompts": (SegmentationMap(segmentation),)})
    with output_folder(expand(output)) as folder:
        again = pipeline(request).images[0]
        stem = f"{slug(str(record.request.prompts[0]))}-seed{record.request.seed}"
        path = free_path(folder, stem, record)
        save_png(again, path, record.dumped())
    same = before.size == again.size and ImageChops.difference(before, again).getbbox() is None
    return Replayed(str(path), same, time.perf_counter() - start)
