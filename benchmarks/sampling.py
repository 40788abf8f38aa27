"""Images per second of sampling: ours beside transformers' `generate` and CTranslate2, and what the machine allows.

    python benchmarks/sampling.py                         # dim 512, 12 layers, 64 text tokens, 256 codes of 8192
    python benchmarks/sampling.py --codes 64 --rows 1 16  # shorter: a quarter of an image
    python benchmarks/sampling.py --device cuda --dim 1536 --depth 42 --heads 24 --codebook 16384 --rows 1 16 64

All have random weights of the same sizes. Every contender is a process of its own that keeps its model; they run in
turn, round after round, so that what else the machine does meets all of them; of each the median counts. The floor of a
step is the time to read its weights once or to multiply them with all rows, whichever is longer, at the bandwidth and
the rate measured in the same rounds; the rate of bfloat16 stands for int8 as well. CTranslate2 takes part when it is
installed (`pip install ctranslate2`).
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from stage2_prior.sampling.selection import FP8_CAPABILITY
from tessera.hardware import cpu_multiplies_bfloat16

Run = Callable[[int], object]  # draws so many images

CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
COLOURS = ["#1b6ca8", "#3fa34d", "#8e44ad", "#c0392b", "#e67e22", "#7f8c8d", "#16a085"]


def main() -> None:
    arguments = parse()
    if arguments.worker:
        return work(arguments)
    torch.set_num_threads(arguments.threads)
    workers = {name: start(name) for name in contenders(arguments)}
    machine: list[tuple[float, float, float]] = []  # bytes a second, FLOPs a second in float32 and in bfloat16
    seconds: dict[str, dict[int, list[float]]] = {name: {rows: [] for rows in arguments.rows} for name in workers}
    memory: dict[str, int] = {}
    for repeat in range(arguments.repeats):
        for rows in arguments.rows:
            machine.append(measure_machine(arguments.device, CLOCKS[arguments.clock]))
            for name, worker in workers.items():
                answer = ask(worker, rows)
                seconds[name][rows].append(answer["seconds"])
                memory[name] = answer["bytes"]
                print(f"round {repeat + 1}, N={rows}, {name}: {answer['seconds']:.2f} s", file=sys.stderr)
    for worker in workers.values():
        worker.terminate()
        worker.wait()
    report(arguments, seconds, memory, machine)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("dim", 512), ("depth", 12), ("heads", 8), ("text", 64), ("codes", 256), ("codebook", 8192), ("codebooks", 1),
        ("repeats", 3), ("threads", torch.get_num_threads()),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 32], help="images drawn at once")
    parser.add_argument("--guidance", type=float, default=1.0, help="ours only")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--clock", choices=["wall", "processor"], default="wall",
        help="processor: its time alone, for a machine that others use too; with --threads 1",
    )  # fmt: skip
    parser.add_argument("--only", nargs="+", help="these contenders alone")
    parser.add_argument("--out", type=Path, help="NAME.json and NAME.svg are written")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def contenders(arguments: argparse.Namespace) -> list[str]:
    if arguments.device == "cpu":
        names = ["ours float32", "ours int8", "ours bfloat16", "ours plain"]
    else:
        names = ["ours bfloat16", "ours int8", "ours plain bfloat16"]
        if torch.cuda.get_device_capability() >= FP8_CAPABILITY:
            names += ["ours fp8"]
    if arguments.codebooks == 1:
        names += ["transformers dynamic", "transformers static"]
        if arguments.device == "cpu" and cpu_multiplies_bfloat16():
            names += ["transformers dynamic bfloat16", "transformers static bfloat16"]
        if arguments.device == "cpu" and importlib.util.find_spec("ctranslate2"):
            names += ["ctranslate2 int8"]
    return [name for name in names if not arguments.only or name in arguments.only]


# Contenders -----------------------------------------------------------------------------------------------------------


def work(arguments: argparse.Namespace) -> None:
    """Reads numbers of rows, one a line, and answers each with the seconds that drawing them took."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    kind = arguments.worker.split()[0]
    make = {"ours": ours, "transformers": transformers_gpt2, "ctranslate2": ctranslate2_gpt2}[kind]
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        run = make(arguments, Path(folder))
        warm: set[int] = set()
        print("ready", flush=True)
        for line in sys.stdin:
            rows = int(line)
            if rows not in warm and (rows == arguments.rows[0] or arguments.device != "cpu"):
                run(rows)
            warm.add(rows)
            clock = CLOCKS[arguments.clock]
            begin = clock()
            run(rows)
            if arguments.device != "cpu":
                torch.cuda.synchronize()
            took = clock() - begin
            most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            most = most if arguments.device == "cpu" else torch.cuda.max_memory_allocated()
            print(json.dumps({"seconds": took, "bytes": most}), flush=True)


def ours(arguments: argparse.Namespace, folder: Path) -> Run:
    from stage2_prior import GPTConfig, GPTPrior, Sampling, sample
    from stage2_prior.sampling import PlainEngine, make_engine

    positions = arguments.codes // arguments.codebooks
    width = next(width for width in (16, 8, 4, 2, 1) if positions % width == 0)
    config = GPTConfig(
        codebook_size=arguments.codebook, code_shape=(arguments.codebooks, positions // width, width),
        text_vocab_size=4096, text_length=arguments.text, dim=arguments.dim, depth=arguments.depth,
        num_heads=arguments.heads,
    )  # fmt: skip
    prior = GPTPrior(config).eval().to(arguments.device)
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    precision: Any = arguments.worker.split()[-1]
    if arguments.device != "cpu":
        prior = prior.to(torch.bfloat16)
        precision = precision if precision in ("int8", "fp8") else None
    plain = "plain" in arguments.worker
    engine = PlainEngine(prior) if plain else make_engine(prior, precision)
    if isinstance(engine, PlainEngine) and not plain:
        raise SystemExit("there is no engine here; see the line above")
    sampling, prefix = Sampling(guidance_scale=arguments.guidance), prior.null_prefix(1)
    return lambda rows: sample(prior, prefix, range(rows), sampling, engine=engine)


def gpt2(arguments: argparse.Namespace) -> Any:
    """transformers' GPT-2 of the same sizes: it predicts image codes alone, as our head does."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=arguments.codebook, n_positions=arguments.text + arguments.codes, n_embd=arguments.dim,
        n_layer=arguments.depth, n_head=arguments.heads, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval().to(arguments.device)


def transformers_gpt2(arguments: argparse.Namespace, folder: Path) -> Run:
    model, static = gpt2(arguments), "static" in arguments.worker
    if arguments.device != "cpu" or "bfloat16" in arguments.worker:
        model = model.to(torch.bfloat16)
    prompt = torch.randint(1, arguments.codebook, (1, arguments.text), device=arguments.device)

    def run(rows: int) -> object:
        return model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=True, top_k=0, num_return_sequences=rows,
            min_new_tokens=arguments.codes, max_new_tokens=arguments.codes,
            cache_implementation="static" if static else None,
        )  # fmt: skip

    return run


def ctranslate2_gpt2(arguments: argparse.Namespace, folder: Path) -> Run:
    import ctranslate2
    from ctranslate2.converters.transformers import GPT2Loader

    words = [f"w{i}" for i in range(arguments.codebook)]
    spec = GPT2Loader().get_model_spec(gpt2(arguments))
    spec.register_vocabulary(words)
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = words[0]
    spec.validate()
    spec.optimize(quantization="int8")
    spec.save(str(folder))
    generator = ctranslate2.Generator(
        str(folder), device="cpu", compute_type="int8_float32", intra_threads=arguments.threads
    )
    prompt = [words[1 + i % 7] for i in range(arguments.text)]

    def run(rows: int) -> object:
        results = generator.generate_batch(
            [prompt] * rows, max_batch_size=rows, min_length=arguments.codes, max_length=arguments.codes,
            sampling_topk=0, include_prompt_in_result=False, end_token=[], cache_static_prompt=True,
        )  # fmt: skip
        assert all(len(result.sequences_ids[0]) == arguments.codes for result in results)
        return results

    return run


# Rounds ---------------------------------------------------------------------------------------------------------------


def start(name: str) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", name]
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    worker = subprocess.Popen(command, encoding="utf-8", stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    assert worker.stdout is not None
    if worker.stdout.readline() != "ready\n":
        raise SystemExit(f"{name} did not start")
    return worker


def ask(worker: subprocess.Popen[str], rows: int) -> dict[str, Any]:
    assert worker.stdin is not None and worker.stdout is not None
    print(rows, file=worker.stdin, flush=True)
    return json.loads(worker.stdout.readline())


def measure_machine(device: str, clock: Callable[[], float]) -> tuple[float, float, float]:
    """Bytes read a second, and FLOPs a second of a matrix product in float32 and in bfloat16; best of three. On a GPU
    both are in bfloat16; where a CPU has none, in float32."""

    def best(run: Callable[[], object]) -> float:
        times = []
        for _ in range(4):
            begin = clock()
            run()
            if device != "cpu":
                torch.cuda.synchronize()
            times.append(clock() - begin)
        return min(times[1:])

    long = torch.ones(1 << 26, device=device)
    rates = []
    for dtype in (torch.float32, torch.bfloat16):
        if device != "cpu":
            dtype = torch.bfloat16
        elif not cpu_multiplies_bfloat16():
            dtype = torch.float32
        side = 1024 if device == "cpu" else 8192
        square = torch.ones(side, side, dtype=dtype, device=device)
        rates.append(2 * side**3 / best(lambda: square @ square))  # noqa: B023
    return 4 * len(long) / best(long.sum), rates[0], rates[1]


def floor(arguments: argparse.Namespace, rows: int, width: int, bandwidth: float, rate: float) -> float:
    """Seconds for N images with weights of `width` bytes: what reading or multiplying them takes, the text left out."""
    trunk = 12 * arguments.depth * arguments.dim**2
    head = arguments.codebook * arguments.dim
    depths = (arguments.codebooks - 1) * (4 * arguments.dim**2 + head)
    weights = trunk + head + depths
    rows *= 2 if arguments.guidance != 1 else 1
    return arguments.codes // arguments.codebooks * max(weights * width / bandwidth, 2 * weights * rows / rate)


def report(
    arguments: argparse.Namespace,
    seconds: dict[str, dict[int, list[float]]],
    memory: dict[str, int],
    machine: list[tuple[float, float, float]],
) -> None:
    bandwidth, rate, rate_bfloat16 = (statistics.median(column) for column in zip(*machine, strict=True))
    speeds = {
        name: {rows: rows / statistics.median(times) for rows, times in by_rows.items()}
        for name, by_rows in seconds.items()
    }
    widths = {"float32": 4, "bfloat16": 2, "int8": 1, "fp8": 1}
    for name, width in widths.items():
        if any(name in one for one in seconds):
            speeds[f"floor {name}"] = {
                rows: rows / floor(arguments, rows, width, bandwidth, rate if width == 4 else rate_bfloat16)
                for rows in arguments.rows
            }
    print(
        f"{bandwidth / 1e9:.1f} GB/s, {rate / 1e9:.0f} GFLOP/s ({rate_bfloat16 / 1e9:.0f} in bfloat16), "
        f"{arguments.threads} threads, {arguments.clock} time, "
        f"medians; images a second"
    )
    print(f"{'':24}" + "".join(f"{f'N={rows}':>10}" for rows in arguments.rows) + f"{'peak MB':>10}")
    for name, by_rows in speeds.items():
        most = f"{memory[name] / 1e6:10.0f}" if name in memory else ""
        print(f"{name:24}" + "".join(f"{by_rows[rows]:10.3f}" for rows in arguments.rows) + most)
    if arguments.out:
        settings = {key: str(value) for key, value in vars(arguments).items()}
        versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
        found = {
            "settings": settings, "versions": versions, "processor": platform.processor() or platform.machine(),
            "bandwidth": bandwidth, "rate": rate, "rate_bfloat16": rate_bfloat16, "images_per_second": speeds,
            "seconds": seconds, "peak_bytes": memory,
        }  # fmt: skip
        arguments.out.with_suffix(".json").write_text(json.dumps(found, indent=1), encoding="utf-8")
        arguments.out.with_suffix(".svg").write_text(plot(arguments.rows, speeds), encoding="utf-8")


def plot(rows: list[int], speeds: dict[str, dict[int, float]]) -> str:
    """Images a second over N, both logarithmic; floors are dashed."""
    from math import log

    values = [speed for by_rows in speeds.values() for speed in by_rows.values()]
    low, high = log(min(values) / 1.3), log(max(values) * 1.3)
    first, last = log(rows[0]), log(rows[-1] + (len(rows) == 1))

    def at(count: int, speed: float) -> tuple[float, float]:
        return 60 + 480 * (log(count) - first) / (last - first), 380 - 340 * (log(speed) - low) / (high - low)

    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" width="780" height="430" font-family="sans-serif" font-size="13">',
        '<rect width="780" height="430" fill="white"/><text x="60" y="24">images a second over images at once</text>',
    ]
    for count in rows:
        x, _ = at(count, values[0])
        parts.append(f'<line x1="{x:.0f}" y1="40" x2="{x:.0f}" y2="380" stroke="#ddd"/>')
        parts.append(f'<text x="{x:.0f}" y="400" text-anchor="middle">{count}</text>')
    for power in range(-9, 13):
        speed = 10 ** (power / 3)
        if low < log(speed) < high:
            y = at(rows[0], speed)[1]
            parts.append(f'<line x1="60" y1="{y:.0f}" x2="540" y2="{y:.0f}" stroke="#eee"/>')
            parts.append(f'<text x="52" y="{y + 4:.0f}" text-anchor="end">{speed:.2g}</text>')
    for i, (name, by_rows) in enumerate(speeds.items()):
        colour, dash = COLOURS[i % len(COLOURS)], ' stroke-dasharray="5 4"' if name.startswith("floor") else ""
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*pair) for pair in by_rows.items()))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        parts.append(f'<line x1="565" y1="{56 + 22 * i}" x2="595" y2="{56 + 22 * i}" stroke="{colour}"{dash}/>')
        parts.append(f'<text x="602" y="{60 + 22 * i}">{name}</text>')
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    main()
