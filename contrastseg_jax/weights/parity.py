"""Compare converted weights with the same network in torchvision or timm, if installed.

One state dict and one image, evaluated by both.
"""

import importlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from contrastseg_jax.models import zoo
from contrastseg_jax.models.backbones.contract import Peer
from contrastseg_jax.models.segmenter import Variables
from contrastseg_jax.weights.torch_names import StateDict


def peer_output(
    networks: Sequence[str], state: StateDict, image: Float[np.ndarray, "b h w 3"]
) -> Float[np.ndarray, "b hs ws c"] | None:
    """PyTorch's output for a state dict, in eval mode; None if no peer is installed.

    For a backbone, its last features, at the stride of the first of `networks`; several maps are
    resized to the first. For torchvision's FCN and DeepLabV3, the logits before they are resized to
    the image.

    `networks`: those that the state dict matches. `image`: normalised, float32, of any size.

    Raises:
        RuntimeError: the peer has tensors of other names or shapes (PyTorch lists them).
    """
    tensors = {state.names[key]: array for key, array in state.tensors.items()}
    is_backbone = all(path[1] == "backbone" for path in state.paths.values())
    if is_backbone:
        tensors = {name.removeprefix("backbone."): array for name, array in tensors.items()}
        model = _peer_backbone(zoo.NETWORKS[networks[0]].backbone.peer)
    else:
        model = _torchvision_network(networks[0], tensors)
    if model is None:
        return None

    torch: Any = importlib.import_module("torch")
    model.load_state_dict({name: torch.tensor(array) for name, array in tensors.items()})
    model.eval()
    with torch.inference_mode():
        x = torch.tensor(image.transpose(0, 3, 1, 2))
        if is_backbone:
            maps = model(x)
            resize = partial(torch.nn.functional.interpolate, mode="bilinear", align_corners=True)
            result = torch.cat([resize(x, size=maps[0].shape[2:]) for x in maps], dim=1)
        else:
            result = model.classifier(model.backbone(x)["out"])
    return result.numpy().transpose(0, 2, 3, 1)


def own_output(
    network: str, num_classes: int, variables: Variables, image: Float[np.ndarray, "b h w 3"]
) -> Float[np.ndarray, "b hs ws c"]:
    """The same output of our network: logits, or with 0 classes the backbone's features.

    On the CPU in full float32: accelerators round the inputs of matrix products.
    """
    model: Any = zoo.build_model(
        network, num_classes=max(num_classes, 1), proj_dim=0, dropout_rate=0.0
    )

    def evaluate(variables: Variables, image: jax.Array) -> jax.Array:
        if num_classes:
            return model.apply(variables, image, train=False).logits
        backbone = {collection: parts["backbone"] for collection, parts in variables.items()}
        return model.backbone.apply(backbone, image, train=False)["last"]

    # Compiling takes longer than running here.
    quick = jax.jit(evaluate, compiler_options={"xla_backend_optimization_level": 0})
    with jax.default_device(jax.devices("cpu")[0]):
        return np.asarray(quick(jax.device_get(variables), image))


def _peer_backbone(peer: Peer | None) -> Any:
    """A backbone of another library, as a module that returns a list of feature maps."""
    if peer is None:
        return None
    return {"timm": _timm_backbone, "torchvision": _torchvision_backbone}[peer.library](peer)


def _torchvision_backbone(peer: Peer) -> Any:
    models = _try_import("torchvision.models")
    extraction = _try_import("torchvision.models.feature_extraction")
    if models is None or extraction is None:
        return None
    model = getattr(models, peer.name)(weights=None)
    model = extraction.create_feature_extractor(model, **peer.settings)
    model.register_forward_hook(lambda _module, _inputs, maps: list(maps.values()))
    return model


def _timm_backbone(peer: Peer) -> Any:
    timm = _try_import("timm")
    if timm is None or not timm.is_model(peer.name):
        return None
    model = timm.create_model(peer.name, features_only=True, **peer.settings)
    for module in model.modules():
        if hasattr(module, "fuse_layers"):
            module.register_forward_pre_hook(_fuse_bilinearly)
    return model


def _fuse_bilinearly(module: Any, inputs: tuple[Any, ...]) -> None:
    """Make a module of timm's HRNet upsample like the segmentation HRNet.

    timm's, for classification, upsamples by a factor with nearest neighbour, which needs sides that
    are multiples of 32. The segmentation HRNet interpolates to the size of the target branch.
    """
    for target, layers in zip(inputs[0], module.fuse_layers, strict=True):
        for layer in layers.modules():
            if hasattr(layer, "scale_factor"):
                layer.scale_factor, layer.size = None, target.shape[2:]
                layer.mode, layer.align_corners = "bilinear", True


def _torchvision_network(network: str, tensors: Mapping[str, np.ndarray]) -> Any:
    """The whole network in torchvision, which has FCN and DeepLabV3 on ResNet-50 and 101."""
    segmentation = _try_import("torchvision.models.segmentation")
    if segmentation is None or "classifier.4.weight" not in tensors:
        return None
    head, _, depth = network.removesuffix("_torchvision").rpartition("_r")
    make = getattr(segmentation, f"{head}_resnet{depth}", None)
    if make is None:
        return None
    return make(
        weights=None,
        weights_backbone=None,
        num_classes=len(tensors["classifier.4.weight"]),
        aux_loss=any(name.startswith("aux_classifier.") for name in tensors),
    )


def _try_import(library: str) -> Any:
    """An optional library; None also if it is incompatible with the installed PyTorch."""
    try:
        return importlib.import_module(library)
    except Exception:  # torchvision raises a RuntimeError for another PyTorch
        return None
