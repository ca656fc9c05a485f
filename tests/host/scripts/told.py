"""What a server shows on nodes while a graph runs: `told.py PORT GRAPH.json OUT.json`."""

import asyncio
import json
import struct
import sys
from pathlib import Path

import aiohttp

port, graph, out = sys.argv[1:4]
TEXT = 3  # the kind of message


async def run() -> dict[str, str]:
    """Queue the graph and gather the texts until it has run."""
    told: dict[str, str] = {}
    address = f"127.0.0.1:{port}"
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(f"ws://{address}/ws?clientId=told") as socket,
    ):
        await socket.receive()
        body = {"prompt": json.loads(Path(graph).read_text()), "client_id": "told"}
        async with session.post(f"http://{address}/prompt", json=body) as answer:
            prompt = (await answer.json())["prompt_id"]
        async for message in socket:
            if message.type == aiohttp.WSMsgType.BINARY:
                kind, length = struct.unpack(">II", message.data[:8])
                if kind == TEXT:
                    node, text = message.data[8 : 8 + length], message.data[8 + length :]
                    told[node.decode()] = text.decode()
            elif message.type == aiohttp.WSMsgType.TEXT:
                event = json.loads(message.data)
                data = event.get("data", {})
                over = event["type"] == "executing" and data.get("node") is None
                if over and data.get("prompt_id") == prompt:
                    return told
                if event["type"] == "execution_error":
                    raise RuntimeError(data)
    raise RuntimeError("the server has closed the connection")


Path(out).write_text(json.dumps(asyncio.run(run())))
