"""The doctor's page: one HTML file with all images inside, how codes were used, what was done and why.

For every code shown, patches of images that chose it: what the code means. A code position's patch is the square of
`factor` pixels that lies under it; the encoder saw more than that.
"""

import base64
import html
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from stage1_tokenizer.autoencoder import Autoencoder
from stage1_tokenizer.doctor import Action, Doctor, Visit
from tessera.data.source import ImageFolder
from tessera.errors import InputError
from tessera.images import to_pil
from tessera.weights.writing import write_text

PATCHES = 6  # of a code
PICTURES = 256  # that patches are taken from
PIXELS = 48  # side of a patch on the page

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #222 }
h2 { margin-top: 2rem } table { border-collapse: collapse } td, th { padding: .2rem .8rem .2rem 0; text-align: left }
.codes { display: flex; flex-wrap: wrap; gap: .6rem } figure { margin: 0 } figcaption { font-size: 12px; color: #555 }
img { image-rendering: pixelated; display: block } svg { background: #f6f6f6 }
.charts { display: flex; flex-wrap: wrap; gap: 1rem }
"""

Patches = dict[tuple[int, int], list[Image.Image]]  # (codebook, code) -> pixels that chose it


@torch.no_grad()
def exemplars(autoencoder: Autoencoder, data: ImageFolder) -> Patches:
    """Up to PATCHES patches for each code, from PICTURES evenly spaced images; unreadable ones are left out."""
    factor, device = autoencoder.factor, next(autoencoder.parameters()).device
    found: Patches = {}
    wanted = torch.linspace(0, len(data) - 1, min(PICTURES, len(data))).long().tolist()
    with evaluating(autoencoder):
        for first in range(0, len(wanted), 32):
            pictures = list(_readable(data, wanted[first : first + 32]))
            if not pictures:
                continue
            images = torch.stack(pictures)
            codes = autoencoder.encode(images.to(device)).cpu()  # (B, Q, h, w)
            patches = rearrange(images, "b c (h p) (w r) -> (b h w) c p r", p=factor, r=factor)
            for book, chosen in zip(autoencoder.bottleneck.codebook_of, codes.unbind(1), strict=True):
                for place, code in enumerate(chosen.flatten().tolist()):
                    kept = found.setdefault((book, code), [])
                    if len(kept) < PATCHES:
                        kept.append(to_pil(patches[place : place + 1])[0])
    return found


def _readable(data: ImageFolder, indices: Sequence[int]) -> Iterator[Tensor]:
    for index in indices:
        try:
            yield data.read(index)
        except InputError:  # training has named it already
            continue


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; afterwards each part is in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def write_page(path: Path, doctor: Doctor, patches: Patches, step: int) -> None:
    """Writes the page of a run as it is after `step` steps, whole or not at all."""
    write_text(path, page(doctor, patches, step))


def page(doctor: Doctor, patches: Patches, step: int) -> str:
    """The whole document."""
    counts = doctor.counts.cpu()
    books = [_book(number, row, patches, doctor.config.codes_shown) for number, row in enumerate(counts)]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Codebook after {step} steps</title><style>{STYLE}</style></head>
<body>
<h1>Codebook after {step:,} steps</h1>
{_summary(doctor.visits, counts)}
<div class="charts">
{_chart("codes used, share", [(v.step, v.used) for v in doctor.visits], doctor.actions, top=1.0)}
{_chart("perplexity", [(v.step, v.perplexity) for v in doctor.visits], doctor.actions)}
{_chart("PSNR, dB", [(v.step, v.psnr) for v in doctor.visits], doctor.actions)}
</div>
<h2>What was done, and why</h2>
{_actions(doctor.actions)}
{"".join(books)}
</body></html>
"""


def _summary(visits: Sequence[Visit], counts: Tensor) -> str:
    if not visits:
        return "<p>No visit yet.</p>"
    last = visits[-1]
    return (
        f"<p>At step {last.step:,}: {last.used:.1%} of {counts.numel():,} codes in use over the window, {last.dead:,} "
        f"dead, perplexity {last.perplexity:,.1f} of {counts.shape[1]:,}, PSNR {last.psnr:.2f} dB; {last.revived:,} "
        "codes came back since the visit before.</p>"
    )


def _actions(actions: Sequence[Action]) -> str:
    if not actions:
        return "<p>Nothing; there was no need.</p>"
    cells = [(f"{action.step:,}", action.what, action.why) for action in actions]
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in cells)
    return f"<table><tr><th>step</th><th>what</th><th>why</th></tr>{rows}</table>"


def _chart(title: str, points: Sequence[tuple[int, float]], actions: Sequence[Action], top: float | None = None) -> str:
    """A line over the steps, from 0 to `top` or to the largest value, with an upright at every action."""
    width, height = 320, 160
    last = max((step for step, _ in points), default=1)
    most = top or max((value for _, value in points), default=1.0) or 1.0
    line = " ".join(f"{step / last * width:.1f},{height - value / most * height:.1f}" for step, value in points)
    marks = "".join(
        f'<line x1="{a.step / last * width:.1f}" x2="{a.step / last * width:.1f}" y1="0" y2="{height}" stroke="#d66">'
        f"<title>{html.escape(f'{a.step}: {a.what}')}</title></line>"
        for a in actions
    )
    return (
        f'<figure><svg width="{width}" height="{height}" role="img">{marks}<polyline points="{line}" fill="none" '
        f'stroke="#246" stroke-width="2"/></svg><figcaption>{title}: 0 to {most:,.4g}, step 0 to {last:,}; '
        "red where something was done</figcaption></figure>"
    )


def _book(number: int, counts: Tensor, patches: Patches, shown: int) -> str:
    """One codebook (K,): how unevenly its codes are used, and what those used most and least look like."""
    order = counts.argsort(descending=True, stable=True)
    used = order[counts[order] > 0].tolist()
    codes = used if len(used) <= shown else used[: shown // 2] + used[-(shown - shown // 2) :]
    left_out = f", {len(used) - len(codes):,} in between left out" if len(used) > len(codes) else ""
    figures = "".join(_code(code, int(counts[code]), patches.get((number, code), [])) for code in codes)
    shares = counts[order].double() / counts.sum().clamp_min(1)
    half = int((shares.cumsum(0) < 0.5).sum()) + 1
    return (
        f"<h2>Codebook {number}</h2><p>{len(used):,} of {len(counts):,} codes in use; half of all uses fall on "
        f"{half:,} of them. From the most to the least used{left_out}:</p><div class='codes'>{figures}</div>"
    )


def _code(code: int, uses: int, patches: Sequence[Image.Image]) -> str:
    caption = f"<figcaption>{code}: {uses:,} uses</figcaption>"
    if not patches:
        return f"<figure>{caption}</figure>"
    side = patches[0].width
    strip = Image.new("RGB", (side * len(patches), side))
    for place, patch in enumerate(patches):
        strip.paste(patch, (place * side, 0))
    buffer = io.BytesIO()
    strip.save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    size = f'width="{PIXELS * len(patches)}" height="{PIXELS}"'
    return f'<figure><img {size} alt="patches of code {code}" src="data:image/png;base64,{data}">{caption}</figure>'
