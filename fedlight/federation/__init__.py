"""Who exchanges which slice, how it is merged and accounted, for any LightningModule."""
