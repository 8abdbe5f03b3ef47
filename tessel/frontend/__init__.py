"""From PyTorch to the IR: capture (AOTAutograd, ``torch.export``) and import."""
