"""The figures of a run over its steps: what its curves and its page are drawn from."""


def history(rows: list[dict]) -> dict:
    """What the run's curves and its heat map are drawn from, out of metrics.jsonl."""
    metrics = [row for row in rows if "bits" in row]
    layers = list(metrics[0]["bits"]) if metrics else []
    return {
        "loss": [[row["step"], row["train/loss"]] for row in rows if "train/loss" in row],
        "val_loss": [[row["step"], row["val/loss"]] for row in rows if "val/loss" in row],
        "avg_bit_width": [[row["step"], row["train/avg_bit_width"]] for row in metrics],
        "bits": {
            "steps": [row["step"] for row in metrics],
            "layers": {layer: [row["bits"][layer] for row in metrics] for layer in layers},
        },
        "decisions": [decided(row["epoch"], one) for row in rows for one in row.get("decisions", ())],
    }


def decided(epoch: int, one: dict) -> dict:
    """A decision in the words of the page."""
    bits, rest = one["bits"], {key: value for key, value in one.items() if key != "bits"}
    return {"epoch": epoch, "from": bits, "to": bits - 1} | rest
