"""Sampling codes from a prior, apart from the priors themselves."""

from stage2_prior.sampling.engine import Engine, PlainEngine
from stage2_prior.sampling.jacobi import sample_speculatively
from stage2_prior.sampling.prune import plan_pruning, sample_pruned
from stage2_prior.sampling.sample import Sampled, Sampler, sample, sample_scored
from stage2_prior.sampling.selection import make_engine
from stage2_prior.sampling.settings import Sampling

__all__ = [
    "Engine",
    "PlainEngine",
    "Sampled",
    "Sampler",
    "Sampling",
    "make_engine",
    "plan_pruning",
    "sample",
    "sample_pruned",
    "sample_scored",
    "sample_speculatively",
]
