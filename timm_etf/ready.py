"""Models to train: weights that are there, to start from and to learn from, and the same model on every process."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from timm.models import load_state_dict
from torch import Tensor, nn

from timm_etf.classifier import classifier_names, fix_classifier, fixed_classifiers
from timm_etf.errors import UsageError, first_line
from timm_etf.frames import codes
from timm_etf.growing import own_class_names
from timm_etf.hub.load import create_model
from timm_etf.processes import processes

T = TypeVar("T")


class Start:
    """Weights that a run starts from.

    Args:
        weights: A timm name (resnet50.a1_in1k), a folder (local-dir:FOLDER), a repository (hf-hub:ORG/NAME) or a file
            of weights.
        in_chans: Image channels; timm adapts the first convolution to them. By default those of the weights.
        img_size: Image side in pixels, if positions have to be adapted to it.

    Raises:
        UsageError: If there are no such weights.
    """

    model: nn.Module | None = None
    """The model that they are of, in evaluation mode; None for a file, which does not tell."""

    def __init__(self, weights: str, in_chans: int | None = None, img_size: int | None = None) -> None:
        self.weights = weights
        if not Path(weights).is_file():
            self.model = ready_model(weights, in_chans, img_size)
            self.tensors: dict[str, Tensor] = self.model.state_dict()
            return
        try:
            self.tensors = load_state_dict(weights)
        except Exception as e:  # pickle, safetensors and torch each have their own kinds
            raise UsageError(f"Cannot start from {weights} ({first_line(e).rstrip('.')}): get it again.") from e

    @property
    def class_names(self) -> list[str]:
        """Names of the classes in the order of the classifier's rows, reserved ones left out; empty if not known."""
        return own_class_names(self.model) if self.model else []

    def data_config(self, in_chans: int) -> dict[str, Any]:
        """How the weights want their images of `in_chans` channels, as far as it is known."""
        cfg: Any = getattr(self.model, "pretrained_cfg", {})
        found = {k: cfg[k] for k in ("mean", "std", "interpolation", "crop_pct", "crop_mode") if cfg.get(k) is not None}
        for k in {"mean", "std"} & found.keys():
            found[k] = same_for_all(found[k], in_chans)
        return found

    def give(self, model: nn.Module, *, classifier: bool) -> None:
        """Give a model of the same architecture these weights; its own classifier stays as it is unless `classifier`.

        Raises:
            UsageError: If they are another architecture's, or of other classes.
        """
        heads = tuple(f"{name}." for name in classifier_names(model))

        def shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
            return {k: tuple(t.shape) for k, t in tensors.items() if classifier or not k.startswith(heads)}

        ours, theirs = shapes(model.state_dict()), shapes(self.tensors)
        if ours != theirs:
            key = next(k for k in [*ours, *theirs] if ours.get(k) != theirs.get(k))
            fix = "--init needs the same architecture and arguments"
            if key.startswith(heads):
                fix = (
                    "--keep-classifier needs the same classes: --reserve says how many are still to come, and "
                    "timm_etf.grow_classifier adds vectors"
                )
            raise UsageError(
                f"The weights of {self.weights} do not fit: {key} is {theirs.get(key, 'not there')} there and "
                f"{ours.get(key, 'not there')} in this model. {fix}."
            )
        model.load_state_dict({key: self.tensors[key] for key in theirs}, strict=False)

    def fix(self, model: nn.Module, **options: Any) -> nn.Module:
        """Fix the classifier of a model that was given it: as it was fixed, or to the frame nearest to it.

        Args:
            model: Changed in place.
            options: Of `timm_etf.fix_classifier`. A frame that was there stays under another scale or normalisation.
        """
        there = dict(fixed_classifiers(self.model)) if self.model else {}
        if there and not {"frame", "projector"} & options.keys():
            for name, head in there.items():
                model.set_submodule(name, head.again(**options))
            return model
        fix_classifier(model, **{"frame": "nearest", **options})
        cfg: Any = getattr(self.model, "pretrained_cfg", {})
        for _, head in fixed_classifiers(model):
            if head.origin:
                head.origin |= {"from": self.weights, "license": cfg.get("license")}
        return model


def same_for_all(values: Sequence[float], in_chans: int) -> tuple[float, ...]:
    """Statistics of colour channels for images of another number of channels, such as grey ones: their mean."""
    return tuple(values) if len(values) == in_chans else (sum(values) / len(values),) * in_chans


def ready_model(name: str, in_chans: int | None = None, img_size: int | None = None) -> Any:
    """A trained model by its name, in evaluation mode; arguments as for `Start`.

    Raises:
        UsageError: If there is none.
    """
    changes = {"in_chans": in_chans, "img_size": img_size}
    try:
        return create_model(name, pretrained=True, **{k: v for k, v in changes.items() if v}).eval()
    except Exception as e:  # timm, the Hub's client and torch each have their own kinds
        fix = "check its name" + ("" if "local-dir:" in name else ", or that the Hub can be reached")
        raise UsageError(f"Cannot start from {name} ({first_line(e).rstrip('.')}): {fix}.") from e


def teacher(name: str, in_chans: int, img_size: int | None = None) -> Any:
    """A trained model to learn from; arguments as for `Start`.

    Raises:
        UsageError: If there is none, or it has no classifier.
    """
    model = ready_model(name, in_chans, img_size)
    if getattr(model, "num_classes", 0) < 2:
        raise UsageError(f"{name} has no classifier of two or more classes, so there is nothing to learn from it.")
    return model.requires_grad_(False)


def create_on_all(create: Callable[[], nn.Module], accelerator: Accelerator) -> nn.Module:
    """The main process makes its model first; the others take the spherical code from it, which takes long to compute.

    Raises:
        UsageError: On every process, if the main one cannot make it.
    """
    if accelerator.num_processes == 1:
        return create()
    model: nn.Module | None = None

    def codes_of_model() -> dict[Any, bytes | None]:
        nonlocal model
        model = create()
        heads = [head for _, head in fixed_classifiers(model) if head.frame == "spherical_code"]
        return {shape: codes.cached_file(*shape) for shape in {tuple(head.weight.shape[:2]) for head in heads}}

    for (num_classes, dim), content in from_first(codes_of_model).items():
        if model is None and content is not None:
            codes.cache_file(num_classes, dim, content)
    return create() if model is None else model


def from_first(make: Callable[[], T]) -> T:
    """What the main process makes, of which the others are given copies.

    Raises:
        UsageError: On every process, if the main one cannot make it.
    """
    if processes().num_processes == 1:
        return make()
    made: list[Any] = ["", None]
    if processes().is_main_process:
        try:
            made[1] = make()
        except UsageError as e:
            made[0] = str(e)
    problem, found = broadcast_object_list(made)
    if problem:
        raise UsageError(problem)
    return found
