"""
Your own vision-language model in RoboVLMs: an adapter of 15 lines, and its sizes. Here SmolVLM's recipe.

    python examples/own_vlm.py                                  # as python train.py --model robovlms, with it
    python examples/own_vlm.py --set formulation=interleaved head=mlp --steps 500 --eval-episodes 20

SigLIP's patches, four of them side by side (a pixel shuffle), one Linear, a small Llama. What an adapter owes
the model: a vision tower, a language_model of transformers, and `see`. All else (rows, masks, query, history,
heads, loss, sessions, freezing, checkpoints) is robovlms.py's. A process that loads such a checkpoint imports
this file first, so that the name is known: python -c "import own_vlm, eval_sim; ..." in this folder.
"""
import math
import sys
from pathlib import Path

import torch.nn.functional as F
import transformers as hf
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import robovlms  # noqa: E402
import train  # noqa: E402
from common import cli  # noqa: E402


class SmolVLM(robovlms.Backbone):
    """SigLIP -> 2 x 2 patches side by side -> Linear -> Llama."""
    pixels = robovlms.HALF_PIXELS

    def __init__(self, cfg, attn):
        super().__init__()
        self.vision_tower = robovlms.vit("SiglipVision", cfg, attn, vision_use_head=False)
        self.project = nn.Linear(4 * cfg.vit_width, cfg.llm_width, bias=False)
        self.language_model = hf.LlamaForCausalLM(hf.LlamaConfig(**robovlms.llm_sizes(cfg, attn)))

    def see(self, pixels):
        x = self.patches(pixels)                                                       # (N, P, .)
        x = x.unflatten(1, (math.isqrt(x.shape[1]), -1)).movedim(-1, 1)                # (N, ., side, side)
        x = F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)                         # (N, P / 4, 4 .)
        return self.project(x)                                                         # (N, P / 4, D)


robovlms.ADAPTERS["smolvlm"] = SmolVLM
robovlms.BACKBONES["smolvlm"] = dict(                          # full size; --preset tiny keeps the tiny sizes
    robovlms.SIGLIP, image_size=384, patch_size=16, llm_width=2048, llm_depth=24, llm_heads=32,
    llm_kv_heads=32, llm_mlp=8192, vocab=49280, pad_id=2, tokenizer="HuggingFaceTB/SmolVLM-Instruct")


if __name__ == "__main__":
    cli(lambda: train.main(["--model", "robovlms", "--set", "backbone=smolvlm", *sys.argv[1:]]))
