"""Are the two CRF backends equal? How many labels and by how much marginals differ on the photos.

    python benchmarks/crf_equal.py

Results: benchmarks/results/crf_equal.json and .md.
"""

import json
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from crf_data import first_masks, photo_folders, read_photo, table, write

from em_core.masks.crf import CUTLER, MaskRefiner, joint_unary

SIZES = ((512, 512), (511, 333), (253, 401))


def compare(folder: Path, size: tuple[int, int], labels: int) -> dict[str, object]:
    """Compare one picture at (height, width) with this many labels, after 10 iterations."""
    image, masks = read_photo(folder, 512)
    image = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0].clamp(0, 1)
    masks = F.interpolate(first_masks(masks, labels - 1)[None], size, mode="nearest")[0]
    unary = joint_unary(masks, CUTLER.unary_strength)
    ours = MaskRefiner(image, CUTLER).infer(unary)
    theirs = MaskRefiner(image, replace(CUTLER, backend="pydensecrf")).infer(unary)
    distance = (ours - theirs).abs()
    return {
        "photo": folder.name,
        "size": f"{size[1]}x{size[0]}",
        "labels": labels,
        "labels that differ": int((ours.argmax(0) != theirs.argmax(0)).sum()),
        "mean dQ": f"{float(distance.mean()):.1e}",
        "largest dQ": f"{float(distance.max()):.1e}",
    }


def main() -> None:
    torch.set_num_threads(1)
    rows = [
        compare(folder, size, labels)
        for folder in photo_folders()
        for size in SIZES
        for labels in range(2, 6)
    ]
    cells = [[str(value) for value in row.values()] for row in rows]
    text = "# torch against pydensecrf: marginals after 10 iterations, CutLER's numbers\n\n"
    write("crf_equal.md", text + table(list(rows[0]), cells))
    write("crf_equal.json", json.dumps(rows, indent=1) + "\n")
    print(text + table(list(rows[0]), cells))


if __name__ == "__main__":
    main()
