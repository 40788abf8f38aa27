"""How fast the published VQGAN encodes, decodes and trains, beside diffusers', in one run.

    pip install diffusers
    python benchmarks/tokenizer.py --rounds 3

256x256 pixels, factor 16, 16384 codes, widths 128 128 256 256 512: taming's f16 16384, and the trunk of LlamaGen's
VQ-16. All models take turns, so that a machine's moods meet all alike; rates are those of each one's best round. Wall
time is what one waits; CPU time, in seconds of all threads an image, says more on a machine that does other things too.
Peak memory is of the whole process, the weights and libraries with it, each model in a process of its own. bfloat16 is
measured where the hardware multiplies in it. Training is forward, L1 and bottleneck loss, backward and AdamW.
"""

import argparse
import importlib
import importlib.util
import json
import multiprocessing
import platform
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage1_tokenizer import Autoencoder, AutoencoderConfig
from tessera.hardware import multiplies_bfloat16
from tessera.native import accelerate

SIZE, FACTOR, CODES, WIDTHS = 256, 16, 16384, (128, 128, 256, 256, 512)
WORKS = ("encode", "decode", "train")


@dataclass
class Contender:
    model: nn.Module
    encode: Callable[[Tensor], Tensor]  # images (B, 3, H, W) -> codes, any shape
    decode: Callable[[Tensor], Tensor]  # codes (B, h, w) -> images
    loss: Callable[[Tensor], Tensor]  # images -> scalar


def ours(compiled: bool = False) -> Contender:
    trunk = {
        "channels": 128,
        "multipliers": [width // 128 for width in WIDTHS],
        "code_dim": 256,
        "encoder_attention": [4],
        "decoder_attention": [4],
    }
    config = {"image_size": SIZE, "trunk": trunk, "bottleneck": {"type": "vq", "codebook_size": CODES, "patience": 0}}
    model = Autoencoder(AutoencoderConfig.model_validate(config))
    accelerate(model.decoder)  # as `from_pretrained` does
    if compiled:
        model.encoder.compile()
        model.decoder.compile()

    def loss(images: Tensor) -> Tensor:
        output = model(images)
        return F.l1_loss(output.images, images) + output.bottleneck_loss

    return Contender(model, model.encode, lambda codes: model.decode(codes.unsqueeze(1)), loss)


def diffusers(channels_last: bool) -> Contender:
    from diffusers import VQModel

    model = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 4 + ("AttnDownEncoderBlock2D",),
        up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 4,
        block_out_channels=WIDTHS,
        layers_per_block=2,
        latent_channels=256,
        vq_embed_dim=256,
        num_vq_embeddings=CODES,
        lookup_from_codebook=True,
    )
    if channels_last:
        model.to(memory_format=torch.channels_last)

    def encode(images: Tensor) -> Tensor:
        return model.quantize(model.encode(images).latents)[2][2]

    def decode(codes: Tensor) -> Tensor:
        return model.decode(codes, force_not_quantize=True, shape=(*codes.shape, 256)).sample

    def loss(images: Tensor) -> Tensor:
        output = model(images)
        return F.l1_loss(output.sample, images) + output.commit_loss.mean()

    return Contender(model, encode, decode, loss)


def builders(arguments: argparse.Namespace) -> dict[str, Callable[[], Contender]]:
    found: dict[str, Callable[[], Contender]] = {"tessera": ours}
    if arguments.compile:
        found["tessera, compiled"] = lambda: ours(compiled=True)
    if importlib.util.find_spec("diffusers"):
        found["diffusers"] = lambda: diffusers(channels_last=False)
        found["diffusers, channels last"] = lambda: diffusers(channels_last=True)
    return found


def work_of(contender: Contender, work: str, batch: int, device: str, dtype: torch.dtype) -> Callable[[], None]:
    """One piece of work, over and over: a batch encoded, decoded, or one step of training."""
    model = contender.model.to(device).train(work == "train")
    images = torch.rand(batch, 3, SIZE, SIZE, device=device) * 2 - 1
    codes = torch.randint(CODES, (batch, SIZE // FACTOR, SIZE // FACTOR), device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5) if work == "train" else None

    def run() -> None:
        autocast = torch.autocast(device, dtype, enabled=dtype != torch.float32)
        if optimizer is not None:
            with autocast:
                loss = contender.loss(images)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        else:
            with torch.inference_mode(), autocast:
                contender.encode(images) if work == "encode" else contender.decode(codes)
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def peak_memory(arguments: argparse.Namespace, name: str, work: str, batch: int, answer: Any) -> None:
    """In a process of its own: GiB at most, of the process or, on a GPU, of its tensors."""
    torch.set_num_threads(arguments.threads)
    run = work_of(builders(arguments)[name](), work, batch, arguments.device, torch.float32)
    run()
    if arguments.device == "cuda":
        answer.put(torch.cuda.max_memory_allocated() / 2**30)
    else:
        answer.put(resident_peak() / 2**20)


def resident_peak() -> int:
    """KiB at most so far. On Linux of this program alone: what getrusage says includes the process that started it."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def measured_memory(arguments: argparse.Namespace, name: str, work: str, batch: int) -> float:
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=peak_memory, args=(arguments, name, work, batch, answer))
    process.start()
    found: float = answer.get()
    process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 4])
    parser.add_argument("--work", nargs="*", choices=WORKS, default=list(WORKS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="also ours through torch.compile")
    parser.add_argument("--memory", action="store_true", help="also peak memory, which takes a process for each figure")
    parser.add_argument("--json", action="store_true", help="JSON lines instead of a table")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    precisions = [torch.float32, *([torch.bfloat16] if multiplies_bfloat16() else [])]
    contenders = {name: build() for name, build in builders(arguments).items()}
    print(f"torch {torch.__version__}, {arguments.device}, {platform.processor() or platform.machine()}, ", end="")
    print(f"{arguments.threads} threads{'' if len(precisions) > 1 else ', no bfloat16 arithmetic in this machine'}")
    for work in arguments.work:
        for batch in arguments.batch:
            for precision in precisions:
                rows = compare(contenders, work, batch, precision, arguments)
                print("\n".join(json.dumps(row) for row in rows) if arguments.json else table(rows))


def compare(
    contenders: dict[str, Contender], work: str, batch: int, precision: torch.dtype, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row for each contender, all of which take turns; the first round warms up."""
    runs = {name: work_of(c, work, batch, arguments.device, precision) for name, c in contenders.items()}
    wall: dict[str, list[float]] = {name: [] for name in runs}
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(1 + arguments.rounds):
        for name, run in runs.items():
            start, busy = time.perf_counter(), time.process_time()
            run()
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - busy)
    rows = []
    for name in runs:
        row = {"model": name, "work": work, "batch": batch, "precision": str(precision).removeprefix("torch.")}
        row |= {"images_per_second": round(batch / min(wall[name][1:]), 4)}
        row |= {"cpu_seconds_per_image": round(min(cpu[name][1:]) / batch, 4)}
        if arguments.memory:
            row |= {"peak_gib": round(measured_memory(arguments, name, work, batch), 2)}
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of one comparison, in columns as wide as their widest cell."""
    lines = [list(rows[0])] + [[str(value) for value in row.values()] for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines) + "\n"


if __name__ == "__main__":
    main()
