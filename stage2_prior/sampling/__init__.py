"""Drawing codes from a prior, apart from the priors themselves."""

from stage2_prior.sampling.sample import sample
from stage2_prior.sampling.settings import Sampling

__all__ = ["Sampling", "sample"]
