"""One remote run in a process of its own, for tests that kill it: ``fal_child.py BASE ADDRESS [interrupt]``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from fal_runs import Machine, order
from klein_cns.remote.waits import Waits


class Server:
    url = sys.argv[2]


def check():
    if "interrupt" in sys.argv and any("queue" in line for line in machine.said):
        raise KeyboardInterrupt


machine = Machine(Path(sys.argv[1]), Server)
print(len(machine.run(order(), check, Waits(poll=0.05)).images))
