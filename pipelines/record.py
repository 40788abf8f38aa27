"""What a PNG remembers: the `Request` that samples this very image again, and what it was sampled with."""

from pathlib import Path
from typing import Any

from pipelines.request import Request
from stage2_prior.sampling.settings import Precision
from tessera.config import Config, validate
from tessera.images import read_origin

OF_REQUEST = ("seed", "sampling", "negative_prompt", "first_codes", "known_codes")  # beside the prompt, in release 0.1


class RecordedLora(Config):
    name: str  # of its folder
    fingerprint: str
    weight: float


class ImageRecord(Config):
    request: Request  # of this image alone
    bundle: str  # fingerprint
    model: str  # name of the bundle: shipped, on the hub, or of the folder it was in
    version: str
    loras: tuple[RecordedLora, ...] | None = None
    precision: Precision | None = None  # that the prior's weights were kept in, None: as they are in the bundle
    score: float | None = None  # of this image, None where nothing was reranked
    log_prob: float | None = None  # of this image's codes given the prompt, None where it was not asked for
    seeds: tuple[int, ...] | None = None  # of a contact sheet: all its candidates, in its order

    def dumped(self) -> dict[str, Any]:
        """As JSON; the sampling is whole, so that it does not depend on a later release's defaults."""
        request = self.request.model_dump(mode="json")
        fields = Request.model_fields
        asked = {name: request[name] for name in fields if getattr(self.request, name) != fields[name].default}
        content = self.model_dump(mode="json", exclude_none=True, exclude={"request"})
        return {"prompt": str(self.request.prompts[0]), "request": asked} | content

    def comparable(self) -> "ImageRecord":
        """Without what may differ for one image: another reranker may score it, another version record it."""
        return self.model_copy(update={"score": None, "log_prob": None, "version": "", "model": ""})


def read_record(path: Path) -> ImageRecord:
    """The record in a PNG, also of release 0.1. Raises InputError when there is none, or it is broken."""
    content = read_origin(path)
    content = content if "request" in content else _of_release_0_1(content)
    return validate(ImageRecord, {key: content[key] for key in content if key != "prompt"}, f"the origin in {path}")


def _of_release_0_1(content: dict[str, Any]) -> dict[str, Any]:
    """Prompt and settings stood beside the others; a prompt was a text, `class 207` for a class label."""
    request = {key: content[key] for key in OF_REQUEST if content.get(key) is not None}
    prompts = [{"type": "text", "text": content.get("prompt")}]
    rest = {key: value for key, value in content.items() if key not in (*OF_REQUEST, "prompt")}
    return rest | {"request": request | {"prompts": prompts, "num_candidates": 1}}
