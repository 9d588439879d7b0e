"""To import before the package: checks the annotations of all its modules, shapes included.

But for those of structs.py: tree.map and Orbax rebuild its classes with other leaves.
"""

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook
from paths import ROOT

typechecker = beartype(conf=BeartypeConf(is_pep484_tower=True))  # whole numbers are fractions too

MODULES = [path.stem for path in (ROOT / "contrastseg_jax").iterdir() if path.stem != "structs"]
install_import_hook([f"contrastseg_jax.{name}" for name in MODULES], "checked_shapes.typechecker")
