"""`python -m tests.deploy.node`: run deploy/overlays/demo on this machine, as root, and keep it running.

What would be pods are processes of this checkout in network namespaces of their own, started, probed and kept apart as
the rendered manifests say. Prints what happens, and how to ask it something; ends with Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.deploy.cluster import rendered
from tests.deploy.node.cluster import DNS, Cluster, remove_abandoned
from tests.deploy.node.programs import missing


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.deploy.node", description=__doc__)
    parser.add_argument(
        "--patience",
        type=float,
        default=1.0,
        help="multiplies the timeouts of probes and the tries of startup probes: for slow machines (default: 1)",
    )
    arguments = parser.parse_args()
    if why := missing():
        print(f"error: {why}", file=sys.stderr)
        return 1
    remove_abandoned()
    began = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {line}", flush=True)

    with tempfile.TemporaryDirectory(prefix="hybridgate-node-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        with Cluster(rendered("demo"), folder, arguments.patience, say=say) as cluster:
            client = cluster.bystander("client", "apps", {}, hybridgate__clients="allowed")
            cluster.ready("gateway")
            address = cluster.lookup("gateway.hybridgate.svc.cluster.local")
            say("ready; the pods' logs are " + str(folder / "*" / "log"))
            say(f"DNS: {DNS}; a client's namespace: {client.namespace}. Ask, in another terminal:")
            body = '{"model": "auto", "messages": [{"role": "user", "content": "What is TTFT?"}]}'
            url = f"http://{(address or ['?'])[0]}/v1/chat/completions"
            print(f"ip netns exec {client.namespace} curl -s {url} -H 'content-type: application/json' -d '{body}'")
            try:
                while True:
                    time.sleep(60)
            except KeyboardInterrupt:
                say("ends")
    return 0


if __name__ == "__main__":
    sys.exit(main())
