"""Drawing codes from a prior, apart from the priors themselves."""

from stage2_prior.sampling.engine import set_precision
from stage2_prior.sampling.jacobi import sample_speculatively
from stage2_prior.sampling.prune import plan_pruning, sample_pruned
from stage2_prior.sampling.sample import Drawing, Sampled, sample, sample_scored
from stage2_prior.sampling.settings import Sampling

__all__ = [
    "Drawing",
    "Sampled",
    "Sampling",
    "plan_pruning",
    "sample",
    "sample_pruned",
    "sample_scored",
    "sample_speculatively",
    "set_precision",
]
