"""What classifier-free guidance asks of a model: that it was trained without what is left out."""


def check_cond_dropout(cond_dropout: float, *, has_null_cond: bool) -> None:
    """Raise if conditions are to be dropped and nothing can stand for them."""
    if not 0 <= cond_dropout <= 1:
        raise ValueError(
            f"`cond_dropout` must be between 0 and 1, got {cond_dropout}: use 0.1, or 0 for none."
        )
    if cond_dropout > 0 and not has_null_cond:
        raise ValueError(
            f"`cond_dropout` must be 0 as long as nothing stands for a dropped condition, got "
            f"{cond_dropout:g}: set `null_cond` to 'zeros', or override `encode_null`."
        )


def check_guidance(
    guidance: float, num_classes: int | None, label_dropout: float, *, has_null_cond: bool
) -> None:
    """Raise if the network was never trained without what guidance leaves out.

    What ``null_cond`` or ``encode_null`` states to be no condition is taken to be one that the
    network knows, as pretrained networks do.

    Args:
        guidance: Scale of classifier-free guidance; 1 is none.
        num_classes: Number of classes of the model, or None.
        label_dropout: Fraction of labels that training drops.
        has_null_cond: Whether something stands for no condition.
    """
    if guidance == 1:
        return
    if num_classes is None and not has_null_cond:
        raise ValueError(
            f"`guidance` must be 1 without classes and without `null_cond`, got {guidance:g}: set "
            f"`num_classes` and `label_dropout`, or `null_cond` and `cond_dropout`, or use "
            f"guidance 1."
        )
    if num_classes is not None and not 0 < label_dropout < 1:
        labels = "dropped" if label_dropout == 0 else "seen"
        raise ValueError(
            f"`guidance` must be 1 if labels are never {labels} in training, as `label_dropout` is "
            f"{label_dropout:g}, got {guidance:g}: train with a `label_dropout` of 0.1, or use "
            f"guidance 1."
        )
