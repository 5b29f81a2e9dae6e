"""Access to the network: base models and data sets from hubs, and pictures by URL. Knows nothing of samples."""
