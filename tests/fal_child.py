"""One remote run in a process of its own: ``fal_child.py BASE ADDRESS [interrupt|background]``."""

import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from fal_runs import Machine, order
from klein_cns.remote.limits import Waits


class Server:
    url = sys.argv[2]


def queued():
    return any("queue" in line for line in machine.said)


def check():
    if "interrupt" in sys.argv and queued():
        raise KeyboardInterrupt


def run():
    print(len(machine.run(order(), check, Waits(poll=0.05)).images))


machine = Machine(Path(sys.argv[1]), Server)
if "background" in sys.argv:  # as ComfyUI runs prompts: in a daemon thread, while the main thread may end
    threading.Thread(target=run, daemon=True).start()
    while not queued():
        time.sleep(0.05)
else:
    run()
