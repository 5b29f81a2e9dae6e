"""What comes over the network: base models and datasets from ModelScope, pictures by address. Knows no samples."""
