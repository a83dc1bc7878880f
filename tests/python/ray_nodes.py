"""A Ray cluster of some nodes on this machine, from which nodes can be taken away; ends with its standard input.

    ray_nodes.py NODES

The first line that it prints is JSON: the cluster's address, and its nodes, each by the socket of its raylet. Then for each line of standard input, which is
such a socket, that node is lost, and the line is printed. The node that leads the cluster has no CPU, so that nothing runs there.
"""

import json
import sys

from ray.cluster_utils import Cluster

OBJECT_STORE_BYTES = 80 * 2**20


def main(count: int) -> None:
    each = {"object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **each})
    nodes = [cluster.add_node(num_cpus=1, wait=False, **each) for _ in range(count)]
    cluster.wait_for_nodes()
    sockets = {node.raylet_socket_name: node for node in nodes}
    print(json.dumps({"address": cluster.address, "nodes": list(sockets)}), flush=True)
    for line in sys.stdin:
        cluster.remove_node(sockets[line.strip()], allow_graceful=False)
        print(line.strip(), flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]))
