"""Tables for the terminal."""

from sam2jq.report import text


def row(name: str, weight: float, output: float | None, **changes) -> dict:
    about = {"dtype": "sint4", "group": "channel", "weights": 10, "bytes": 5, "around": []}
    return about | {"name": name, "relative_error": weight, "output_error": output} | changes


def names(table: str) -> list[str]:
    return [line.split()[0] for line in table.splitlines()[2:]]


def test_worst_layers_are_those_with_the_largest_error_of_their_output():
    rows = [row("small", 0.5, 0.01, dtype="sint3"), row("a", 0.1, 0.3), row("b", 0.2, 0.2), row("blind", 0.9, None)]
    table = text.worst_layers(rows)
    assert table.startswith("worst layers, by relative error of their output\n")
    assert names(table) == ["a", "b", "small"]
    assert "0.10000    0.30000" in table


def test_without_outputs_the_error_of_the_weight_decides_and_the_title_says_so():
    table = text.worst_layers([row(str(i), i / 10, None) for i in range(7)])
    assert table.startswith("worst layers, by relative error of their weight, as outputs were not measured\n")
    assert names(table) == ["6", "5", "4", "3", "2"]
    assert "of output" not in table


def test_a_package_without_output_errors_has_a_table():
    rows = [{name: value for name, value in row("a", 0.1, None).items() if name != "output_error"}]
    assert "of output" not in text.layer_table(rows)
