"""YAML as settings are written in it: safe, and without a key that is given twice."""

import math

import yaml

from sam2jq.errors import UserError


class StrictLoader(yaml.SafeLoader):
    """A safe loader that refuses mappings with a key twice, of which YAML would keep the last.

    Numbers in forms such as 007, +5, 1_000, 12:30 and 1.10, which YAML 1.1 rewrites to 7, 5, 1000, 750 and 1.1, stay
    text: a field for a number takes such text, too, and one for text must not lose any of it.
    """

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        lines = {}
        for key_node, _ in node.value:
            key, line = (key_node.tag, str(key_node.value)), key_node.start_mark.line + 1
            if key in lines:
                where = f"in lines {lines[key]} and {line}" if lines[key] != line else f"in line {line}"
                raise UserError(f"key {key_node.value} is given twice, {where}: remove one")
            lines[key] = line
        return node

    def construct_yaml_int(self, node):
        number = super().construct_yaml_int(node)
        return number if str(number) == node.value else node.value

    def construct_yaml_float(self, node):
        number = super().construct_yaml_float(node)
        return number if str(number) == node.value or not math.isfinite(number) else node.value


for kind in ("int", "float"):
    StrictLoader.add_constructor(f"tag:yaml.org,2002:{kind}", getattr(StrictLoader, f"construct_yaml_{kind}"))


def parse_yaml(text: str, name: str) -> object:
    """The value that `text` describes. Raises UserError that begins with `name` if it is not YAML, or not safe."""
    try:
        return yaml.load(text, StrictLoader)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{name} is not YAML: {describe(error)}") from error
    except RecursionError as error:
        raise UserError(f"{name} is not YAML: it is nested too deeply") from error
    except (ValueError, TypeError, AttributeError, LookupError) as error:  # of a date or number that there cannot be
        reason = " ".join(str(error).split())
        raise UserError(f"{name} holds a value that YAML cannot read ({reason}): quote it") from error


def describe(error: yaml.YAMLError) -> str:
    """What is wrong and where, on one line."""
    problem, mark = getattr(error, "problem", None) or str(error), getattr(error, "problem_mark", None)
    where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return " ".join(f"{problem}{where}".split())
