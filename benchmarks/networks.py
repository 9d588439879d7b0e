"""Parameters and operations of every network, as the table in the README has them.

python benchmarks/networks.py        # about two minutes; nothing is compiled or run
"""

import jax
import jax.numpy as jnp
from absl import app

from contrastseg_jax.models import segmenter

SIZE, CLASSES, PROJ_DIM = (512, 1024), 19, 256


def main(_: list[str]) -> None:
    """Print the table in Markdown."""
    print("| name | parameters (19 classes) | projection head | GFLOP at 512x1024 |")
    print("| --- | --- | --- | --- |")
    for name in segmenter.model_names():
        params, of_head, operations = measure(name)
        cells = f"`{name}`", f"{params / 1e6:.2f} M", f"+ {of_head / 1e6:.2f} M"
        print("|", " | ".join((*cells, f"{operations / 1e9:.0f}")), "|", flush=True)


def measure(name: str) -> tuple[int, int, float]:
    """Parameters in evaluation, those that training adds for contrast, operations of an image.

    A multiplication and an addition are two operations; those of the program before optimisation.
    """
    model = segmenter.build(name, num_classes=CLASSES, proj_dim=PROJ_DIM, dropout_rate=0.0)
    variables = segmenter.variable_shapes(model)
    image = jax.ShapeDtypeStruct((1, *SIZE, 3), jnp.float32)
    program = jax.jit(lambda v, x: model.apply(v, x, train=False)).lower(variables, image)
    operations = (program.cost_analysis() or {})["flops"]
    sizes = {
        part: sum(leaf.size for leaf in jax.tree.leaves(tree))
        for part, tree in variables["params"].items()
    }
    return sum(sizes.values()) - sizes["proj_head"], sizes["proj_head"], operations


if __name__ == "__main__":
    app.run(main)
