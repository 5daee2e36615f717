"""One remote run in a process of its own, for tests that kill it: ``fal_child.py BASE ADDRESS``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from fal_runs import Machine, order
from klein_cns.remote.waits import Waits


class Server:
    url = sys.argv[2]


print(len(Machine(Path(sys.argv[1]), Server).run(order(), waits=Waits(poll=0.05)).images))
