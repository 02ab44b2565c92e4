"""The diffusion model: UNets, the DDPM LightningModule that trains them, and sampling."""
