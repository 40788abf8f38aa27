"""The sampling engines: the prior's own numbers, and rows that do not depend on the rows beside them."""

import gc
import logging
import math
import re
import weakref

import pytest
import torch

from pipelines import TextToImagePipeline
from pipelines.bundle import Bundle
from stage2_prior import GPTConfig, GPTPrior, Sampling, sample
from stage2_prior.sampling import PlainEngine, Sampler, cpu, kernels, make_engine, selection
from stage2_prior.sampling.cpu import CPUEngine
from stage2_prior.sampling.gpu import GPUEngine
from stage2_prior.sampling.jacobi import sample_speculatively
from stage2_prior.sampling.prune import Plan, sample_pruned
from stage2_prior.sampling.quantized import FP8, Int8, without_fp8
from stage2_prior.sampling.selection import unsupported
from tessera.errors import InputError
from tessera.native import build as native


@pytest.fixture(autouse=True, scope="module")
def compiler():
    try:
        kernels.load()
    except native.Unavailable as reason:
        pytest.skip(str(reason))


def make_prior(code_shape=(1, 3, 4), **changes) -> GPTPrior:
    torch.manual_seed(0)
    fields = dict(codebook_size=37, text_vocab_size=50, text_length=21, dim=40, depth=3, num_heads=2)
    prior = GPTPrior(GPTConfig(code_shape=code_shape, **{**fields, **changes}))
    for parameter in prior.parameters():  # blocks start as the identity; these are to do something
        torch.nn.init.normal_(parameter, std=0.3)
    return prior.eval()


@pytest.fixture(scope="module", params=[(1, 3, 4), (3, 3, 3)], ids=["one codebook", "three codebooks"])
def prior(request) -> GPTPrior:
    return make_prior(request.param)


def stepped(engine, prefix, codes, rows=None):
    """The logits (N, T, K) of all codes (N, T), one step after the other; row i reads prefix `rows[i]`."""
    logits, cache = engine.prefill(prefix, codes.shape[1] - 1)
    if rows is not None:
        logits, cache = logits[rows], cache.repeat(rows)
    steps = [logits]
    for t in range(codes.shape[1] - 1):
        steps.append(engine.step(codes[:, t], cache))
    return torch.stack(steps, 1)


def inputs(prior, rows):
    prefix = torch.randint(0, prior.config.text_vocab_size, (rows, prior.prefix_length))
    return prefix, torch.randint(0, prior.codebook_size, (rows, prior.length))


either = pytest.mark.parametrize(
    "make",
    [lambda prior: CPUEngine(prior, "float32"), lambda prior: GPUEngine(prior, "float32")],
    ids=["kernels", "torch"],
)


@either
@torch.no_grad()
def test_the_engine_gives_the_priors_logits(prior, make):
    prefix, codes = inputs(prior, 4)
    torch.testing.assert_close(stepped(make(prior), prefix, codes), prior(prefix, codes), rtol=0, atol=2e-5)


@either
@pytest.mark.parametrize("of", [[0] * 5, [0, 0, 1, 1, 2, 2], [0, 1, 1, 2, 2, 2, 2, 0], [2, 2, 0, 0]])
@torch.no_grad()
def test_rows_read_their_own_prefix(prior, make, of):
    prefix, _ = inputs(prior, 3)
    rows = torch.tensor(of)
    codes = torch.randint(0, prior.codebook_size, (len(of), prior.length))
    torch.testing.assert_close(stepped(make(prior), prefix, codes, rows), prior(prefix[rows], codes), rtol=0, atol=2e-5)


@either
@torch.no_grad()
def test_rows_can_be_dropped_part_way(prior, make):
    prefix, codes = inputs(prior, 1)[0], inputs(prior, 6)[1]
    kept, half = torch.tensor([4, 1, 2]), prior.length // 2
    engine = make(prior)
    logits, cache = engine.prefill(prefix, prior.length - 1)
    cache = cache.repeat(torch.zeros(6, dtype=torch.int64))
    for t in range(half):
        engine.step(codes[:, t], cache)
    cache = cache.repeat(kept)
    rest = torch.stack([engine.step(codes[kept, t], cache) for t in range(half, prior.length - 1)], 1)
    expected = prior(prefix.expand(3, -1), codes[kept])[:, half + 1 :]
    torch.testing.assert_close(rest, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
@torch.no_grad()
def test_a_row_is_bit_for_bit_the_same_in_any_company_on_any_number_of_threads(prior, precision):
    engine = CPUEngine(prior, precision)
    prefix, codes = inputs(prior, 2)[0], inputs(prior, 19)[1]
    rows = torch.tensor([0] * 7 + [1] * 12)
    together = stepped(engine, prefix, codes, rows)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        for few in ([0], [18], [5, 6, 7], [1, 2, 3, 4], [18, 0, 9, 8, 3]):
            assert torch.equal(stepped(engine, prefix, codes[few], rows[few]), together[few])
            assert torch.equal(stepped(engine, prefix[rows[few]], codes[few]), together[few])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("precision", "error"), [("bfloat16", 0.02), ("int8", 0.05)])
@torch.no_grad()
def test_smaller_weights_give_nearly_the_same_logits(prior, precision, error):
    prefix, codes = inputs(prior, 4)
    exact = prior(prefix, codes)
    wrong = (stepped(CPUEngine(prior, precision), prefix, codes) - exact).norm() / exact.norm()
    assert 0 < wrong < error


@pytest.mark.parametrize("width", [30, 31, 5000])
@torch.no_grad()
def test_int8_is_the_product_of_rounded_rows_and_weights(width):
    weight, x = torch.randn(45, width), torch.randn(7, width)
    packed, norm = kernels.Packed(weight, "int8"), torch.ones(width)
    scale = weight.abs().amax(1, keepdim=True) / 127
    rounded = (weight / scale).round() * scale
    assert (rounded - weight).abs().max() <= scale.max() / 2 * 1.001
    normed, y = torch.empty_like(x), torch.empty(7, 45)
    kernels.load().norm_and_product(
        x.data_ptr(), 7, norm.data_ptr(), kernels.ctypes.byref(packed.matrix), normed.data_ptr(), y.data_ptr(), 1
    )
    torch.testing.assert_close(normed, torch.nn.functional.rms_norm(x, (width,), eps=1e-6), rtol=1e-5, atol=1e-6)
    step = normed.double().abs().amax(1, keepdim=True) / min(4095, (2**31 - 1) // (127 * width))
    expected = (normed / step).round() * step @ rounded.double().T
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4 * width**0.5)
    torch.testing.assert_close(y, normed @ weight.T, rtol=0, atol=0.05 * width**0.5)


@pytest.mark.parametrize("guidance_scale", [1, 2])
def test_sampling_with_an_engine_gives_what_the_plain_path_gives(prior, guidance_scale):
    prefix, _ = inputs(prior, 2)
    sampling = Sampling(guidance_scale=guidance_scale)
    plain = sample(prior, prefix, range(8), sampling, engine=PlainEngine(prior))
    engine = make_engine(prior)
    assert isinstance(engine, CPUEngine)
    assert torch.equal(sample(prior, prefix, range(8), sampling, engine=engine), plain)
    assert torch.equal(sample(prior, prefix, range(8), sampling), plain)  # with an engine of the call
    assert torch.equal(sample(prior, prefix, range(8), sampling, engine=engine), plain)  # it is as it was


def add_to_qkv(prior):
    """What a LoRA does: an addition to a matrix, in place."""
    with torch.no_grad():
        weight = prior.decoder.blocks[1].attention.qkv.weight
        weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))


def kinds(prior):
    return [make_engine(prior), make_engine(prior, "int8"), GPUEngine(prior, "float32"), PlainEngine(prior)]


def test_weights_that_changed_are_refused_until_the_engine_is_told():
    """Not sampled with as they were, and not half of them: prefix and steps may read them in different places."""
    prior = make_prior()
    prefix, _ = inputs(prior, 1)
    engines = kinds(prior)
    before = [sample(prior, prefix, range(6), engine=engine) for engine in engines]
    add_to_qkv(prior)
    for engine in engines[:-1]:
        for run in (sample, sample_speculatively):
            with pytest.raises(InputError, match=r"weights have changed .* call the engine's refresh"):
                run(prior, prefix, range(6), engine=engine)
        engine.refresh()
    for engine, fresh, old in zip(engines, kinds(prior), before, strict=True):
        new = sample(prior, prefix, range(6), engine=engine)
        assert torch.equal(new, sample(prior, prefix, range(6), engine=fresh)) and not torch.equal(new, old)


def test_images_that_an_engine_has_begun_are_finished_with_the_weights_of_before():
    prior = make_prior()
    prefix, _ = inputs(prior, 1)
    before = sample(prior, prefix, range(6))
    sampler = Sampler(prior, prefix, range(6), engine=make_engine(prior))
    sampler.advance(5)
    add_to_qkv(prior)
    sampler.advance(prior.length)
    assert torch.equal(sampler.codes, before)


def test_an_engine_is_of_one_prior():
    prior, other = make_prior(), make_prior()
    for engine in kinds(other):
        with pytest.raises(InputError, match="made for another prior"):
            sample(prior, inputs(prior, 1)[0], range(2), engine=engine)


def test_engines_of_one_prior_know_nothing_of_each_other():
    prior = make_prior(dim=80, depth=4)
    prefix, _ = inputs(prior, 1)
    exact, rounded = make_engine(prior), make_engine(prior, "int8")
    assert (exact.precision, rounded.precision) == ("float32", "int8")
    logits = [engine.prefill(prefix, 1)[0] for engine in (exact, rounded, exact)]
    assert torch.equal(logits[0], logits[2]) and not torch.equal(logits[0], logits[1])
    codes = sample(prior, prefix, range(4), engine=exact)
    sample(prior, prefix, range(4), engine=rounded)
    assert torch.equal(sample(prior, prefix, range(4), engine=exact), codes)


def test_precision_is_chosen_and_refused():
    prior = make_prior()
    assert make_engine(prior).precision == "float32"
    assert make_engine(prior, "int8").precision == "int8"
    with pytest.raises(InputError, match="one of float32, bfloat16, int8, fp8, got 'int4'"):
        make_engine(prior, "int4")
    with pytest.raises(
        InputError, match="cannot be kept in fp8: it is on a CPU, whose engine knows float32, bfloat16, int8"
    ):
        make_engine(prior, "fp8")
    assert make_engine(make_prior().to(torch.bfloat16)).precision == "bfloat16"


class Doubled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_what_the_engine_cannot_do_takes_the_plain_path_and_says_why(caplog):
    prior = make_prior()
    prior.decoder.blocks[0].mlp_in = Doubled(40, 160, bias=False)
    engine = make_engine(prior)
    assert isinstance(engine, PlainEngine) and engine.precision is None
    reason = "the engine does not know the prior's decoder.blocks.0.mlp_in (Doubled)"
    assert engine.reason == reason
    line = f"sampling takes the plain path, which is slower: {reason}"
    assert caplog.record_tuples == [("stage2_prior", logging.WARNING, line)]

    training = make_prior(dropout=0.1).train()
    assert "training mode" in unsupported(training)
    assert unsupported(training.eval()) == ""


@pytest.mark.parametrize("factor", [1.5, math.nan])
def test_an_engine_that_is_wrong_is_not_used(monkeypatch, caplog, factor):
    original = CPUEngine.step
    monkeypatch.setattr(CPUEngine, "step", lambda self, codes, cache: original(self, codes, cache) * factor)
    assert isinstance(make_engine(make_prior()), PlainEngine)
    assert "differ from the engine's" in caplog.text


def test_without_a_compiler_it_works_and_says_why(monkeypatch, tmp_path, caplog):
    prior = make_prior()
    prefix, _ = inputs(prior, 1)
    fast = sample(prior, prefix, range(3))
    for compiler, complaint in ((str(tmp_path / "none"), "could not be built"), ("false", "cannot build")):
        forget_the_library()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setenv("CXX", compiler)
        assert torch.equal(sample(prior, prefix, range(3)), fast)
        assert complaint in caplog.text
        caplog.clear()
    forget_the_library()


def forget_the_library():
    kernels.load.cache_clear()
    native._library.cache_clear()


def test_an_engine_that_is_dropped_frees_its_weights_and_its_prior():
    prior = make_prior()
    prefix, _ = inputs(prior, 1)
    for precision in ("float32", "int8"):
        engine = make_engine(prior, precision)
        sample(prior, prefix, range(2), engine=engine)
        held = weakref.ref(engine.weights)
        del engine
        assert held() is None
    held = weakref.ref(prior)
    del prior
    gc.collect()  # modules have cycles of their own
    assert held() is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@torch.no_grad()
def test_graphs_give_the_priors_logits_on_a_gpu():
    prior = make_prior((2, 10, 10)).cuda()  # beyond one bucket
    prefix, codes = (one.cuda() for one in inputs(prior, 6))
    rows = torch.arange(6, device="cuda")
    logits = stepped(GPUEngine(prior, "float32"), prefix, codes, rows)
    torch.testing.assert_close(logits, prior(prefix, codes), rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_weights_of_8_bits_are_drawn_with_on_a_gpu(precision):
    prior = make_prior((1, 10, 10), dim=64).cuda().to(torch.bfloat16)
    if precision == "fp8" and without_fp8():
        pytest.skip(without_fp8())
    engine = make_engine(prior, precision)
    assert isinstance(engine, GPUEngine)  # it agreed with the prior
    assert sample(prior, prior.null_prefix(1), range(20), engine=engine).shape == (20, 100)


def fp8_runs_here() -> bool:
    try:
        FP8(torch.randn(16, 16))(torch.ones(1, 16))
    except (InputError, NotImplementedError, RuntimeError):
        return False
    return True


needs_fp8 = pytest.mark.skipif(not fp8_runs_here(), reason="this torch does not multiply in fp8 on a CPU")


def test_a_torch_that_does_not_multiply_in_fp8_is_named(monkeypatch):
    monkeypatch.delattr(torch.nn.functional, "scaled_mm", raising=False)  # as in torch 2.6 to 2.9
    sentence = rf"torch {re.escape(torch.__version__)} does not multiply in it; take int8, or torch 2.10 or newer"
    with pytest.raises(InputError, match=f"weights cannot be kept in fp8: {sentence}"):
        FP8(torch.randn(16, 16))
    beyond_a_cpu = make_prior().to("meta")
    assert re.fullmatch(sentence, selection._unavailable(beyond_a_cpu, "fp8"))
    assert not selection._unavailable(make_prior(dim=64).to("meta"), "int8")


@pytest.mark.parametrize(("precision", "levels"), [("int8", 127), pytest.param("fp8", 8, marks=needs_fp8)])
def test_products_of_8_bits_are_those_of_the_rounded_numbers(precision, levels):
    """Against a product in float64 of what int8 and e4m3 can say: here 127 equal steps, or 8 to each factor of two."""
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(48, 32, bias=False), torch.randn(5, 48)
    x[2] = 0.0
    x[:, 7] *= 50.0

    def rounded(values):
        scale = values.abs().amax(1, keepdim=True).double().clamp_min(1e-12) / (127 if precision == "int8" else 448)
        units = values.double() / scale
        step = 1.0 if precision == "int8" else 2.0 ** units.abs().clamp_min(2.0**-6).log2().floor() / levels
        return (units / step).round() * step * scale

    product = {"int8": Int8, "fp8": FP8}[precision](layer.weight)
    expected = rounded(x) @ rounded(layer.weight.detach()).T
    error = (product(x) - expected).abs().max() / expected.abs().max()
    assert error < (1e-5 if precision == "int8" else 8e-3)  # fp8 products come in bfloat16
    assert (product(x)[2] == 0).all()
    plain = layer(x).detach()
    assert 1e-4 < (product(x) - plain).norm() / plain.norm() < (0.02 if precision == "int8" else 0.05)


@pytest.mark.parametrize("precision", ["int8", pytest.param("fp8", marks=needs_fp8)])
@torch.no_grad()
def test_steps_with_weights_of_8_bits_are_near_the_priors(precision):
    prior = make_prior()
    prefix, codes = inputs(prior, 4)
    steps, whole = stepped(GPUEngine(prior, precision), prefix, codes), prior(prefix, codes)
    torch.testing.assert_close(steps[:, 0], whole[:, 0], rtol=0, atol=2e-5)  # the prefix is read with whole weights
    error = (steps - whole).norm() / whole.norm()
    assert 1e-5 < error < 0.1


def test_a_precision_is_refused_where_no_engine_keeps_weights_in_it():
    with pytest.raises(InputError, match="cannot be kept in int8: there is no engine for priors with positions"):
        make_engine(make_prior(positions="rotary"), "int8")
    assert isinstance(make_engine(make_prior(positions="rotary")), PlainEngine)


def leave_room_for_three(monkeypatch):
    """Images, of which guidance makes six rows; more is out of memory."""
    original = cpu.KeysAndValues.allocate

    def allocate(depth, rows, *rest):
        if rows > 6:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes")
        return original(depth, rows, *rest)

    monkeypatch.setattr(cpu.KeysAndValues, "allocate", allocate)


@pytest.mark.parametrize("prefixes", [1, 3])
def test_what_does_not_fit_in_memory_is_sampled_in_parts(monkeypatch, caplog, prefixes):
    prior = make_prior()
    prefix, _ = inputs(prior, prefixes)
    sampling, null = Sampling(guidance_scale=2), inputs(prior, prefixes)[0]
    whole = sample(prior, prefix, range(9), sampling, null=null)
    leave_room_for_three(monkeypatch)
    assert torch.equal(sample(prior, prefix, range(9), sampling, null=null), whole)
    assert (
        caplog.messages[0]
        == f"9 images at once do not fit in memory; sampling {'4 at once' if prefixes == 1 else '3 and 6'}"
    )


@pytest.mark.parametrize("prefixes", [1, 3])
def test_what_does_not_fit_in_memory_is_pruned_in_smaller_batches(monkeypatch, caplog, prefixes):
    prior = make_prior()
    prefix, _ = inputs(prior, prefixes)
    sampling, plan = Sampling(guidance_scale=2), Plan(position=4, survivors=2)
    whole = sample_pruned(prior, prefix, range(12), plan, sampling)
    leave_room_for_three(monkeypatch)
    found = sample_pruned(prior, prefix, range(12), plan, sampling)
    assert torch.equal(found.chosen, whole.chosen)
    for one, other in zip(found.sampled, whole.sampled, strict=True):
        torch.testing.assert_close(one, other)
    assert (
        caplog.messages[0]
        == f"12 images at once do not fit in memory; sampling {'6 at once' if prefixes == 1 else '4 and 8'}"
    )


@pytest.mark.parametrize("error", [MemoryError("none left"), RuntimeError("something else")])
def test_one_image_that_does_not_fit_and_other_errors_are_raised(monkeypatch, caplog, error):
    def step(*_):
        raise error

    prior = make_prior()
    engine = make_engine(prior)
    monkeypatch.setattr(CPUEngine, "step", step)
    with pytest.raises(type(error), match=str(error)):
        sample(prior, inputs(prior, 1)[0], range(2), engine=engine)
    assert ("sampling 1 at once" in caplog.text) == isinstance(error, MemoryError)


def test_a_gpu_keeps_8_bits_of_widths_that_are_multiples_of_16():
    """Asked of priors on torch's meta device, which are not on a CPU and need no GPU."""
    for dim, mlp_ratio, fits in ((48, 2.0, True), (40, 2.0, False), (48, 2.25, False), (32, 1.5, True)):
        prior = make_prior(dim=dim, mlp_ratio=mlp_ratio).to("meta")
        assert (selection._unavailable(prior, "int8") == "") == fits
    assert selection._unavailable(prior, "bfloat16") == "it is on a GPU; load it with the dtype you want"
    assert selection._unavailable(make_prior(), "fp8") == "it is on a CPU, whose engine knows float32, bfloat16, int8"


class World:
    """Where a step takes as long as its threads say, by a clock of its own."""

    def __init__(self, seconds):
        self.seconds, self.now, self.asked = seconds, 0.0, []

    def perf_counter(self):
        return self.now

    def step(self, threads):
        self.asked.append(threads)
        self.now += self.seconds[threads]


@pytest.mark.parametrize("fastest", [1, 2, 4, 8])
def test_the_fastest_number_of_threads_is_found_and_found_again(fastest, monkeypatch):
    def seconds(best):
        return {threads: 1 + abs(math.log2(threads / best)) for threads in (1, 2, 4, 8)}

    world, pace = World(seconds(fastest)), cpu.Pace()
    monkeypatch.setattr(cpu, "time", world)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    for _ in range(400):
        pace.run(world.step)
    assert pace.threads == fastest and world.asked[:2] == [8, 8]
    late = world.asked[-200:]
    assert 0 < 200 - late.count(fastest) < 8  # tries others now and then
    world.seconds = seconds(16 // fastest / 2)  # the other end
    for _ in range(800):
        pace.run(world.step)
    assert pace.threads == 16 // fastest // 2


def test_what_a_step_takes_of_late(monkeypatch):
    """Each step counts for 0.3, the mean of all before for 0.7; a single thread has nothing to try."""
    world, pace, expected = World({1: 2.0}), cpu.Pace(), 2.0
    monkeypatch.setattr(cpu, "time", world)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    pace.run(world.step)
    for took in (1.0, 4.0, 3.0, 3.0):
        world.seconds = {1: took}
        pace.run(world.step)
        expected = 0.7 * expected + 0.3 * took
        assert pace.usual == pytest.approx(expected) and pace.threads == 1


def test_a_trial_is_kept_when_it_takes_a_tenth_less(monkeypatch):
    for share, kept in ((0.89, 4), (0.91, 8)):
        world, pace = World({8: 1.0, 4: share, 2: 5.0}), cpu.Pace()
        monkeypatch.setattr(cpu, "time", world)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
        for _ in range(3):
            pace.run(world.step)
        assert world.asked == [8, 8, 4] and pace.threads == kept


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_prior_with_hooks_has_no_engine(kind):
    prior = make_prior()
    assert unsupported(prior) == ""
    hook = getattr(prior.decoder.blocks[1].mlp_in, kind)(lambda *arguments: None)
    assert "does not know the prior's decoder.blocks.1.mlp_in (Linear)" in unsupported(prior)
    hook.remove()
    assert unsupported(prior) == ""


# The engine of a pipeline ---------------------------------------------------------------------------------------------


def codes_of(pipeline):
    return pipeline("a red heart", num_candidates=3, num_images_per_prompt=3, rerank=False).codes


def test_pipelines_of_one_prior_have_precisions_of_their_own(tiny_pipeline):
    """The precision was the prior's once, so that what one pipeline chose, another sampled with."""
    bundle = Bundle(tiny_pipeline.image_tokenizer, tiny_pipeline.prior)
    exact, rounded = TextToImagePipeline(bundle), TextToImagePipeline(bundle)
    codes = codes_of(exact)
    rounded.precision = "int8"
    codes_of(rounded)
    assert (exact.precision, exact.engine.precision) == (None, "float32")
    assert (rounded.precision, rounded.engine.precision) == ("int8", "int8")
    assert torch.equal(codes_of(exact), codes)
    with pytest.raises(InputError, match="cannot be kept in fp8: it is on a CPU"):
        rounded.precision = "fp8"
    assert rounded.engine.precision == "int8"


def test_a_pipeline_keeps_its_engine_and_makes_none_before_it_samples(tiny_pipeline, monkeypatch):
    engines = []

    def make(*arguments):
        engines.append(make_engine(*arguments))
        return engines[-1]

    monkeypatch.setattr("pipelines.text_to_image.make_engine", make)
    pipeline = TextToImagePipeline(Bundle(tiny_pipeline.image_tokenizer, tiny_pipeline.prior))
    pipeline.precision = "bfloat16"
    assert not engines
    codes_of(pipeline)
    codes_of(pipeline)
    assert engines == [pipeline.engine]
    held = weakref.ref(pipeline.engine.weights)
    engines.clear()
    del pipeline
    assert held() is None
