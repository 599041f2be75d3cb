"""What all commands share."""

import subprocess
import sys


def test_a_line_is_one_write() -> None:
    """Of unbuffered output too: between two writes, a signal or another process could come."""
    code = (
        "import sys, io\n"
        "class Raw(io.RawIOBase):\n"
        "    def writable(self): return True\n"
        "    def write(self, data): seen.append(bytes(data)); return len(data)\n"
        "seen = []\n"
        "from plugins.tools.command import say\n"
        "sys.stdout = io.TextIOWrapper(Raw(), write_through=True)\n"
        "say('epoch 1/2')\n"
        "sys.stderr.write(repr([data for data in seen if data]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == r"[b'epoch 1/2\n']"
