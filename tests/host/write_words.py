"""Write the schema snapshot and the English locale anew, after a node has changed.

    python tests/host/write_words.py

It starts the newest ComfyUI that the host tests find.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

from described import ENGLISH, SNAPSHOT, contract, ours, words, write
from found import FOUND, MISSING, python_of
from server import Server


def main() -> None:
    python = python_of(FOUND[0]) if FOUND else None
    if python is None:
        raise SystemExit(MISSING)
    with TemporaryDirectory() as folder:
        server = Server(FOUND[0], python, Path(folder)).start()
        try:
            info = ours(server)
        finally:
            server.stop()
    write(SNAPSHOT, contract(info))
    write(ENGLISH, words(info))


if __name__ == "__main__":
    main()
