"""Whether a server stays what it was: many runs of learning, applying and sampling, with trouble in between.

    python tests/host/soak.py --runs 200

A server of ComfyUI (the one that COMFYUI_PATH names, else the first that is found) gets graphs with
random settings on the demo model. In some, memory runs out somewhere in the model, once or for good;
some are interrupted, and of these half are queued again. After each run, the user's model is hashed, and
the server's memory, threads and open files are counted. The script fails where a bound does not hold.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from found import FOUND, python_of
from server import Builder, Failed, Node, Server

WARM_UP = 30  # runs until everything has been loaded once, at most; a fourth of fewer runs
# MiB, from the runs after the warm-up to the last ones. The process's memory moves in steps of some 30
# MiB where whole weights are learned, since the allocator keeps what was freed; its tensors do not.
MOST_GROWTH = {"megabytes": 96.0, "tensors": 8.0}
MOST_FILES, MOST_BYTES = 64, 2 * 2**30  # of the store


@dataclass
class Seen:
    """What was seen after one run."""

    number: int
    trouble: str
    outcome: str
    seconds: float
    model: str
    megabytes: float
    tensors: float
    threads: int
    open_files: int
    stored: int
    stored_bytes: int
    leftovers: int


def settings(chance: random.Random) -> dict[str, Any]:
    """Random inputs of LearnConcepts, for a run of a few steps."""
    joint = chance.choice(["nothing", "nothing", "LoRA", "LoRA", "cross-attention", "all weights"])
    plans = ["automatic", "automatic", "float32", "float32, recomputing"]
    if joint in ("nothing", "LoRA"):
        plans += ["half", "half, recomputing"]
    find = "find and improve"
    return {
        "mode": chance.choice([find, find, find, "find once", "given", "none"]),
        "steps": chance.randint(2, 4), "seed": chance.randrange(10**6), "joint": joint,
        "memory": chance.choice(plans),
    }  # fmt: skip


def further_settings(chance: random.Random) -> dict[str, Any]:
    """Random inputs of ConceptSettings."""
    automatic = "automatic"
    return {
        "joint_steps": chance.randint(1, 2), "batch": chance.choice([1, 1, 2]),
        "vectors": chance.choice([automatic, 1, 3]), "e_step_every": chance.randint(2, 4),
        "crf": chance.choice([automatic, "off", "demo"]),
        "otsu": chance.random() < 0.2, "flip": chance.random() < 0.2,
        "rank": chance.choice([automatic, 1, 8]),
        "resolution": chance.choice([automatic, 32, 48, 48]),
        "end_of_text_weight": chance.choice([0.0, 0.0005]),
    }  # fmt: skip


def trouble_for(chance: random.Random) -> str:
    """What goes wrong in a run; in half of them, nothing."""
    return chance.choices(
        ["none", "interrupt", "memory once", "memory twice", "memory always"], [50, 20, 15, 8, 7]
    )[0]


def graph(chance: random.Random, trouble: str) -> Builder:
    """Learn from a scene or two, apply what was learned, and draw."""
    b = Builder()
    model = b.add("LoadConceptDemoModel")
    scene = b.add("ConceptDemoScene", seed=chance.randrange(40), kind=chance.choice("ABCDEFGIJ"))
    examples = b.add("ConceptExample", image=scene, prompt=scene[1], masks=scene[2])
    patched: Any = model
    if trouble == "interrupt":
        patched = b.add("TestSlow", model=model, seconds=0.01)
    elif trouble.startswith("memory"):
        times = {"once": 1, "twice": 2, "always": 10**6}[trouble.split()[1]]
        patched = b.add(
            "TestFault",
            model=model,
            after=chance.randrange(200),
            times=times,
            form=chance.randrange(4),
        )
    learn = b.add(
        "LearnConcepts", model=patched, clip=model[1], vae=model[2], examples=examples,
        settings=b.add("ConceptSettings", **further_settings(chance)), **settings(chance),
    )  # fmt: skip
    masks = {"masks": learn[1]} if chance.random() < 0.3 else {}
    ours = b.add(
        "ApplyConceptTokens", model=model, clip=model[1], concepts=learn,
        strength=chance.choice([0.0, 0.7, 1.0]), **masks,
    )  # fmt: skip
    drawn = draw(b, chance, ours, scene)
    b.add("PreviewImage", images=b.add("VAEDecode", samples=drawn, vae=model[2]))
    if chance.random() < 0.2:
        b.add("SaveConcepts", concepts=learn, name="soak", overwrite=True, exports=True)
    return b


def draw(b: Builder, chance: random.Random, ours: Node, scene: Node) -> Node:
    """A sampler of few steps; its prompt is the scene's, in which the concepts stand as they were marked."""
    positive = b.add("CLIPTextEncode", clip=ours[1], text=scene[1])
    negative = b.add("CLIPTextEncode", clip=ours[1], text="")
    side = chance.choice([64, 96, 128])
    latent = b.add("EmptyLatentImage", width=side, height=side, batch_size=1)
    return b.add(
        "KSampler", model=ours, positive=positive, negative=negative, latent_image=latent,
        seed=chance.randrange(1000), steps=chance.randint(1, 3), cfg=3.0, denoise=1.0,
        sampler_name=chance.choice(["euler", "ddim", "dpmpp_2m"]), scheduler="normal",
    )  # fmt: skip


def finish(server: Server, b: Builder, chance: random.Random, trouble: str) -> str:
    """Run a graph, and say how it ended."""
    prompt = server.queue(b.graph)
    if trouble == "interrupt":
        time.sleep(chance.uniform(0.1, 3.0))
        server.post("/interrupt", {})
    messages = dict(server.wait(prompt)["status"]["messages"])
    if "execution_interrupted" in messages:
        if chance.random() < 0.5:
            return "interrupted"
        server.run(b.graph)
        return "interrupted, then finished"
    error = messages.get("execution_error", {}).get("exception_message", "")
    return error.strip().partition(".")[0] if error else "finished"


def look(server: Server, number: int, trouble: str, outcome: str, seconds: float) -> Seen:
    """Hash the user's model, and count what the server holds."""
    b = Builder()
    model = b.add("LoadConceptDemoModel")
    node, held = b.add("TestModelHash", model=model, clip=model[1]), b.add("TestHeld")
    shown = server.run(b.graph)
    digest, tensors = shown[node.id]["text"][0], int(shown[held.id]["text"][0])
    runs = server.base / "user" / "visual_concepts" / "runs"
    files = [file for file in runs.glob("[!.]*") if file.is_file()] if runs.is_dir() else []
    return Seen(
        number, trouble, outcome, round(seconds, 2), digest, round(server.resident(), 1),
        tensors=round(tensors / 2**20, 1), threads=server.status("Threads"),
        open_files=server.open_files(), stored=len(files),
        stored_bytes=sum(file.stat().st_size for file in files),
        leftovers=len([file for file in runs.parent.rglob(".*") if file.is_file()]),
    )  # fmt: skip


EXPECTED = {
    "finished", "interrupted", "interrupted, then finished",
    "Not enough memory to learn, even with the plan float32, recomputing and 1 sample per step",
}  # fmt: skip


def wrong(rows: list[Seen]) -> list[str]:
    """What does not hold: the model, the store's bounds, and what the server holds."""
    found = []
    if len({row.model for row in rows}) != 1:
        found.append("the user's model has changed")
    if max(row.stored for row in rows) > MOST_FILES:
        found.append("the store holds too many files")
    if max(row.stored_bytes for row in rows) > MOST_BYTES:
        found.append("the store holds too many bytes")
    if any(row.leftovers for row in rows):
        found.append("half-written files are left in the store")
    for name, most in MOST_GROWTH.items():
        if growth(rows, name) > most:
            found.append(f"the server's {name} grow by {growth(rows, name):.0f} MiB")
    for name in ("threads", "open_files"):
        if growth(rows, name) > 2:
            found.append(f"{name} grow")
    found += [f"run {row.number}: {row.outcome}" for row in rows if row.outcome not in EXPECTED]
    return found


def warm(rows: list[Seen]) -> list[Seen]:
    """The runs after the warm-up."""
    return rows[min(WARM_UP, len(rows) // 4) :]


def growth(rows: list[Seen], name: str) -> float:
    """From the fifth of the runs after the warm-up to the last fifth, between medians."""
    after = [getattr(row, name) for row in warm(rows)]
    fifth = max(1, len(after) // 5)
    return statistics.median(after[-fifth:]) - statistics.median(after[:fifth])


def report(rows: list[Seen], found: list[str]) -> str:
    """What came of it, for people."""
    counts = Counter((row.trouble, row.outcome) for row in rows)
    after = warm(rows)
    lines = [
        f"{len(rows) - 1} runs in {sum(row.seconds for row in rows) / 60:.0f} minutes. "
        f"The user's model had {len({row.model for row in rows})} hash. After the warm-up the server had "
        f"{after[0].megabytes:.0f} MiB, at the end {rows[-1].megabytes:.0f}, at most "
        f"{max(row.megabytes for row in rows):.0f}; from the first fifth after that to the last the median "
        f"changed by {growth(rows, 'megabytes'):+.0f} MiB, that of its tensors alone by "
        f"{growth(rows, 'tensors'):+.1f}. Threads "
        f"{after[0].threads} and {rows[-1].threads}, open files {after[0].open_files} and "
        f"{rows[-1].open_files}. The store had at most {max(row.stored for row in rows)} files and "
        f"{max(row.stored_bytes for row in rows) / 2**20:.0f} MiB.",
        "",
        "| trouble | how it ended | runs |",
        "| --- | --- | --- |",
        *(f"| {trouble} | {outcome} | {n} |" for (trouble, outcome), n in sorted(counts.items())),
        "",
        f"{'Wrong: ' + '; '.join(found) if found else 'All bounds hold'}.",
        "",
    ]
    return "\n".join(lines)


def soak(comfyui: Path, python: Path, folder: Path, runs: int, seed: int = 0) -> list[Seen]:
    """What was seen after each of so many runs; each is told on the terminal, too."""
    server = Server(comfyui, python, folder).start()
    try:
        rows = [look(server, 0, "none", "finished", 0.0)]
        for number in range(1, runs + 1):
            chance = random.Random(f"{seed} {number}")  # noqa: S311
            trouble, began = trouble_for(chance), time.monotonic()
            try:
                outcome = finish(server, graph(chance, trouble), chance, trouble)
            except Failed as error:
                outcome = f"failed: {error.message}"
            rows.append(look(server, number, trouble, outcome, time.monotonic() - began))
            sys.stdout.write(json.dumps(asdict(rows[-1])) + "\n")
            sys.stdout.flush()
        return rows
    finally:
        server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not FOUND:
        sys.exit("No ComfyUI found; see CONTRIBUTING.md.")
    python = python_of(FOUND[0]) or Path(sys.executable)
    with tempfile.TemporaryDirectory() as folder:
        rows = soak(FOUND[0], python, Path(folder), args.runs, args.seed)
    found = wrong(rows)
    sys.stdout.write(report(rows, found))
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
