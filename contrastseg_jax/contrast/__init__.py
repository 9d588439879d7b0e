"""The paper: anchors, candidates, the pixel contrast loss, the memory bank.

To read: `anchors.py` and `memory_bank.py` say what is contrasted with what, `loss.py` holds the
formula, `streaming.py` and `walks.py` how it is computed, `selection.py` the choice of pairs.
"""
