"""The command line: results on disk, and clear errors with nothing half-written."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from damaged import without_checksum
from equality import differences
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from em_core.__main__ import main
from em_core.commands.common import load_host
from em_core.demo.scenes import concept_scene
from em_core.errors import StoreWarning
from em_core.method import loop
from em_core.model.adapters import init_lora
from em_core.pictures import read_mask
from em_core.runs.concept_set import ConceptSet
from em_core.runs.runner import StopRequest

ROOT = Path(__file__).parents[2]
PROMPT = "a photo of <rex:star> and <doll:circle> on grass"


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scene")
    assert main(["scene", "--seed", "5", "--set", "B", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def learned(scene: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("learned")
    assert main(learn(scene, out, "--truth", str(scene), "--steps", "20")) == 0
    return out


def learn(scene: Path, out: Path, *more: str) -> list[str]:
    prompt = (scene / "prompt.txt").read_text().strip()
    image = str(scene / "image.png")
    return ["learn", "--image", image, "--prompt", prompt, "--out", str(out), "--quiet", *more]


def loud(command: list[str]) -> list[str]:
    """The same command, not quiet."""
    return [one for one in command if one != "--quiet"]


def test_scene_is_a_function_of_its_seed(scene: Path, tmp_path: Path) -> None:
    for seed in ("5", "6"):
        main(["scene", "--seed", seed, "--set", "B", "--out", str(tmp_path / seed)])
    for file in ("image.png", "mask_rex.png", "mask_doll.png", "prompt.txt"):
        assert (tmp_path / "5" / file).read_bytes() == (scene / file).read_bytes()
    assert (tmp_path / "6" / "image.png").read_bytes() != (scene / "image.png").read_bytes()


def test_learn_writes_all_it_promises(scene: Path, learned: Path) -> None:
    names = {"concepts.safetensors", "mask_rex.png", "mask_doll.png", "curves.png", "metrics.json"}
    assert {p.name for p in learned.iterdir()} == names
    metrics = json.loads((learned / "metrics.json").read_text())
    assert {"mode", "seed", "steps", "seconds", "iou", "final_iou", "losses"} <= set(metrics)
    assert (metrics["mode"], metrics["seed"], metrics["steps"]) == ("em", 0, 20)
    truth = {n: read_mask(scene / f"mask_{n}.png") for n in ("rex", "doll")}
    found = {n: read_mask(learned / f"mask_{n}.png") for n in truth}
    ious = [float((found[n] & truth[n]).sum() / (found[n] | truth[n]).sum()) for n in truth]
    assert metrics["final_iou"] == pytest.approx(sum(ious) / 2, abs=1e-6)
    assert [step for step, _ in metrics["losses"]["total"]] == list(range(1, 21))


def test_without_truth_the_iou_is_null(scene: Path, tmp_path: Path) -> None:
    assert main(learn(scene, tmp_path, "--steps", "1", "--mode", "none")) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["iou"] is None and metrics["final_iou"] is None


def test_generate_and_masks_from_a_concept_file(scene: Path, learned: Path, tmp_path: Path) -> None:
    file = str(learned / "concepts.safetensors")
    args = ["--concepts", file, "--out", str(tmp_path / "g"), "--count", "2", "--steps", "3"]
    assert main(["generate", "--prompt", "a photo of <rex> on sand", *args]) == 0
    assert len(list((tmp_path / "g").glob("prompt_1_seed_*.png"))) == 2
    image = str(scene / "image.png")
    args = ["--image", image, "--concepts", file, "--out", str(tmp_path / "m"), "--passes", "4"]
    assert main(["masks", "--prompt", "a photo of <rex> and <x:thing> on sand", *args]) == 0
    assert read_mask(tmp_path / "m" / "mask_rex.png").shape == (64, 64)
    assert (tmp_path / "m" / "overlay.png").is_file()


def test_several_pictures_and_given_masks(scene: Path, tmp_path: Path) -> None:
    image, prompt = str(scene / "image.png"), (scene / "prompt.txt").read_text().strip()
    args = ["--mode", "given", "--masks", str(scene), str(scene), "--steps", "2", "--quiet"]
    out = ["--out", str(tmp_path)]
    assert main(["learn", "--image", image, image, "--prompt", prompt, *args, *out]) == 0
    assert torch.equal(read_mask(tmp_path / "mask_rex_2.png"), read_mask(scene / "mask_rex.png"))


def spoil_image(folder: Path, make) -> Path:
    make(folder / "bad.png")
    return folder / "bad.png"


BAD_PROMPTS = {
    "a photo of a star": "No concept in the prompt",
    "a photo of <rex:star> and <rex:circle>": "more than once",
    "a photo of <rex:zebra>": "does not know the word 'zebra'. It knows: ",
    "<rex:star": "Unbalanced",
    "": "No concept in the prompt",
}


@pytest.mark.parametrize("prompt", BAD_PROMPTS)
def test_bad_prompts(scene: Path, tmp_path: Path, capsys, prompt: str) -> None:
    image, out = str(scene / "image.png"), tmp_path / "out"
    assert main(["learn", "--image", image, "--prompt", prompt, "--out", str(out), "--quiet"]) == 2
    assert BAD_PROMPTS[prompt] in capsys.readouterr().err
    assert not out.exists() or not list(out.iterdir())


def one_pixel(file: Path) -> None:
    Image.new("RGB", (1, 1)).save(file)


def no_image(file: Path) -> None:
    file.write_text("hello")


def save_mode(mode: str):
    def save(file: Path) -> None:
        image = Image.fromarray(concept_scene(160, "A").image).resize((80, 48))
        pixels = np.asarray(image)
        image = (
            Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
            if mode == "I;16"
            else image.convert(mode)
        )
        image.save(file)

    return save


@pytest.mark.parametrize(
    ("make", "says"), [(one_pixel, "at least 8x8"), (no_image, "not a readable picture")]
)
def test_bad_images(tmp_path: Path, capsys, make, says: str) -> None:
    image, out = spoil_image(tmp_path, make), tmp_path / "out"
    assert (
        main(["learn", "--image", str(image), "--prompt", PROMPT, "--out", str(out), "--quiet"])
        == 2
    )
    assert says in capsys.readouterr().err
    assert not list(out.iterdir())


@pytest.mark.parametrize("mode", ["RGBA", "I;16", "L"])
def test_odd_images_are_handled(tmp_path: Path, mode: str) -> None:
    """Alpha, 16 bits, grey: each in a picture that is not square either."""
    image, out = spoil_image(tmp_path, save_mode(mode)), tmp_path / "out"
    args = ["--steps", "1", "--quiet", "--out", str(out)]
    assert main(["learn", "--image", str(image), "--prompt", PROMPT, *args]) == 0
    assert read_mask(out / "mask_rex.png").shape == (48, 80)


def test_truth_of_another_size(scene: Path, tmp_path: Path, capsys) -> None:
    for name in ("rex", "doll"):
        Image.new("L", (32, 32)).save(tmp_path / f"mask_{name}.png")
    assert main(learn(scene, tmp_path / "out", "--truth", str(tmp_path))) == 2
    assert "Expected the picture's 64x64, got 32x32" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--mode", "given"], "needs --masks"),
        (["--device", "cuda:99"], "No device 'cuda:99'"),
        (["--plan", "half", "--joint", "full"], "does not fit the memory plan 'half'"),
        (["--model", "nowhere"], "No model at nowhere"),
        (["--truth", "nowhere"], "No folder nowhere"),
    ],
)
def test_bad_options(scene: Path, tmp_path: Path, capsys, more: list[str], says: str) -> None:
    assert main(learn(scene, tmp_path / "out", *more)) == 2
    assert says in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_memory_plans_of_a_cpu(scene: Path, tmp_path: Path, capsys) -> None:
    """It computes in float32 whatever it is told, and what is computed twice is the same."""
    found = []
    for plan, chosen in (("automatic", "float32"), ("half-recomputing", "float32, recomputing")):
        out = tmp_path / plan
        assert main(loud(learn(scene, out, "--steps", "2", "--plan", plan))) == 0
        assert f"GB free (memory plan {chosen})." in capsys.readouterr().err
        found.append(ConceptSet.load(out / "concepts.safetensors"))
    assert not differences(found[0].vectors, found[1].vectors)
    assert torch.equal(found[0].identity.sample, found[1].identity.sample)


def test_out_of_memory_goes_on_with_the_next_plan(
    monkeypatch: pytest.MonkeyPatch, scene: Path, tmp_path: Path, capsys
) -> None:
    """From the last step: the result is that of a run that always had enough, and no state is left."""
    assert main(learn(scene, tmp_path / "enough", "--steps", "4")) == 0
    m_step, steps = loop.m_step, []

    def failing(problem, state, first):
        steps.append(state.step)
        if steps == [0, 1, 2]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return m_step(problem, state, first)

    monkeypatch.setattr(loop, "m_step", failing)
    capsys.readouterr()
    assert main(loud(learn(scene, tmp_path / "short", "--steps", "4"))) == 0
    said = capsys.readouterr().err
    assert said.index("(memory plan float32).") < said.index("(memory plan float32, recomputing).")
    assert steps == [0, 1, 2, 2, 3]
    found = [
        ConceptSet.load(tmp_path / name / "concepts.safetensors") for name in ("enough", "short")
    ]
    assert not differences(found[0].vectors, found[1].vectors)
    assert not differences(found[0].masks, found[1].masks)
    assert not (tmp_path / "short" / "state.safetensors").exists()


def test_a_folder_that_cannot_be_written(scene: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("")
    assert main(learn(scene, tmp_path / "file" / "out")) == 2
    assert "Could not write" in capsys.readouterr().err


def cut_short(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def with_nan(file: Path) -> None:
    loaded = ConceptSet.load(file)
    loaded.vectors["rex"]["clip_l"][0, 0] = float("nan")
    loaded.save(file)


def with_another_value(file: Path) -> None:
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    tensors = load_file(file)
    tensors["vectors/rex/clip_l"][0, 0] *= 1.001
    save_file(tensors, file, metadata=header)


def a_pickle(file: Path) -> None:
    file.write_bytes(pickle.dumps({"vectors": 1}))


def of_another_model(file: Path) -> None:
    loaded = ConceptSet.load(file)
    loaded.identity.sample.mul_(1.5)
    loaded.save(file)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (cut_short, "not a complete safetensors file"),
        (with_nan, "not finite"),
        (with_another_value, "is damaged: its checksum is not that of its content"),
        (a_pickle, "not a complete safetensors file"),
        (of_another_model, "learned on a different model"),
    ],
)
def test_bad_concept_files(learned: Path, tmp_path: Path, capsys, spoil, says: str) -> None:
    file = tmp_path / "c.safetensors"
    file.write_bytes((learned / "concepts.safetensors").read_bytes())
    spoil(file)
    out = tmp_path / "out"
    assert main(["generate", "--concepts", str(file), "--prompt", "<rex>", "--out", str(out)]) == 2
    assert says in capsys.readouterr().err
    assert not out.exists()


def test_an_unknown_concept_names_the_known(learned: Path, tmp_path: Path, capsys) -> None:
    file = str(learned / "concepts.safetensors")
    assert main(["generate", "--concepts", file, "--prompt", "<max>", "--out", str(tmp_path)]) == 2
    assert "Concept max has not been learned. Known: rex, doll" in capsys.readouterr().err


def test_ctrl_c_saves_and_resume_ends_the_same(scene: Path, tmp_path: Path, capsys) -> None:
    """A run interrupted from outside, then resumed, equals one that was left alone, bit for bit."""
    command = [sys.executable, "-m", "em_core", *learn(scene, tmp_path / "cut", "--steps", "60")]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "cut" / "state.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.4)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume" in said
    assert (tmp_path / "cut" / "state.safetensors").is_file()
    assert not (tmp_path / "cut" / "concepts.safetensors").exists()
    assert main(learn(scene, tmp_path / "cut", "--steps", "60")) == 2
    assert "Continue it with --resume" in capsys.readouterr().err
    subprocess.run([*command, "--resume"], cwd=tmp_path, env=env, check=True, capture_output=True)
    assert main(learn(scene, tmp_path / "whole", "--steps", "60")) == 0
    a, b = (load_file(tmp_path / f / "concepts.safetensors") for f in ("cut", "whole"))
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    cut, whole = (json.loads((tmp_path / f / "metrics.json").read_text()) for f in ("cut", "whole"))
    assert cut["losses"] == whole["losses"] and cut["area"] == whole["area"]


def test_masks_of_concepts_act_with_their_weights(
    scene: Path, learned: Path, tmp_path: Path
) -> None:
    """The same tokens with a LoRA beside them find other masks."""
    concepts = ConceptSet.load(learned / "concepts.safetensors")
    layers = load_host("demo").adaptable_layers()
    lora = {
        n: x.detach() for n, x in init_lora(layers, 2, torch.Generator().manual_seed(0)).items()
    }
    for name, x in lora.items():
        x += name.endswith(".lora_up")
    heats = []
    for weights in ({}, lora):
        file, out = tmp_path / "c.safetensors", tmp_path / str(len(weights))
        replace(concepts, weights=weights, lora_scale=0.5).save(file)
        picture = ["--image", str(scene / "image.png"), "--prompt", "a photo of <rex> on grass"]
        options = ["--concepts", str(file), "--passes", "2", "--out", str(out)]
        assert main(["masks", *picture, *options]) == 0
        heats.append((out / "heat_rex.png").read_bytes())
    assert heats[0] != heats[1]


@pytest.mark.parametrize("number", ["0", "-1", "1.5", "some"])
@pytest.mark.parametrize(
    "option", [["generate", "--steps"], ["generate", "--count"], ["masks", "--passes"]]
)
def test_numbers_that_must_be_positive(capsys, option: list[str], number: str) -> None:
    command, name = option
    with pytest.raises(SystemExit) as done:
        main([command, name, number])
    assert done.value.code == 2 and "a whole number greater than 0" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["demo", "scene", "learn", "masks", "generate", "refine"])
def test_help_has_an_example(capsys, command: str) -> None:
    with pytest.raises(SystemExit) as done:
        main([command, "--help"])
    assert done.value.code == 0 and "python -m em_core " + command in capsys.readouterr().out


def test_finished_concepts_are_not_replaced_unasked(tmp_path: Path, scene: Path, capsys) -> None:
    kept = tmp_path / "concepts.safetensors"
    kept.write_bytes(b"kept")
    prompt = (scene / "prompt.txt").read_text().strip()
    command = ["learn", "--image", str(scene / "image.png"), "--prompt", prompt, "--quiet"]
    assert main([*command, "--out", str(tmp_path)]) == 2
    assert "holds the concepts of a finished run" in capsys.readouterr().err
    assert kept.read_bytes() == b"kept"
    assert main([*command, "--out", str(tmp_path), "--steps", "1", "--overwrite"]) == 0
    assert set(ConceptSet.load(kept).names) == {"rex", "doll"}


def test_a_scene_into_a_folder_that_cannot_be_made(capsys) -> None:
    assert main(["scene", "--seed", "1", "--out", "/proc/nothing"]) == 2
    assert "Choose a writable folder" in capsys.readouterr().err


def full_after(monkeypatch: pytest.MonkeyPatch, folder: Path, writes: int) -> None:
    """The disk that a folder is on has space for so many files of tensors, and no more."""
    left = [writes]

    def write(tensors: dict, path: Path, **more: object) -> None:
        if folder in Path(path).parents:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(28, "No space left on device")
        save_file(tensors, path, **more)

    monkeypatch.setattr("em_core.files.save_file", write)


def test_a_disk_that_is_full_at_the_end_loses_nothing(
    scene: Path, learned: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    """The concepts are elsewhere, and the state is still there to go on from."""
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    full_after(monkeypatch, out, 1)
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))
    assert main(learn(scene, out, "--truth", str(scene), "--steps", "20")) == 75
    said = capsys.readouterr().err
    (kept,) = elsewhere.iterdir()
    assert "No space left on device" in said and f"the concepts are in {kept}" in said
    assert not differences(ConceptSet.load(kept), ConceptSet.load(learned / "concepts.safetensors"))
    assert [file.name for file in out.iterdir()] == ["state.safetensors"]
    monkeypatch.undo()
    more = ["--truth", str(scene), "--steps", "20", "--resume"]
    assert main(learn(scene, out, *more)) == 0
    assert (out / "concepts.safetensors").read_bytes() == kept.read_bytes()


class StopSoon(StopRequest):
    """A request that comes when it is looked for the third time."""

    def __call__(self) -> bool:
        self.looks = getattr(self, "looks", 0) + 1
        return self.looks > 2


@contextmanager
def stop_soon() -> Iterator[StopRequest]:
    yield StopSoon()


def test_a_stop_that_cannot_be_saved_promises_nothing(
    scene: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr("em_core.commands.learning.stop_on_signal", stop_soon)
    full_after(monkeypatch, tmp_path, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("always", StoreWarning)
        assert main(learn(scene, tmp_path, "--steps", "20")) == 130
    said = capsys.readouterr().err
    assert "warning: The state of the run was not saved" in said and "No space left" in said
    assert "Stopped at step 2. This step could not be saved" in said
    monkeypatch.setattr("em_core.files.save_file", save_file)
    (tmp_path / "state.safetensors").unlink()
    monkeypatch.setattr("em_core.commands.learning.stop_on_signal", stop_soon)
    assert main(learn(scene, tmp_path, "--steps", "20")) == 130
    assert "To continue, add --resume to the same command." in capsys.readouterr().err


def test_true_masks_may_be_given_later(scene: Path, tmp_path: Path, monkeypatch) -> None:
    """They do not act, so a run goes on with them; its IoU begins there."""
    with monkeypatch.context() as patch:
        patch.setattr("em_core.commands.learning.stop_on_signal", stop_soon)
        assert main(learn(scene, tmp_path, "--steps", "20")) == 130
    more = ["--truth", str(scene), "--steps", "20", "--resume"]
    assert main(learn(scene, tmp_path, *more)) == 0
    iou = json.loads((tmp_path / "metrics.json").read_text())["iou"]
    assert [step for step, _ in iou["rex"]] == [20]


def test_warnings_are_one_line(learned: Path, scene: Path, tmp_path: Path, capsys) -> None:
    """As for a file that an older version saved."""
    file = tmp_path / "old.safetensors"
    shutil.copy(learned / "concepts.safetensors", file)
    without_checksum(file)
    arguments = [
        "masks", "--image", str(scene / "image.png"), "--prompt", "a <rex>", "--passes", "1",
        "--concepts", str(file), "--out", str(tmp_path / "m"), "--no-crf",
    ]  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(arguments) == 0
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if line] == [
        f"warning: {file} has no checksum, since it was saved by an older version: if it was damaged since, "
        "that goes unnoticed. Save it again."
    ]


def test_resuming_is_for_schedulers_that_start_again(
    scene: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    """The same command with --resume starts a run, goes on with it, and does nothing once it is finished."""
    out = tmp_path / "out"
    command = learn(scene, out, "--steps", "6", "--resume")
    with monkeypatch.context() as patch:
        patch.setattr("em_core.commands.learning.stop_on_signal", stop_soon)
        assert main(command) == 130
    assert (out / "state.safetensors").is_file()
    assert main(command) == 0
    assert main(learn(scene, tmp_path / "whole", "--steps", "6")) == 0
    concepts = (out / "concepts.safetensors").read_bytes()
    assert concepts == (tmp_path / "whole" / "concepts.safetensors").read_bytes()
    capsys.readouterr()
    assert main(command) == 0
    assert capsys.readouterr() == ("", "")
    assert main(loud(command)) == 0
    assert "is finished; nothing is left to do" in capsys.readouterr().out
    assert main(learn(scene, out, "--steps", "7", "--resume")) == 2
    assert "holds the concepts of a finished run that had other settings" in capsys.readouterr().err
    assert main(learn(scene, out, "--steps", "7", "--resume", "--overwrite")) == 0
    assert (out / "concepts.safetensors").read_bytes() != concepts


def test_a_finished_run_is_that_of_the_same_inputs_alone(
    scene: Path, world: Path, tmp_path: Path, capsys
) -> None:
    """Of pictures, prompts, masks and concepts to start from, the one that is another is named; true masks do
    not act."""
    out, other = tmp_path / "out", tmp_path / "other"
    shutil.copytree(scene, other)
    begun = ["--concepts", str(world / "learned"), "--steps", "1", "--resume"]
    given = ["--mode", "given", "--masks"]
    assert main(learn(scene, out, *begun, *given, str(scene))) == 0
    learned = (out / "concepts.safetensors").read_bytes()
    again = loud(learn(scene, out, *begun, *given, str(scene), "--truth", str(scene)))
    assert main(again) == 0
    assert "is finished" in capsys.readouterr().out

    def says(what: str, command: list[str]) -> None:
        assert main(command) == 2
        assert f"a finished run that had other {what}. Choose" in capsys.readouterr().err

    moved = ConceptSet.load(world / "learned" / "concepts.safetensors")
    moved.vectors["rex"]["clip_l"][0, 0] += 1e-3
    moved.save(tmp_path / "moved.safetensors")
    from_others = ["--concepts", str(tmp_path / "moved.safetensors"), *begun[2:]]
    says("concepts to start from", learn(scene, out, *from_others, *given, str(scene)))
    says("concepts to start from", learn(scene, out, *begun[2:], *given, str(scene)))
    Image.new("L", (64, 64), 255).save(other / "mask_rex.png")
    says("masks", learn(scene, out, *begun, *given, str(other)))
    Image.open(scene / "image.png").rotate(90).save(other / "image.png")
    says("pictures", learn(other, out, *begun, *given, str(scene)))
    prompt = (scene / "prompt.txt").read_text().replace("photo of", "photo of a")
    (other / "prompt.txt").write_text(prompt)
    says("pictures and other prompts", learn(other, out, *begun, *given, str(scene)))
    (out / "metrics.json").write_text("{}")
    assert main(again) == 2
    assert "does not tell what the finished run there was made from" in capsys.readouterr().err
    assert (out / "concepts.safetensors").read_bytes() == learned
