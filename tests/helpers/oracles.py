"""Literal NumPy versions of the paper's formulas, and where the original's figures are."""

import numpy as np
from paths import ROOT, STORED

SHARED = ROOT.parent / "shared"


def golden_cases(kind):
    """Files of the original's figures: those in the project, and more where they are at hand."""
    folders = (STORED / kind, SHARED / "reference" / "golden" / kind)
    found = {path.stem.removesuffix("_s0"): path for f in folders for path in f.glob("*.npz")}
    return [found[name] for name in sorted(found)]


def pixel_contrast_loss_literal(
    anchors,
    anchor_label,
    anchor_valid,
    candidates,
    label,
    valid,
    exclude_self,
    *,
    temperature,
    base_temperature,
):
    """Eq. 3, one anchor and one positive at a time, in float64."""
    costs = []
    for i in np.flatnonzero(anchor_valid):
        similarity = candidates.astype(np.float64) @ anchors[i].astype(np.float64) / temperature
        others = [j for j in np.flatnonzero(valid) if not (exclude_self and j == i)]
        positives = [j for j in others if label[j] == anchor_label[i]]
        negatives = [j for j in others if label[j] != anchor_label[i]]
        if not positives:
            continue
        rest = sum(np.exp(similarity[j]) for j in negatives)
        terms = [-np.log(np.exp(similarity[p]) / (np.exp(similarity[p]) + rest)) for p in positives]
        costs.append(np.mean(terms))
    return temperature / base_temperature * (np.mean(costs) if costs else 0.0)


def sample_counts_literal(label, prediction, num_classes, anchors_per_image, max_views):
    """How many hard and easy pixels of each class the original's rule takes from an image."""
    present = [c for c in range(num_classes) if (label == c).any()]
    views = min(anchors_per_image // max(len(present), 1), max_views)
    counts = {}
    for c in range(num_classes):
        num_hard = int(np.sum((label == c) & (prediction != c)))
        num_easy = int(np.sum((label == c) & (prediction == c)))
        half = max(views // 2, 1) if views else 0  # a single view is a hard one
        if num_hard + num_easy <= views:
            counts[c] = num_hard, num_easy
        elif num_hard >= half and num_easy >= views - half:
            counts[c] = half, views - half
        elif num_hard >= half:
            counts[c] = views - num_easy, num_easy
        else:
            counts[c] = num_hard, views - num_hard
    return counts
