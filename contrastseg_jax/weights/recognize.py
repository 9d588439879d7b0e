"""Recognise the network of a PyTorch state dict by the names and shapes of its tensors."""

from collections.abc import Mapping
from dataclasses import dataclass

from contrastseg_jax.errors import InputError, listed
from contrastseg_jax.models import segmenter, zoo
from contrastseg_jax.models.segmenter import LeafPath, Variables
from contrastseg_jax.models.zoo import NETWORKS
from contrastseg_jax.weights.torch_names import LAST_LAYERS, StateDict, mismatches

Shapes = Mapping[LeafPath, tuple[int, ...]]


@dataclass(frozen=True)
class Recognized:
    """The network or backbone of a state dict."""

    networks: tuple[str, ...]  # one, or for a backbone alone, all that share it
    num_classes: int  # 0: a backbone alone
    proj_dim: int  # 0: no projection head


def recognize(state: StateDict, *, source: str) -> Recognized:
    """The network whose variables match a state dict exactly.

    An auxiliary head that only training needs may be missing.

    Raises:
        InputError: there is none; it lists the mismatches with the closest one. `source` is the
            file name in it.
    """
    shapes = {path: leaf.shape for path, leaf in state.leaves.items()}
    of_backbone = {path[2:]: shape for path, shape in shapes.items() if path[1] == "backbone"}
    candidates = [name for name, spec in NETWORKS.items() if spec.backbone.recognizes(of_backbone)]
    if not candidates:
        names = ", ".join(sorted([*state.tensors, *state.unused])[:5])
        *others, last_family = (family.family for family in zoo.backbone_families())
        raise InputError(
            f"{source}: its tensors ({names}, …) match no supported backbone; those are"
            f" {', '.join(others)} and {last_family} as listed in docs/weights.md"
        )
    last = [shapes.get(("params", "cls_head", layer, "kernel")) for layer in LAST_LAYERS]
    num_classes = next((shape[-1] for shape in last if shape), 0)
    proj_dim = shapes.get(("params", "proj_head", "conv2", "kernel"), (0,))[-1]
    if not num_classes:
        candidates = candidates[:1]  # they share the backbone
    problems_of = {
        name: mismatches(state, _expected(name, num_classes, proj_dim, shapes))
        for name in candidates
    }
    network, problems = min(problems_of.items(), key=lambda item: len(item[1]))
    if problems:
        raise listed(f"{source}, read as {network}", problems)
    networks = (network,) if num_classes else zoo.sharing_backbone(network)
    return Recognized(networks, num_classes, proj_dim)


def _expected(network: str, num_classes: int, proj_dim: int, shapes: Shapes) -> Variables:
    """The variables to fill: of the backbone alone if there is no head, else of all parts."""
    model = zoo.build_model(
        network, num_classes=max(num_classes, 1), proj_dim=proj_dim, dropout_rate=0.0
    )
    leaves = segmenter.variable_shapes(model)
    parts = set(leaves["params"]) if num_classes else {"backbone"}
    if not NETWORKS[network].aux_guides and not any(path[1] == "aux_head" for path in shapes):
        parts.discard("aux_head")
    return {
        collection: {part: found[part] for part in found if part in parts}
        for collection, found in leaves.items()
    }
