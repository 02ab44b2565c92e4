"""What is trained: UNets, the DDPM LightningModule, and sampling from them."""
