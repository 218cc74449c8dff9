"""The history of a run as its curves and its report page plot it."""


def history(rows: list[dict]) -> dict:
    """The plotted series of the rows of metrics.jsonl: losses, mean bits, bits of each layer, decisions on bits."""
    with_bits = [row for row in rows if "bits" in row]
    layers = list(with_bits[0]["bits"]) if with_bits else []
    return {
        "loss": [[row["step"], row["train/loss"]] for row in rows if "train/loss" in row],
        "val_loss": [[row["step"], row["val/loss"]] for row in rows if "val/loss" in row],
        "avg_bit_width": [[row["step"], row["train/avg_bit_width"]] for row in with_bits],
        "bits": {
            "steps": [row["step"] for row in with_bits],
            "layers": {layer: [row["bits"][layer] for row in with_bits] for layer in layers},
        },
        "decisions": [page_decision(row["epoch"], one) for row in rows for one in row.get("decisions", ())],
    }


def page_decision(epoch: int, decision: dict) -> dict:
    """A decision with the keys that the report page reads: "from" and "to" in place of "bits"."""
    bits, rest = decision["bits"], {key: value for key, value in decision.items() if key != "bits"}
    return {"epoch": epoch, "from": bits, "to": bits - 1} | rest
