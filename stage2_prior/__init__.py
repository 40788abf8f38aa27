"""Stage 2: condition -> codes."""

from stage2_prior.base import flatten_codes, unflatten_codes
from stage2_prior.gpt import GPTConfig, GPTPrior
from stage2_prior.infill import infill
from stage2_prior.load import load_prior
from stage2_prior.sampling import Sampling, sample

__all__ = ["GPTConfig", "GPTPrior", "Sampling", "flatten_codes", "infill", "load_prior", "sample", "unflatten_codes"]
