"""A ComfyUI server with this pack and the tests' helper nodes, and a client for its HTTP API."""

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from found import ON_CARD, front_end_of
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).parents[2]
Graph = dict[str, dict[str, Any]]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Failed(Exception):
    """A node failed; its message, and the node's class."""

    def __init__(self, message: str, node: str) -> None:
        super().__init__(message)
        self.message, self.node = message, node


def refused(answer: str) -> Failed:
    """What ComfyUI says when it does not take a graph: the first error of a node, or all of it."""
    try:
        nodes = json.loads(answer)["node_errors"]
    except (ValueError, KeyError):
        return Failed(answer, "validation")
    for node in nodes.values():
        for error in node["errors"]:
            return Failed(f"{error['message']}: {error['details']}", node["class_type"])
    return Failed(answer, "validation")


class Server:
    """A running ComfyUI with folders of its own."""

    def __init__(self, comfyui: Path, python: Path, base: Path) -> None:
        self.comfyui, self.python, self.base, self.port = comfyui, python, base, free_port()
        nodes = base / "custom_nodes"
        nodes.mkdir(parents=True, exist_ok=True)
        for name, target in (
            ("visual-concepts", ROOT),
            ("helpers", Path(__file__).parent / "helpers"),
        ):
            if not (nodes / name).exists():
                (nodes / name).symlink_to(target, target_is_directory=True)
        models = ("embeddings", "loras", "checkpoints", "controlnet")
        for folder in ("user", "output", "input", "temp", *(f"models/{kind}" for kind in models)):
            (base / folder).mkdir(parents=True, exist_ok=True)
        self.process: subprocess.Popen | None = None

    def start(self) -> "Server":
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "0"}
        command = [
            str(self.python), "main.py", "--listen", "127.0.0.1", "--port", str(self.port),
            "--base-directory", str(self.base), "--disable-auto-launch",
            *([] if ON_CARD else ["--cpu"]), *front_end_of(self.comfyui),
        ]  # fmt: skip
        self.log = (self.base / "server.log").open("ab")
        self.process = subprocess.Popen(
            command, cwd=self.comfyui, env=environment, stdout=self.log, stderr=self.log
        )
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                self.get("/system_stats")
                return self
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.3)
        raise RuntimeError(f"ComfyUI did not start:\n{self.log_text()[-4000:]}")

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(30)
            self.log.close()
            self.process = None

    def log_text(self) -> str:
        return (self.base / "server.log").read_text(errors="replace")

    def status(self, name: str) -> int:
        """A number of the process, as /proc has it."""
        assert self.process is not None
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))

    def resident(self) -> float:
        """Mebibytes of the server's memory."""
        return self.status("VmRSS") / 1024

    def open_files(self) -> int:
        assert self.process is not None
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def text(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as answer:
            return str(answer.read().decode())

    def get(self, path: str) -> Any:
        return json.loads(self.text(path))

    def post(self, path: str, body: Any) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
                text = answer.read()
        except urllib.error.HTTPError as error:
            raise refused(error.read().decode()) from error
        return json.loads(text) if text else None

    def queue(self, graph: Graph) -> str:
        return str(self.post("/prompt", {"prompt": graph})["prompt_id"])

    def wait(self, prompt_id: str, timeout: float = 300) -> dict[str, Any]:
        """The history entry of a finished prompt."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            history = self.get(f"/history/{prompt_id}")
            if prompt_id in history:
                return dict(history[prompt_id])
            if self.process is None or self.process.poll() is not None:
                raise RuntimeError(f"The server is gone:\n{self.log_text()[-4000:]}")
            time.sleep(0.1)
        raise TimeoutError(f"Not finished in {timeout} s.\n{self.log_text()[-3000:]}")

    def run(self, graph: Graph, timeout: float = 300) -> dict[str, Any]:
        """Queue and wait; node id -> what it shows. Raises Failed where a node failed."""
        entry = self.wait(self.queue(graph), timeout)
        for kind, data in entry["status"]["messages"]:
            if kind == "execution_error":
                raise Failed(data["exception_message"], data["node_type"])
            if kind == "execution_interrupted":
                raise Failed("interrupted", data["node_type"])
        return dict(entry["outputs"])

    def forget(self) -> None:
        """Free models and what nodes gave, and wait until the server has: it does so when it gets to it."""
        probe = Builder()
        made = probe.add("EmptyImage", width=8, height=8, batch_size=1, color=0)
        probe.add("TestDump", value=made, name="probe")
        self.run(probe.graph)
        self.post("/free", {"unload_models": True, "free_memory": True})
        for _ in range(100):
            messages = self.wait(self.queue(probe.graph))["status"]["messages"]
            kept = [
                id for kind, data in messages if kind == "execution_cached" for id in data["nodes"]
            ]
            if made.id not in kept:
                return
            time.sleep(0.1)
        raise TimeoutError("The server kept what its nodes gave.")

    def dumped(self, name: str) -> dict[str, Tensor]:
        """What a TestDump node wrote."""
        return load_file(self.base / "output" / f"{name}.safetensors")


class Builder:
    """A graph in API format, node by node."""

    def __init__(self) -> None:
        self.graph: Graph = {}

    def add(self, class_type: str, **inputs: Any) -> "Node":
        """A node; inputs are values, nodes (their first output), or (node, output index)."""
        name = str(len(self.graph) + 1)
        linked = {k: [v.id, 0] if isinstance(v, Node) else v for k, v in inputs.items()}
        linked = {k: [v[0].id, v[1]] if isinstance(v, tuple) else v for k, v in linked.items()}
        self.graph[name] = {"class_type": class_type, "inputs": linked}
        return Node(name)


class Node:
    """A node of a graph."""

    def __init__(self, name: str) -> None:
        self.id = name

    def __getitem__(self, output: int) -> "tuple[Node, int]":
        return self, output
