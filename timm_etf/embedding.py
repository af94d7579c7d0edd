"""What to index: coordinates of images that separate trainings share."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from timm_etf.classifier import classifier_names
from timm_etf.errors import UsageError
from timm_etf.growing import own_class_names, without_reserved
from timm_etf.heads import FixedClassifier

__all__ = ["Coordinates", "Embedding", "embed", "in_one_order", "isometry", "meeting", "shared", "weights_hash"]

Space = Literal["frame", "features"]

_BATCH = 256
"""Images of a forward pass, where they come in one tensor."""


@dataclass(frozen=True)
class Embedding:
    """Vectors to index, and the coordinate system that they are in.

    Attributes:
        vectors: Unit vectors, [n, D], on the CPU; int8 ones are 127 times that, rounded. Their inner product is the
            cosine (times 127^2).
        system: Name of the coordinate system, KIND-D-HASH, with -centred where a mean was subtracted: equal for two
            embeddings exactly if they may be compared.
    """

    vectors: Tensor
    system: str

    def require(self, system: str) -> "Embedding":
        """This embedding, if it belongs into an index of the coordinate system `system`.

        Raises:
            UsageError: If it is in another one: their inner products would mean nothing.
        """
        if self.system != system:
            raise UsageError(
                f"The index is in the coordinates {system} and these vectors are in {self.system}: embed with a model "
                "of the same classes and frame and in the same space, or index the images again."
            )
        return self


@torch.no_grad()
def embed(
    model: nn.Module,
    images: Tensor | Iterable[Any],
    space: Space = "frame",
    *,
    classes: Sequence[str] | None = None,
    mean: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    strict: bool = False,
) -> Embedding:
    r"""Embed images for an index that outlives the model.

    Separately trained models agree on their classes, and on nothing else. With `space="frame"` an image is put where
    its feature h lies relative to the class vectors: for a frame W,

    .. math:: z = (W W^\top)^{+1/2}\, W h, \qquad \langle z, z' \rangle = \langle P h, P h' \rangle,

    P the projector on the frame's span. So z is the feature, as far as the frame spans it, without the rotation, width
    or backbone that it was trained with: another model under the same frame and classes can be asked for what this one
    has indexed. For a simplex z is the centred logits, up to their scale, which the norm takes out. A model with an
    ordinary classifier has centred logits, too: models that were trained on one set of classes share them about as
    well (how well is what `timm-etf retrieval` measures), but nothing but their training ties them.

    Args:
        model: A timm model; put into evaluation mode. Projector and normalisation of its classifier are applied.
        images: Preprocessed as the model expects it: one tensor [n, C, H, W], or batches of them, each a tensor or, as
            loaders give it, a sequence that begins with one.
        space: `"frame"`, or `"features"`: the pooled features, which no other training shares.
        classes: Names of the classes to place images relative to, in their order; by default all of the model's. To
            search the index of a model with fewer of them, or in another order: that model's `label_names`, of which
            those that it calls reserved are left out. Not with `"features"`.
        mean: Of this model's own vectors of some dozen unlabelled images like those to be indexed, [K] or [d]; it is
            subtracted before the vectors get their length. Where in the space a model puts images of another kind than
            it was trained on is its own: without that, models agree better.
        dtype: `torch.float32`, `torch.float16` or `torch.int8` (symmetric, scale 127).
        strict: Refuse a model without a frame, whose coordinates are its centred logits.

    Returns:
        Unit vectors [n, K] (`"frame"`) or [n, d] (`"features"`), and the name of their coordinate system: of the kind
        of frame and the class names in their order (numbers where the model names none), or of the model's weights;
        and of whether a mean was subtracted.

    Raises:
        UsageError: If the model has not exactly one classifier or, with `strict`, no frame; if it lacks one of
            `classes`; if there are no images; if an option is not one of those above or the vectors are not finite.

    Source:
        For simplexes: Biondi et al. 2023 (CoReS, arXiv 2111.07632), whose features are made to fill the frame's span.

    Example:
        >>> import timm
        >>> from timm_etf import fix_classifier
        >>> models = [timm.create_model(name, num_classes=10) for name in ("test_resnet", "test_vit")]
        >>> x = torch.rand(4, 3, 160, 160)
        >>> old, new = (embed(fix_classifier(model, seed=seed), x) for seed, model in enumerate(models))
        >>> new.require(old.system).vectors.shape
        torch.Size([4, 10])
    """
    if space not in ("frame", "features"):
        raise UsageError(f"Unknown space {space!r}: use 'frame' or 'features'.")
    if dtype not in (torch.float32, torch.float16, torch.int8):
        raise UsageError(f"Vectors are torch.float32, torch.float16 or torch.int8, not {dtype}.")
    if classes is not None and space == "features":
        raise UsageError("Features are not relative to classes: leave classes out, or use space='frame'.")
    net: Any = model.eval()
    coordinates = Coordinates.of(net, strict=strict) if space == "frame" else None
    if coordinates and classes is not None:
        coordinates = coordinates.among(without_reserved(classes))
    at = next(net.parameters())
    vectors: list[Tensor] = []
    for batch in images.split(_BATCH) if isinstance(images, Tensor) else images:
        pixels = (batch if isinstance(batch, Tensor) else batch[0]).to(at)
        x = net.forward_head(net.forward_features(pixels), pre_logits=True).flatten(1)
        vectors.append(normalize((x if coordinates is None else coordinates(x)).float()).cpu())
    if not sum(map(len, vectors)):
        raise UsageError("There are no images to embed: give [n, C, H, W] with n >= 1, or batches of them.")
    found = torch.cat(vectors)
    if mean is not None:
        if mean.shape != found.shape[1:]:
            raise UsageError(
                f"The mean has the shape {list(mean.shape)}, and these vectors have {found.shape[1]} numbers."
            )
        found = normalize(found - mean.to(found))
    if not found.isfinite().all():
        raise UsageError("The embeddings are not finite: the model's weights are damaged, or its training diverged.")
    found = (found * 127).round() if dtype == torch.int8 else found
    system = f"features-{found.shape[1]}-{weights_hash(net)[:12]}" if coordinates is None else coordinates.system
    return Embedding(found.to(dtype), system if mean is None else f"{system}-centred")


@dataclass(frozen=True)
class Coordinates:
    """How a model's features become coordinates that other trainings share; see `embed`.

    Attributes:
        names: Class names in the order of the logits; numbers where the model names none.
        named: Whether it does.
        kind: Of the frame, as far as its vectors' cosines depend on it; `"logits"` for an ordinary classifier.
        head: The classifier.
        basis: (W W')^{+1/2} W of a frame W, [K, d]; None where centred logits are that already, up to their scale.
        places: Of the classes among the head's, where they are not all of them in its order.
    """

    names: tuple[str, ...]
    named: bool
    kind: str
    head: Any
    basis: Tensor | None
    places: list[int] | None = None

    @classmethod
    def of(cls, model: nn.Module, *, strict: bool = False) -> "Coordinates":
        """Those of a timm model, relative to the classes that it has: not to those that are reserved.

        Raises:
            UsageError: If it has not exactly one classifier, or, with `strict`, no frame.
        """
        kind_of_model, heads = type(model).__name__, classifier_names(model)
        if len(heads) != 1:
            raise UsageError(f"{kind_of_model} has {len(heads)} classifiers, and so no one frame: use its features.")
        head: Any = model.get_submodule(heads[0])
        if getattr(head, "weight", None) is None:
            raise UsageError(f"{kind_of_model} has no classifier, and so no frame: create it with its classes.")
        if strict and not isinstance(head, FixedClassifier):
            raise UsageError(
                f"{kind_of_model} has an ordinary classifier and no frame: timm_etf.fix_classifier(model, "
                "frame='nearest') gives it one, and without strict its centred logits are taken."
            )
        own, every = own_class_names(model), range(len(head.weight))
        names = (*own, *map(str, every[len(own) :]))
        whole = cls(names, bool(own), "logits", head, None)
        if isinstance(head, FixedClassifier):
            basis = None if head.frame == "simplex" else isometry(head.weight.flatten(1)).float()
            whole = replace(whole, kind=_kind(head), basis=basis)
        return whole.among(own) if own else whole  # of those that have names: the others are still to come

    def among(self, names: Sequence[str]) -> "Coordinates":
        """Coordinates relative to some of the classes, in a given order: those of a model that has no others.

        Some vertices of a simplex are a simplex themselves, about another centre. Of any other frame the centred logits
        are what is left.

        Raises:
            UsageError: If there are fewer than two, or one is given twice or not among the classes.
        """
        names = tuple(names)
        if names == self.names:
            return self
        place = dict(zip(self.names, self.places or range(len(self.names)), strict=True))
        if lacking := [name for name in names if name not in place]:
            raise UsageError(
                f"{len(lacking)} of the {len(names)} classes are not among this model's {len(place)}, such as "
                f"{lacking[0]!r}: give names that it has."
            )
        if len(set(names)) < max(2, len(names)):
            raise UsageError(f"Coordinates are relative to two classes or more, each given once; got {len(names)}.")
        kind = self.kind if self.basis is None else "logits"
        return replace(self, names=names, kind=kind, basis=None, places=[place[name] for name in names])

    @property
    def system(self) -> str:
        """Name of the coordinate system: equal for all models whose coordinates may be compared."""
        about = json.dumps([self.kind, self.names]).encode()
        return f"{self.kind.partition(' ')[0]}-{len(self.names)}-{hashlib.sha256(about).hexdigest()[:12]}"

    @torch.no_grad()
    def __call__(self, features: Tensor) -> Tensor:
        """Coordinates [n, K] of features [n, d], float32, not normalised."""
        if self.basis is None:
            return self.logits(features)
        return self.head.prepared(self._input(features)).flatten(1).float() @ self.basis.T

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """Centred logits [n, K] of features [n, d], float32."""
        logits_NK = self.head(self._input(features)).flatten(1).float()
        logits_NK = logits_NK if self.places is None else logits_NK[:, self.places]
        return logits_NK - logits_NK.mean(dim=1, keepdim=True)

    def _input(self, features: Tensor) -> Tensor:
        x = features.to(self.head.weight)
        return x[..., None, None] if self.head.weight.ndim == 4 else x


def in_one_order(*pair: Coordinates) -> tuple[Coordinates, Coordinates]:
    """Both, and if one names no classes, but has as many, with the names of the other."""
    mine, other = pair
    if mine.named == other.named or len(mine.names) != len(other.names):
        return mine, other
    names = mine.names if mine.named else other.names
    return replace(mine, names=names, named=True), replace(other, names=names, named=True)


def meeting(mine: Coordinates, other: Coordinates) -> tuple[Coordinates, Coordinates]:
    """Both relative to the classes that both have."""
    mine, other = in_one_order(mine, other)
    names = shared(mine, other)
    return mine.among(names), other.among(names)


def shared(mine: Coordinates, other: Coordinates) -> tuple[str, ...]:
    """Names of the classes that both have, in one order for both; without those that one of them has twice."""
    if mine.names == other.names:
        return mine.names
    if not (mine.named and other.named):  # equal numbers are not equal classes
        return ()
    once = ({name for name, count in Counter(c.names).items() if count == 1} for c in (mine, other))
    return tuple(sorted(set.intersection(*once)))


def _kind(head: FixedClassifier) -> str:
    """What determines the cosines of a frame's vectors, apart from their number."""
    if head.frame == "simplex":
        return head.frame
    if head.frame in ("orthoplex", "spherical_code"):  # which a seed only rotates
        return f"{head.frame} {head.weight.shape[1]}"
    rows = head.weight.detach().float().cpu().contiguous().numpy().tobytes()
    return f"{head.frame} {hashlib.sha256(rows).hexdigest()}"


def isometry(frame: Tensor) -> Tensor:
    """(W W')^{+1/2} W of a frame W [K, d], float64: the map that keeps all inner products within the frame's span.

    Of all such maps it is the one that turns with the frame: of W Q' it is that of W, times Q'.

    Example:
        >>> from timm_etf.frames import simplex
        >>> w = simplex(4, 16)
        >>> torch.allclose(isometry(7 * w), (3 / 4) ** 0.5 * w)
        True
    """
    left_KD, singular_D, right_DD = torch.linalg.svd(frame.detach().double(), full_matrices=False)
    rank = int((singular_D > 1e-4 * singular_D[0]).sum())  # a stored frame is exact to float16 or float32
    return left_KD[:, :rank] @ right_DD[:rank]


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over the names and values of a model's parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        data = value.detach().cpu().contiguous()
        digest.update(f"{name} {data.dtype} {tuple(data.shape)}".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
