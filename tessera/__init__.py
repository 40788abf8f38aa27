"""The foundation that the stages stand on, and the front door: `import tessera` gives the public names.

The names below are imported when they are first asked for, so that `import tessera` costs nothing and the foundation
itself never imports a stage. This table is the one place where an import goes up (tests/test_imports.py).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines import TextToImagePipeline as TextToImagePipeline
    from rerank import ClipReranker as ClipReranker
    from stage1_tokenizer import Autoencoder as Autoencoder
    from stage2_prior import Sampling as Sampling
    from stage2_prior import load_prior as load_prior
    from stage2_prior import sample as sample
    from tessera.errors import InputError as InputError
    from tessera.errors import InputWarning as InputWarning
    from tessera.text import TextTokenizer as TextTokenizer

PUBLIC = {
    "Autoencoder": "stage1_tokenizer",
    "ClipReranker": "rerank",
    "InputError": "tessera.errors",
    "InputWarning": "tessera.errors",
    "Sampling": "stage2_prior",
    "TextToImagePipeline": "pipelines",
    "TextTokenizer": "tessera.text",
    "load_prior": "stage2_prior",
    "sample": "stage2_prior",
}

__all__ = [*PUBLIC]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'tessera' has no attribute '{name}'")
    return getattr(import_module(PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *PUBLIC})
