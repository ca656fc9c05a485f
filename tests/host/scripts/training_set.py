"""SaveConceptTrainingSet's folder for ComfyUI, read by core's own data-set nodes: `training_set.py FOLDER`."""

import sys
from pathlib import Path

folder = Path(sys.argv[1])

from inside import import_pack, part, start_comfyui  # noqa: E402

start_comfyui()
import_pack()

import comfy_extras.nodes_dataset as core  # noqa: E402
import folder_paths  # noqa: E402
import torch  # noqa: E402

for name in ("input", "output"):
    (folder / name).mkdir()
    getattr(folder_paths, f"set_{name}_directory")(str(folder / name))
examples = part("nodes.examples").make_examples
g = torch.Generator().manual_seed(0)
images = torch.rand(2, 32, 48, 3, generator=g).mul(255).round() / 255
masks = torch.zeros(4, 32, 48)
masks[0, 4:20, 4:20] = masks[1, 8:24, 24:40] = masks[2, :9, :9] = masks[3, 20:, 20:] = 1.0
given = tuple(examples(images, "a photo of <rex:red dog> and <doll> on grass", masks))
save = part("nodes.dataset").SaveConceptTrainingSet.execute
options = {
    "overwrite": False,
    "words": "rex: sks",
    "apart": False,
    "crop": False,
    "paint_out": False,
}
for number in (1, 2):
    said = save(given, "ComfyUI", "set", **options).args[0]
    assert f"set_0000{number}" in said, said
    assert "a photo of sks and doll on grass" in said and "2 pictures for ComfyUI" in said
said = save(given, "OneTrainer", "set", **options).args[0]
assert (folder / "output" / "training_sets" / "set_00001" / "0002-masklabel.png").is_file()

read = core.LoadImageTextDataSetFromFolderNode.execute("training_sets/set_00002/images")
found, texts = read.args
assert texts == ["a photo of sks and doll on grass"] * 2, texts
order = sorted((folder / "input/training_sets/set_00002/images").glob("*.png"))
listed = [p for p in core.os.listdir(order[0].parent) if p.endswith(".png")]
for name, image in zip(listed, found, strict=True):
    index = [p.name for p in order].index(name)
    assert torch.equal(image[0], images[index]), name
read = core.LoadImageDataSetFromFolderNode.execute("training_sets/set_00002/masks")
listed = [p for p in core.os.listdir(order[0].parent.parent / "masks") if p.endswith(".png")]
for name, image in zip(listed, read.args[0], strict=True):
    index = [p.name for p in order].index(name)
    whole = masks[2 * index : 2 * index + 2].amax(dim=0)
    assert torch.equal(image[0, ..., 0], whole), name
sys.stdout.write("fine\n")
