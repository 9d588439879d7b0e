"""Writes tests/stored/peers: what torchvision and timm compute with the recipe's weights.

Run once, in an environment of its own (Python 3.11, on a CPU):

    python3 -m venv peers-env
    peers-env/bin/pip install torch==2.14.1 torchvision==0.29.1 timm==1.0.31 -r requirements.txt
    PYTHONPATH=. peers-env/bin/python tests/helpers/make_peers.py

One file per network: its outputs in evaluation, of one a gradient too, float32, in PyTorch's
layout, of which only every n-th channel, row and column is kept, and a JSON string `meta`: these n,
names and shapes of the state dict, and the versions.
"""

import json

import numpy as np
import recipe
import timm
import torch
import torchvision
from paths import STORED

from contrastseg_jax.weights import parity
from contrastseg_jax.weights.torch_names import locate

FOLDER = STORED / "peers"
VERSIONS = {library.__name__: library.__version__ for library in (torch, torchvision, timm)}


def main():
    FOLDER.mkdir(parents=True, exist_ok=True)
    image = torch.tensor(to_torch(recipe.image()))
    with torch.inference_mode():
        model = filled(timm.create_model("resnet50"))  # with its classifier, at stride 32
        write("timm_resnet50", model, (8, 1, 1), features=model.forward_features(image))

        model = torchvision.models.segmentation.deeplabv3_resnet101(
            weights=None, weights_backbone=None, num_classes=21, aux_loss=True
        )
        features = filled(model).backbone(image)
        logits = model.classifier(features["out"])  # before they are resized to the image
        aux_logits = model.aux_classifier(features["aux"])
        name = "torchvision_deeplabv3_resnet101"
        write(name, model, (1, 1, 1), logits=logits, aux_logits=aux_logits)

    # A multiple of 32: of other sides torchvision leaves out the pixels that make no whole patch.
    image = torch.tensor(to_torch(recipe.image()[:, :64, :64])).requires_grad_()
    model = filled(torchvision.models.convnext_tiny(weights=None))
    features = model.features(image)
    features.square().mean().backward()
    outputs = {"features": features.detach(), "gradient": image.grad}
    write("torchvision_convnext_tiny", model, (3, 2, 2), **outputs)

    # As it stands timm's HRNet does not take this image, and fuses otherwise: see peers.py.
    model = timm.create_model("hrnet_w18")
    tensors = recipe.recipe_tensors(shapes_of(model))
    features = parity.peer_output(("hrnet_w18",), locate(tensors), recipe.image())
    write("timm_hrnet_w18", model, (9, 2, 2), features=to_torch(features))


def to_torch(x):
    return x.transpose(0, 3, 1, 2)


def shapes_of(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def filled(model):
    """The model with the recipe's weights, in evaluation."""
    tensors = recipe.recipe_tensors(shapes_of(model))
    model.load_state_dict({name: torch.tensor(array) for name, array in tensors.items()})
    return model.eval()


def write(name, model, every, **outputs):
    channels, rows, columns = every
    kept = {
        key: np.asarray(value)[:, ::channels, ::rows, ::columns] for key, value in outputs.items()
    }
    meta = {"every": every, "versions": VERSIONS, "shapes": shapes_of(model)}
    np.savez_compressed(FOLDER / f"{name}.npz", meta=json.dumps(meta), **kept)


if __name__ == "__main__":
    main()
