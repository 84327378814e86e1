"""YAML as the reference's users write it, without the surprises: a key given twice is an error."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml


class YamlError(Exception):
    """What is wrong with the text, in one line."""


class _Loader(yaml.SafeLoader):
    """PyYAML takes the last of two equal keys without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(self.construct_object(key_node, deep=True))
            if key in seen:
                raise YamlError(f"line {key_node.start_mark.line + 1}: the key {key!r} is twice")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def load(text: str) -> Any:  # noqa: ANN401  (whatever the document holds)
    """The value of one YAML 1.1 document; None for an empty one. Raises YamlError."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        where = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise YamlError(f"{where}{error.problem or error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise YamlError(" ".join(str(error).split())) from error
