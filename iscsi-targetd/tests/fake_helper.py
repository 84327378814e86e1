"""Speaks the helper's protocol and does what a request tells it to: no LVM, no LIO, only faults.

It stands at the far end of a real sshd, to see what becomes of a connection that goes wrong.
"""

import json
import os
import sys

START = os.environ.get("FAKE_START", sys.argv[1] if len(sys.argv) > 1 else "")


def tell(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def main() -> None:
    if START == "silent":
        sys.stdin.read()
        return
    if START == "fatal":
        tell(json.dumps({"fatal": "LIO cannot be used by uid 1000"}) + "\n")
        return
    if START == "refused":
        sys.stderr.write("sudo: a password is required\n")
        sys.exit(1)
    if START == "noise":
        tell('Welcome to storage!\n{"motd": true}\n' * 3)
    tell(json.dumps({"hello": {"protocol": 1 if START == "old" else 2}}) + "\n")
    held = []
    for line in sys.stdin:
        request = json.loads(line)
        answer = json.dumps({"id": request["id"], "result": request["args"]}) + "\n"
        match request["args"].get("do"):
            case "hang":
                continue
            case "half":
                tell(answer[:-5])
                return
            case "die":
                sys.stderr.write("lvm has exploded\n")
                return
            case "nonsense":
                tell("this is no JSON\n")
            case "refuse":
                error = {"kind": request["args"]["kind"], "text": "no"}
                tell(json.dumps({"id": request["id"], "error": error}) + "\n")
            case "hold":
                held.append(answer)
            case "release":
                for earlier in [*reversed(held), answer]:
                    tell(earlier)
            case "shout":
                sys.stderr.write("x" * (1 << 22))
                tell(answer)
            case _:
                tell(answer)


main()
