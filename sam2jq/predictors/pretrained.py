"""`from_pretrained`, which both predictors have."""

from typing import Self

from sam2jq.errors import UserError


class FromPretrained:
    """The class method `from_pretrained` of a predictor with a constructor (model, params, **kwargs)."""

    @classmethod
    def from_pretrained(
        cls,
        model_id: str,
        *,
        name: str | None = None,
        version: str | None = None,
        image_size: int | None = None,
        **kwargs,
    ) -> Self:
        """A predictor of "demo", a package, a checkpoint or a Hub id; arguments as in `sam2jq.load`.

        kwargs: further arguments of the constructor, such as `dtype`. Raises UserError for sam2's `device`.
        """
        if "device" in kwargs:
            raise UserError("device: jax runs on its default device; set JAX_PLATFORMS, such as JAX_PLATFORMS=cpu")
        from sam2jq.api import load  # the API is built on the predictors

        model, params = load(model_id, name=name, version=version, image_size=image_size)
        return cls(model, params, **kwargs)  # type: ignore[call-arg]
