#!/usr/bin/env python3
"""Checkpoints a running VM and takes it back: checkpoint.py STORE VM. The protocol is in docs/control.md."""
import json, os, socket, sys

folder = os.open(os.path.join(sys.argv[1], "vms", sys.argv[2]), os.O_PATH)
connection = socket.socket(socket.AF_UNIX)
connection.connect(f"/proc/self/fd/{folder}/control.sock")  # however long the path is
stream = connection.makefile("rw")

def call(method, **params):
    print(json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}), file=stream, flush=True)
    while (answer := json.loads(stream.readline())).get("id") != 1:
        print("...", answer["params"]["phase"])  # a notification of the progress
    return answer["result"] if "result" in answer else sys.exit(answer["error"]["message"])

taken = call("checkpoint.take", live=True, message="by a script")
print("taken:", taken["id"], "the VM stood still for", taken["pause_ns"], "ns")
print("back after", call("vm.revert", id=taken["id"])["revert_ns"], "ns")
