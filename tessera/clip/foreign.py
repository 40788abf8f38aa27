"""What only open_clip knows: public models by name, configs that `CLIP` cannot build, weights under other names.

open_clip is imported late, because that takes seconds. A public model whose config `CLIP` knows becomes a `CLIP`.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tessera.clip.model import CLIP, CLIPConfig, Pretrained
from tessera.errors import InputError, nearest, reason
from tessera.paths import expand, is_file
from tessera.weights.choice import choosing
from tessera.weights.folder import Unfilled, hub_at_once
from tessera.weights.foreign import read_tensors

T = TypeVar("T")


def named_clip(name: str, weights: str | None) -> Pretrained:
    """A model of open_clip's list with `weights`, one of its tags or a local file, or a CLIP on the hub, in eval mode.

    Raises InputError: unknown name or tag; weights that are not this model's; what cannot be downloaded.
    """
    import open_clip

    models, cleaned = open_clip.list_models(), name.replace("/", "-")  # open_clip takes ViT-B/32 for ViT-B-32
    if cleaned not in models:
        hub_name = name.removeprefix("hf-hub:")
        if weights is None and len(hub_name.split("/")) == 2 and not name.startswith((".", "~", "/")):
            return _public(f"hf-hub:{hub_name}", f"the hub's '{name}'", require_pretrained=True)
        hint = nearest(name, models)
        hint = hint if hint.startswith(",") else "; open_clip.list_models() names them all"
        raise InputError(f"'{name}' is neither a folder nor a model name of open_clip{hint}")
    tags = open_clip.list_pretrained_tags_by_model(cleaned)
    if weights is None:
        raise InputError(f"open_clip's {name} needs weights: a file, or one of the tags {', '.join(tags) or '(none)'}")
    if weights in tags:
        return _tagged(name, cleaned, weights)
    if not is_file(expand(weights)):
        raise InputError(f"'{weights}' is neither a file nor a tag of open_clip's {name}{nearest(weights, tags)}")
    clip = _public(cleaned, name, load_weights=False, pretrained_text=False)
    fill(clip.model, expand(weights))
    return clip


def build_local(folder: Path, what: str) -> tuple[nn.Module, dict[str, Any]]:
    """The untrained model of the config in `folder`, as open_clip builds it, and that config, complete."""
    model, model_cfg = _build(f"local-dir:{folder}", what, load_weights=False, pretrained_text=False)
    return model, {"model_cfg": model_cfg, "preprocess_cfg": model.visual.preprocess_cfg}


def tokenizer(source: str, what: str, network: bool = False) -> Any:
    """open_clip's tokenizer of a model name, `local-dir:` or `hf-hub:`."""
    import open_clip

    return _from_open_clip(what, network, lambda: open_clip.get_tokenizer(source))


def fill(model: nn.Module, path: Path) -> None:
    """Loads the file's weights strictly, without the prefixes that wrappers of modules add to their names.

    Raises InputError unless it holds exactly this model's, all of them finite.
    """
    try:
        if path.suffix in (".npz", ".npy"):
            from open_clip.factory import load_checkpoint

            load_checkpoint(model, str(path), strict=True, weights_only=True)
        else:
            with choosing("model"):
                state = read_tensors([path])
            if _shapes(state) != _shapes(model.state_dict()):
                state = _converted(model, state)
            model.load_state_dict(state, strict=True)
        broken = [name for name, tensor in model.state_dict().items() if not bool(torch.isfinite(tensor).all())]
        if broken:
            raise ValueError(f"{broken[0]} is not finite")
    except InputError as error:  # of another kind, cut off, ...
        raise InputError(f"the weights are not this model's: {error}") from error
    except Exception as error:  # missing or foreign names, other shapes
        raise InputError(f"the weights in {path} are not this model's: {reason(error)}; restore the file") from error


def _shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}


def _converted(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What open_clip does with a file's tensors before it loads them, except resizing what has another size."""
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict

    state, wanted = convert_state_dict(model, state), model.state_dict()
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    if (positions := "text.transformer.embeddings.position_ids") not in wanted:  # of older releases of transformers
        state.pop(positions, None)
    for name in ("logit_scale", "logit_bias"):  # a number, with or without an axis
        if name in state and name in wanted and state[name].numel() == 1:
            state[name] = state[name].reshape(wanted[name].shape)
    if "logit_scale" in state and "logit_bias" in wanted:  # a model from before SigLIP's loss
        state.setdefault("logit_bias", torch.zeros_like(wanted["logit_bias"]))
    return state


# open_clip ------------------------------------------------------------------------------------------------------------


def _tagged(name: str, cleaned: str, tag: str) -> Pretrained:
    """Downloaded weights that open_clip knows, with the activation that they were trained with."""
    import open_clip

    trained = bool(open_clip.get_pretrained_cfg(cleaned, tag).get("quick_gelu", False))
    built = bool(open_clip.get_model_config(cleaned).get("quick_gelu", False))
    if built and not trained:
        raise InputError(
            f"{tag} was not trained with QuickGELU, but {name} uses it; give {name.removesuffix('-quickgelu')}"
        )
    return _public(
        cleaned, f"{name} with {tag}", pretrained=tag, require_pretrained=True, force_quick_gelu=trained and not built
    )


def _public(source: str, what: str, **arguments: Any) -> Pretrained:
    network = source.startswith("hf-hub:") or "pretrained" in arguments
    model, model_cfg = _build(source, what, network, **arguments)
    config = {"model_cfg": model_cfg, "preprocess_cfg": model.visual.preprocess_cfg}
    known = CLIPConfig.known(model_cfg)
    if known is not None:
        with Unfilled():
            clip = CLIP(known)
        clip.load_state_dict(model.state_dict(), assign=True)
        model = clip
    return Pretrained(model.eval(), tokenizer(source, what, network), config)


def _build(source: str, what: str, network: bool = False, **arguments: Any) -> tuple[Any, dict[str, Any]]:
    """The model that open_clip makes of `source`, and its model_cfg."""
    import open_clip

    def build() -> tuple[Any, dict[str, Any]]:
        return open_clip.create_model(source, **arguments), open_clip.get_model_config(source)

    with _quiet_about_random_weights():
        model, model_cfg = _from_open_clip(what, network, build)
    if arguments.get("force_quick_gelu"):
        model_cfg["quick_gelu"] = True
    return model, model_cfg


def _from_open_clip(what: str, network: bool, make: Callable[[], T]) -> T:
    """`make()`; whatever it raises becomes one sentence about `what`."""
    try:
        with hub_at_once() if network else nullcontext():
            return make()
    except InputError:
        raise
    except Exception as error:  # open_clip, torch, the hub and json each raise their own kinds here
        if network:
            raise InputError(
                f"open_clip cannot get {what}; check the name and the network, or give local weights"
            ) from error
        raise InputError(f"open_clip cannot load {what}: {reason(error)}") from error


@contextmanager
def _quiet_about_random_weights() -> Iterator[None]:
    """Drops open_clip's two lines on the root logger about starting without weights, and no others."""
    expected = ("No pretrained weights loaded", "Local config loaded, but no CLIP weights found")

    def unexpected(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(expected)

    root, silent = logging.getLogger(), logging.NullHandler()
    root.addFilter(unexpected)
    root.addHandler(silent)  # without a handler, the first line logged on the root logger would configure logging
    try:
        yield
    finally:
        root.removeHandler(silent)
        root.removeFilter(unexpected)
