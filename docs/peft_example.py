"""Null-space LoRA in a training loop of one's own: calibrate, start a PEFT model, train, see what it disturbs."""

import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import nslora_dist

TARGETS = ["q_proj", "v_proj", "down_proj"]
torch.manual_seed(0)
# In earnest: AutoModelForCausalLM.from_pretrained(...), in 4 bits or under ZeRO-3 or FSDP2 as you like.
config = LlamaConfig(vocab_size=99, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(config)
known = [{"input_ids": torch.randint(0, 50, (4, 32))} for _ in range(8)]  # what must not be forgotten
task = [torch.randint(50, 99, (4, 32)) for _ in range(20)]
with tempfile.TemporaryDirectory() as name:
    folder = Path(name) / "null_space"
    nslora_dist.calibrate(model, known, rank=8, target_modules=TARGETS, folder=folder)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=8, target_modules=TARGETS))
    nslora_dist.init_peft(model, folder)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for ids in task:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    disturbed = nslora_dist.peft_interference(model, folder)["calibration"]
print(f"loss {loss.item():.3f}, largest interference {max(disturbed.values()):.3f}")
