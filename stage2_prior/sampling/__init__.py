"""Drawing codes from a prior, apart from the priors themselves."""

from stage2_prior.sampling.engine import set_precision
from stage2_prior.sampling.jacobi import sample_speculatively
from stage2_prior.sampling.sample import sample
from stage2_prior.sampling.settings import Sampling

__all__ = ["Sampling", "sample", "sample_speculatively", "set_precision"]
