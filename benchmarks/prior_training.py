"""How fast the GPT prior trains, beside transformers' GPT-2 and Llama of the same size, in one run.

    python benchmarks/prior_training.py --rounds 5

The steps of all models take turns, so that a machine's moods meet all alike. A step is forward, loss, backward and
AdamW on random tokens: by default width 512, 12 layers, 8 heads, 64 text and 256 image tokens, batch 8. Ours has a text
and an image vocabulary and predicts each token in its own; the others have one of the same size, which is as many
multiplications. Freed memory is kept, as `tessera train` asks for on a CPU; with `--return-memory` the C library gives
it back, which costs all of them up to a tenth. Utilisation counts what a model needs (6 a weight and token, and
attention in full, as in PaLM, Chowdhery et al. 2022, appendix B), against the fastest of a few large matrix products on
the same machine.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stage2_prior import GPTConfig, GPTPrior
from stage2_prior.train import Objective
from tessera.hardware import keep_memory, multiplies_bfloat16
from tessera.native import accelerate_training
from tessera.native.linear import product


@dataclass(frozen=True)
class Size:
    dim: int = 512
    depth: int = 12
    num_heads: int = 8
    text: int = 64
    side: int = 16  # of the code grid
    vocabulary: int = 4096
    batch: int = 8

    @property
    def tokens(self) -> int:
        return self.text + self.side**2


@dataclass
class Contender:
    model: nn.Module
    loss: Callable[[], Tensor]  # of one batch
    matrices: int  # weights that every token is multiplied with

    def flops(self, size: Size) -> float:
        """Of one step."""
        attention = 12 * size.depth * size.tokens * size.dim
        return size.batch * size.tokens * (6 * self.matrices + attention)


def ours(size: Size, device: str, **options: Any) -> Contender:
    config = GPTConfig(
        codebook_size=size.vocabulary, code_shape=(1, size.side, size.side), text_vocab_size=size.vocabulary,
        text_length=size.text, dim=size.dim, depth=size.depth, num_heads=size.num_heads, **options,
    )  # fmt: skip
    prior = GPTPrior(config).to(device)
    accelerate_training(prior)  # as `tessera train` does
    objective = Objective(prior)
    prefix = torch.randint(3, size.vocabulary, (size.batch, size.text), device=device)
    codes = torch.randint(0, size.vocabulary, (size.batch, size.side**2), device=device)

    def loss() -> Tensor:
        text, image = objective(prefix, codes)
        return (text / 8 + image.mean()) / (1 + 1 / 8)

    return Contender(objective, loss, matrices(prior.decoder) + size.vocabulary * size.dim)


def modern(size: Size, device: str) -> Contender:
    """Ours with Llama's parts and parameters."""
    return ours(size, device, positions="rotary", mlp="swiglu", mlp_ratio=llama_hidden(size) / size.dim, qk_norm=False)


def gpt2(size: Size, device: str) -> Contender:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=size.vocabulary, n_positions=size.tokens, n_embd=size.dim, n_layer=size.depth, n_head=size.num_heads,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with torch.device(device):
        model = GPT2LMHeadModel(config)
    return foreign(model, model.transformer.h, size, device)


def llama(size: Size, device: str) -> Contender:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=size.vocabulary, hidden_size=size.dim, num_hidden_layers=size.depth, use_cache=False,
        intermediate_size=llama_hidden(size), num_attention_heads=size.num_heads, max_position_embeddings=size.tokens,
    )  # fmt: skip
    with torch.device(device):
        model = LlamaForCausalLM(config)
    return foreign(model, model.model.layers, size, device)


def foreign(model: nn.Module, blocks: nn.Module, size: Size, device: str) -> Contender:
    """A model of transformers, which shifts its labels itself."""
    ids = torch.randint(0, size.vocabulary, (size.batch, size.tokens), device=device)
    return Contender(
        model, lambda: model(input_ids=ids, labels=ids).loss, matrices(blocks) + size.vocabulary * size.dim
    )


def llama_hidden(size: Size) -> int:
    """Two thirds of 4 E, so that three matrices are as many weights as two of 4 E, in whole vectors."""
    return round(size.dim * 8 / 3 / 32) * 32


def matrices(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.ndim == 2)


CONTENDERS: dict[str, Callable[[Size, str], Contender]] = {
    "tessera": ours,
    "tessera, Llama's parts": modern,
    "transformers GPT-2": gpt2,
    "transformers Llama": llama,
}


# The processor's clock leaves out the time that others have it: for one thread on a machine that is shared.
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


class Trainer:
    """Steps of one contender, timed."""

    def __init__(self, contender: Contender, device: str, bfloat16: bool, compiled: bool, clock: str) -> None:
        self.contender, self.device, self.bfloat16, self.now = contender, device, bfloat16, CLOCKS[clock]
        contender.model.train()
        if compiled:
            contender.model.compile()
        self.optimizer = torch.optim.AdamW(contender.model.parameters(), lr=1e-4, fused=True)

    def step(self) -> float:
        """Seconds of one step."""
        wait(self.device)
        start = self.now()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bfloat16):
            loss = self.contender.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        wait(self.device)
        return self.now() - start


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def matmul_peak(device: str, dtype: torch.dtype, side: int, now: Callable[[], float]) -> float:
    """FLOP/s of the fastest of ten products of square matrices, by torch and by what our prior is trained with."""
    a, b = torch.randn(2, side, side, device=device, dtype=dtype).unbind()
    best = 0.0
    for multiply in (torch.mm, product) * 5:
        wait(device)
        start = now()
        multiply(a, b)
        wait(device)
        best = max(best, 2 * side**3 / (now() - start))
    return best


def peak_memory(name: str, size: Size, device: str, bfloat16: bool, arguments: argparse.Namespace) -> float:
    """MB that two steps take at most; on a CPU beyond what the process has before, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_measure, args=(queue, name, size, device, bfloat16, arguments))
    process.start()
    peak: float = queue.get(timeout=600)
    process.join()
    return peak


def _measure(queue: Any, name: str, size: Size, device: str, bfloat16: bool, arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    if not arguments.return_memory:
        keep_memory()
    import transformers  # noqa: F401  all contenders start from the same

    before = resident_peak()
    trainer = Trainer(CONTENDERS[name](size, device), device, bfloat16, arguments.compile, "wall")
    for _ in range(2):
        trainer.step()
    if device == "cuda":
        queue.put(torch.cuda.max_memory_allocated() / 1e6)
    else:
        queue.put(resident_peak() - before)


def resident_peak() -> float:
    """The most memory that this process has had, in MB. Linux only; `getrusage` would begin with the parent's."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6


def compare(names: list[str], size: Size, device: str, bfloat16: bool, arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second, utilisation and peak memory of each contender."""
    trainers = {}
    for name in names:
        torch.manual_seed(0)
        trainers[name] = Trainer(CONTENDERS[name](size, device), device, bfloat16, arguments.compile, arguments.clock)
    for trainer in trainers.values():
        trainer.step()  # the first allocates, and compiles
    peaks, seconds = [], {name: [] for name in names}  # type: ignore[var-annotated]
    for _ in range(arguments.rounds):
        dtype = torch.bfloat16 if bfloat16 else torch.float32
        peaks.append(matmul_peak(device, dtype, arguments.peak_side, CLOCKS[arguments.clock]))
        for name, trainer in trainers.items():
            seconds[name].append(trainer.step())
            print(f"{name}: {seconds[name][-1]:.2f} s", file=sys.stderr)
    rows = {}
    for name, trainer in trainers.items():
        typical = statistics.median(seconds[name])
        rows[name] = {
            "tokens_per_second": round(size.batch * size.tokens / typical, 1),
            "fastest_step": round(min(seconds[name]), 3),
            "median_step": round(typical, 3),
            "utilisation": round(trainer.contender.flops(size) / typical / max(peaks), 3),
            "parameters": sum(parameter.numel() for parameter in trainer.contender.model.parameters()),
        }
    del trainers
    if not arguments.no_memory:
        for name in names:
            rows[name]["peak_mb"] = round(peak_memory(name, size, device, bfloat16, arguments))
    return {"matmul_gflops": round(max(peaks) / 1e9, 1), "models": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name, value in asdict(Size()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="what seconds are counted by")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile every model")
    parser.add_argument("--return-memory", action="store_true", help="let the C library give freed memory back")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory")
    parser.add_argument("--peak-side", type=int, default=2048, help="rows of the matrices of the peak's product")
    parser.add_argument("--only", nargs="*", choices=list(CONTENDERS), default=list(CONTENDERS))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not arguments.return_memory:
        keep_memory()
    size = Size(**{name: getattr(arguments, name) for name in asdict(Size())})
    report: dict[str, Any] = {"size": asdict(size), "device": arguments.device, "threads": arguments.threads}
    report |= {"clock": arguments.clock, "memory": "returned" if arguments.return_memory else "kept"}
    report["float32"] = compare(arguments.only, size, arguments.device, False, arguments)
    if multiplies_bfloat16():
        report["bfloat16"] = compare(arguments.only, size, arguments.device, True, arguments)
    else:
        print("bfloat16 is left out: this hardware does not multiply in it", file=sys.stderr)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
