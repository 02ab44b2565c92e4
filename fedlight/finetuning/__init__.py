"""Fine-tuning of a pretrained model: its folder, what of it is trained, adapters, export."""
