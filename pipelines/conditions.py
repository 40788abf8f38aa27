"""The prompts that a user writes in Python in place of a text: a class label, a segmentation map, no condition."""

from pipelines.request import ClassLabel, NoPrompt, SegmentationMap, TextPrompt

__all__ = ["ClassLabel", "NoPrompt", "SegmentationMap", "TextPrompt"]
