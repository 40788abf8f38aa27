"""Prompt -> ranked images: the pipeline, bundles of trained parts, evaluation and the command line.

`from pipelines import TextToImagePipeline` loads torch at that moment; `import pipelines` alone costs nothing, so that
`tessera --help` answers at once.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.text_to_image import TextToImagePipeline

__all__ = ["TextToImagePipeline"]


def __getattr__(name: str) -> Any:
    if name == "TextToImagePipeline":
        from pipelines.text_to_image import TextToImagePipeline

        return TextToImagePipeline
    raise AttributeError(f"module 'pipelines' has no attribute '{name}'")
