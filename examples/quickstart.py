"""Compile a small Llama with MXNorm, look at what was rewritten, switch it off in one layer."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import mxnorm_pass

config = LlamaConfig(hidden_size=256, intermediate_size=704, num_hidden_layers=4, vocab_size=1000)
model = LlamaForCausalLM(config)
ids = torch.randint(0, 1000, (2, 64))

compiled = torch.compile(model, backend="mxnorm")
loss = compiled(ids, labels=ids).loss
loss.backward()
print(f"loss {loss.item():.3f}")

print(mxnorm_pass.explain(model, ids, labels=ids))

options = {"modules": {"model.layers.0.*": False}}
report = mxnorm_pass.explain(model, ids, labels=ids, options=options)
print(f"{len(report.fused)} of {len(report.sites)} norms are fused without layer 0")
