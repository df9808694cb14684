"""The tiny pipelines' text side: a CLIP tokenizer for the captions and two contrastively trained CLIP encoders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor, nn

from distill.data import shapes
from distill.files import written_whole

if TYPE_CHECKING:
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

MAX_TOKENS = 18  # start + 16 words of the longest caption + end


def build_tokenizer() -> CLIPTokenizer:
    """A `CLIPTokenizer` with merges learnt on the captions, so that every word of theirs is one token."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    model = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    model.normalizer = normalizers.Lowercase()
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    special = ["<|startoftext|>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=special,
        end_of_word_suffix="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(shapes.captions(0, range(4096)), trainer)
    learnt = json.loads(model.to_str())["model"]
    merges: Any = [tuple(pair) for pair in learnt["merges"]]
    return CLIPTokenizer(vocab=learnt["vocab"], merges=merges, model_max_length=MAX_TOKENS, pad_token="<|endoftext|>")


def build_text_encoder(tokenizer: CLIPTokenizer, width: int, projection: int) -> CLIPTextModelWithProjection:
    """A small CLIP text encoder with random weights."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=projection,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config)


class TextEncoderTraining(L.LightningModule):
    """Contrastive training (open_clip's loss) of two text encoders against one image tower, which is thrown away.

    Args:
        output: folder that gets `tokenizer/`, `text_encoder/` and `text_encoder_2/`.
        widths: hidden sizes of the two encoders.
        projection: size of each one's pooled embedding.
        lr: peak learning rate of the one-cycle schedule.
    """

    def __init__(self, output: str, widths: tuple[int, int] = (64, 96), projection: int = 64, lr: float = 2e-3):
        from open_clip.loss import ClipLoss

        from distill.evaluation.shapes_judge import ShapesJudge

        super().__init__()
        self.output, self.lr = output, lr
        self.tokenizer = build_tokenizer()
        self.encoders: Any = nn.ModuleList(build_text_encoder(self.tokenizer, width, projection) for width in widths)
        self.tower = ShapesJudge(sizes=(projection,) * len(widths), width=16)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.contrast: Any = ClipLoss()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        tokens = self.tokenizer(
            batch["prompts"], padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
        ).input_ids.to(self.device)
        losses = []
        for index, (encoder, image) in enumerate(zip(self.encoders, self.tower(batch["pixels"]), strict=True)):
            text = encoder(tokens).text_embeds
            unit = nn.functional.normalize
            losses.append(self.contrast(unit(image, dim=1), unit(text, dim=1), self.scale.exp().clamp(max=100)))
            self.log(f"loss_{index + 1}", losses[-1], prog_bar=True)
        return torch.stack(losses).sum()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), self.lr)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, int(self.trainer.estimated_stepping_batches))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def on_fit_end(self) -> None:
        if not self.trainer.is_global_zero:
            return
        with written_whole(Path(self.output)) as folder:
            self.tokenizer.save_pretrained(folder / "tokenizer")
            for index, encoder in enumerate(self.encoders):
                name = "text_encoder" if index == 0 else f"text_encoder_{index + 1}"
                encoder.save_pretrained(folder / name)
