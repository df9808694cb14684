"""`distill export`."""

from __future__ import annotations


def export(
    checkpoint: str,
    output: str,
    teacher: str | None = None,
    raw: bool = False,
    half: bool = False,
    metrics: str | None = None,
    lora: bool = False,
) -> None:
    """Writes a checkpoint's student as a pipeline that stock diffusers loads.

    Args:
        checkpoint: as `distill fit` wrote it, file or sharded folder.
        output: the diffusers folder; replaced as a whole.
        teacher: where the teacher's pipeline is now, if not where it was.
        raw: the trained weights rather than their moving average.
        half: store float16.
        metrics: a JSON file of measured metrics for the model card.
        lora: of a run with model.lora: write its adapters alone, which the teacher's pipeline loads, rather than a
            pipeline they are merged into.
    """
    from distill import export as exporting

    student = exporting.export(checkpoint, output, teacher, raw, half, metrics, lora)
    print(f"{output}: student of {student.facts['teacher']} after {student.facts['steps']} updates")
