"""The paper: anchors, candidates, the pixel contrast loss, the memory bank."""
