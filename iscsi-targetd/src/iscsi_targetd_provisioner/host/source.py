"""The helper as one file: the modules of this directory, one after the other.

They are modules here, so that they can be read, typed and tested; the host gets one text, which
needs nothing but its own python3 (3.9 or newer), rtslib and lvm2.
"""

from __future__ import annotations

import ast
from importlib import resources

_MODULES = ("common", "saved", "lvm", "lio", "diagnose", "serve")
_PACKAGE = "iscsi_targetd_provisioner.host"

_HEAD = '''#!/usr/bin/python3
"""Storage host's side of iscsi-targetd-provisioner; JSON lines on stdin and stdout.

Written by `iscsi-targetd-provisioner install-helper`.
"""

from __future__ import annotations
'''
_FOOT = """

if __name__ == "__main__":
    main()
"""


def helper_source() -> str:
    """The text of the helper; the same for the same version of the provisioner."""
    files = resources.files(_PACKAGE)
    parts = [_body((files / f"{name}.py").read_text(encoding="utf-8")) for name in _MODULES]
    return _HEAD + "".join(parts) + _FOOT


def _body(text: str) -> str:
    """A module without its docstring, and without imports of its neighbours."""
    lines = text.splitlines(keepends=True)
    tree = ast.parse(text)
    for node in tree.body:
        docstring = node is tree.body[0] and isinstance(node, ast.Expr)
        neighbour = isinstance(node, ast.ImportFrom) and (
            (node.module or "").startswith(_PACKAGE) or node.module == "__future__"
        )
        if docstring or neighbour:
            assert node.end_lineno is not None
            for number in range(node.lineno - 1, node.end_lineno):
                lines[number] = ""
    return "".join(lines)
